"""The command that runs a method: what it may read, resume, scores, options; with methods made for the tests."""

import json
import re
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TRAIN
from torch import nn
from torch.nn import functional as F

import baselines.__main__
from baselines import METHODS, Entry, run
from baselines.features import make_features
from baselines.method import Method, ShallowMethod, Training
from baselines.run import score_codes
from baselines.settings import method_options
from datasets import samples
from utils.engine.checkpoint import load_checkpoint
from utils.errors import UserError

SEEN = {}


class Toy(Method):
    """Pulls pairs together, with everything that a checkpoint must carry: a layer, a bank, random draws, a final fit."""

    training_defaults = Training(dim=8, batch_size=8, epochs=3, learning_rate=1e-2, clip=1.0)
    defaults = {"weight": 0.5, "mode": "on"}

    def __init__(self, context):
        super().__init__(context)
        SEEN["context"] = context
        self.layer = nn.Linear(context.dim, context.dim)
        self.register_buffer("bank", torch.zeros(len(next(iter(context.features.values()))), context.dim))
        self.register_buffer("offset", torch.zeros(context.dim))

    def start_epoch(self, epoch, embeddings):
        if epoch == 1:
            self.bank.copy_(next(iter(embeddings().values())))

    def forward(self, index, embeddings, epoch):
        one, two = (self.layer(rows) for rows in embeddings.values())
        drawn = torch.rand_like(one)
        return F.mse_loss(one * drawn, two) + self.context.settings["weight"] * F.mse_loss(one, self.bank[index])

    def after_step(self, index, embeddings, epoch):
        self.bank[index] = 0.5 * self.bank[index] + 0.5 * next(iter(embeddings.values()))

    def finish(self, embeddings):
        self.offset.copy_(next(iter(embeddings().values())).mean(dim=0))

    def represent(self, name, embeddings):
        return torch.tanh(self.layer(embeddings) - self.offset)


class Sgd(Toy):
    training_defaults = Training(dim=8, batch_size=8, epochs=1, optimizer="sgd", learning_rate=1e-3, nesterov=True)


class Cut(ShallowMethod):
    dim = 4

    def fit(self, features, context):
        SEEN["context"] = context
        assert all(rows.dtype == "float64" and len(rows) == TRAIN for rows in features.values())

    def transform(self, name, rows):
        return rows[:, :4]


class OfTest(Entry):
    def load(self):
        return {"toy": Toy, "sgd": Sgd, "cut": Cut}[self.place]


@pytest.fixture(autouse=True)
def methods(monkeypatch):
    for name, kind, labels in (("toy", "hash", "none"), ("sgd", "supervised", "noisy labels"), ("cut", "shallow", "none")):
        monkeypatch.setitem(METHODS, name, OfTest(name.title(), name, kind, labels, end_to_end=kind != "shallow"))


@pytest.fixture
def folder(small_digits, tmp_path):
    given = [f"data.root={small_digits}", f"run.output={tmp_path / 'runs'}"]
    SEEN["note"] = make_features("configs/smoke/step1.yaml", given, "random", 0, tmp_path / "features", "a command")
    return tmp_path / "features"


def call(method, folder, tmp_path, *more, out="out", flags=()):
    run.main([method, "--config", "configs/smoke/step1.yaml", "--seed", "1", *flags, "--set", f"data.root={folder}", *SEEN["note"]["settings"],
              f"run.output={tmp_path / out}", *more])
    (found,) = (tmp_path / out / "digits_random" / "baseline").iterdir()
    return found, json.loads((found / "metrics.json").read_text())


def test_a_method_without_labels_reads_none(folder, tmp_path, monkeypatch):
    read, seen = samples.read_labelled_list, []
    monkeypatch.setattr(samples, "read_labelled_list", lambda path, **given: seen.append(str(path)) or read(path, **given))
    _, metrics = call("toy", folder, tmp_path)
    assert SEEN["context"].labels is None and seen and all("test_list" in path for path in seen)
    assert metrics["reads"] == "none" and metrics["mode"] == "head" and metrics["features"]["kind"] == "random"
    assert {"map/GP", "map/avg", "sign/GP", "sign/avg", "seconds", "peak_mib"} <= metrics.keys()
    with pytest.raises(UserError, match="noisy labels, Toy reads none"):
        call("toy", folder, tmp_path, "method.noise=0.2", out="noisy")
    with pytest.raises(UserError, match="MEDA, true source labels reads source labels"):
        call("meda_oracle", folder, tmp_path, "method.noise=0.2", out="oracle")


def test_head_methods_see_the_inputs_and_their_published_training(folder, tmp_path):
    found, _ = call("toy", folder, tmp_path, "method.options.weight=0.25")
    context = SEEN["context"]
    assert (context.dim, context.batch_size, context.epochs, context.seed) == (8, 8, 3, 1) and context.settings == {"weight": 0.25, "mode": "on"}
    assert {f"data.features.{name}={rows.shape[1]}" for name, rows in context.features.items()} < set(SEEN["note"]["settings"])
    assert len((found / "metrics.jsonl").read_text().splitlines()) == 3


def test_resumed_equals_uninterrupted(folder, tmp_path, monkeypatch):
    whole, metrics = call("toy", folder, tmp_path)
    fit = run.fit

    def cut_off(session, learner, evaluate):
        train = learner.train_epoch
        learner.train_epoch = lambda epoch: train(epoch) if epoch < 3 else (_ for _ in ()).throw(KeyboardInterrupt)
        return fit(session, learner, evaluate)

    monkeypatch.setattr(run, "fit", cut_off)
    with pytest.raises(KeyboardInterrupt):
        call("toy", folder, tmp_path, out="cut")
    monkeypatch.setattr(run, "fit", fit)
    (broken,) = (tmp_path / "cut" / "digits_random" / "baseline").iterdir()
    run.main(["toy", "--resume", str(broken)])
    one, two = (load_checkpoint(path / "last.pt")["learner"] for path in (whole, broken))
    assert one["classifiers"].keys() >= {"method.layer.weight", "method.bank", "method.offset"} and one["classifiers"]["method.offset"].any()
    for part in ("encoders", "classifiers"):
        assert all(torch.equal(values, two[part][key]) for key, values in one[part].items())
    again = json.loads((broken / "metrics.json").read_text())
    assert {key: again[key] for key in metrics if key.startswith(("map/", "sign/"))} == {
        key: metrics[key] for key in metrics if key.startswith(("map/", "sign/"))}
    with pytest.raises(UserError, match="first word of the command, found toy; leave method.name out"):
        call("toy", folder, tmp_path, "method.name=cut", out="none")
    assert not (tmp_path / "none").exists()
    with pytest.raises(UserError, match="is a run of toy, not of cut"):
        run.main(["cut", "--resume", str(broken)])


@pytest.mark.parametrize("name,kind,given", [
    ("toy", torch.optim.Adam, {"betas": (0.5, 0.9), "weight_decay": 0.25}), ("sgd", torch.optim.SGD, {"nesterov": True, "weight_decay": 0.125}),
])
def test_the_optimiser_and_the_clip_of_a_method_are_used(folder, tmp_path, monkeypatch, name, kind, given):
    seen, step = [], kind.step
    norms = lambda groups: torch.cat([p.grad.flatten() for group in groups for p in group["params"] if p.grad is not None]).norm().item()
    monkeypatch.setattr(kind, "step", lambda self, *more: (seen.append((self.defaults, norms(self.param_groups))), step(self, *more))[1])
    texts = [f"optim.{key}={list(value) if key == 'betas' else value}" for key, value in given.items()]
    call(name, folder, tmp_path, *texts, "optim.clip=1e-3", "optim.epochs=1", "optim.learning_rate=0.02")
    wanted = {**given, "lr": 0.02, **({"momentum": 0.9} if name == "sgd" else {})}
    assert seen and all({key: defaults[key] for key in wanted} == wanted and norm == pytest.approx(1e-3, rel=1e-3) for defaults, norm in seen)


def test_shallow_and_supervised(folder, tmp_path, monkeypatch):
    clock, load = [0.0], run.load_test_samples
    monkeypatch.setattr(run, "load_test_samples", lambda *given: (clock.append(clock[-1] + 9), load(*given))[1])
    monkeypatch.setattr(run, "time", types.SimpleNamespace(perf_counter=lambda: clock[-1]))
    _, metrics = call("cut", folder, tmp_path)
    assert metrics["seconds"] == 0  # reading the test set is no part of the fit
    assert metrics["row"] == "Cut" and "sign/avg" not in metrics and SEEN["context"].labels is None
    _, metrics = call("sgd", folder, tmp_path, "method.noise=0.25", out="noisy")
    assert metrics["reads"] == "labels, 0.25 of them wrong (symmetric)" and SEEN["context"].labels.shape == (TRAIN,)
    assert metrics["reads_labels"].startswith("noisy labels of ")  # which figures and tables are marked by
    assert SEEN["context"].num_clusters == int(SEEN["context"].labels.max()) + 1
    with pytest.raises(UserError, match="--set optim.epochs=2: PT-FUCH is fitted without optim .* method.options.rounds"):
        call("pt_fuch", folder, tmp_path, "optim.epochs=2", out="optim")
    short = [f"method.options.{key}=1" for key in ("rounds", "private_epochs", "global_epochs")]
    _, metrics = call("pt_fuch", folder, tmp_path, *short, out="hash")  # fitted by a loop of its own, ranked as a hash method
    assert metrics["row"] == "PT-FUCH" and "sign/avg" in metrics


def test_end_to_end_with_shared_features_for_the_targets(folder, small_digits, tmp_path):
    given = ["--config", "configs/smoke/step1.yaml", "--set", f"data.root={small_digits}", f"run.output={tmp_path / 'e2e'}", "optim.epochs=1"]
    run.main(["toy", "--features", str(folder), *given])
    assert SEEN["context"].features["GrayImg"].shape == (TRAIN, 128) and SEEN["context"].epochs == 1
    (found,) = (tmp_path / "e2e" / "digits" / "baseline").iterdir()
    run.main(["toy", "--resume", str(found)])  # which knows where its targets came from
    assert SEEN["context"].features["GrayImg"].shape == (TRAIN, 128) and not (found / "figures").exists()
    vector = next((folder / "train").rglob("GrayImg*.npy"))
    kept = vector.read_bytes()
    np.save(vector, np.load(vector) + 1)
    with pytest.raises(UserError, match="features/GrayImg"):
        run.main(["toy", "--resume", str(found)])
    vector.write_bytes(kept)
    run.main(["toy", *given])
    assert SEEN["context"].features["GrayImg"].shape == (TRAIN, 8)  # of the initial encoders
    with pytest.raises(UserError, match=r"Toy takes two modalities, found data.modalities: \['GrayImg', 'RGBImg', 'PointCloud'\]"):
        run.main(["toy", *given, "data.modalities=[GrayImg,RGBImg,PointCloud]", "model.pretrained.RGBImg=none"])
    with pytest.raises(UserError, match="Toy learns from pairs, .* found none and views"):
        run.main(["toy", *given, "data.pairing=none", "data.positives=views"])
    with pytest.raises(UserError, match="Cut is trained on features"):
        run.main(["cut", *given])
    with pytest.raises(UserError, match="is of features already: leave it out"):
        call("toy", folder, tmp_path, flags=["--features", str(folder)])
    for path in folder.glob("digits_random_*_train_list.txt"):
        path.write_text("".join(reversed(path.read_text().splitlines(keepends=True))))
    with pytest.raises(UserError, match="do not list the same objects in one order"):
        run.main(["toy", "--features", str(folder), *given])


def test_features_of_ones_own_need_no_note_and_a_damaged_one_ends_the_run_before_its_training(folder, tmp_path):
    (folder / "features.json").write_text('{"kind": "random"}')
    SEEN.pop("context", None)
    with pytest.raises(UserError, match="features.json is damaged: expected kind, seed, commit, command, found no seed, commit, command"):
        call("cut", folder, tmp_path, out="damaged")
    assert "context" not in SEEN
    (folder / "features.json").unlink()
    _, metrics = call("cut", folder, tmp_path)
    assert metrics["features"] == {} and metrics["mode"] == "head" and "map/avg" in metrics


def test_the_how_to_works_as_written(folder, tmp_path, monkeypatch):
    text = (Path(__file__).resolve().parents[2] / "docs" / "comparison.md").read_text()
    module = types.ModuleType("baselines.mymethod")
    exec(re.search(r"```python\n(.*?)```", text, flags=re.DOTALL).group(1), module.__dict__)
    monkeypatch.setitem(sys.modules, "baselines.mymethod", module)
    monkeypatch.setitem(METHODS, "mymethod", eval(re.search(r'`"mymethod": (Entry\(.*?\)),`', text).group(1), {"Entry": Entry}))
    found, metrics = call("mymethod", folder, tmp_path, "optim.epochs=1", flags=["--figures"])
    assert metrics["row"] == "My method" and "sign/avg" not in metrics and metrics["map/avg"] > 0
    assert {path.name for path in (found / "figures").iterdir()} == {"tsne.png", "retrieval_GP.png", "retrieval_PG.png"}
    shutil.rmtree(found / "figures")
    run.main(["mymethod", "--resume", str(found)])
    assert (found / "figures/tsne.png").is_file()


@pytest.mark.parametrize("given,problem", [({"wieght": "1"}, "did you mean 'weight'"), ({"weight": "much"}, "expected float, got 'much'")])
def test_options_that_do_not_fit(given, problem):
    with pytest.raises(UserError, match=problem):
        method_options(Toy, given)


@pytest.mark.parametrize("name,text,problem", [
    ("kcca", "landmarks=0", "must be at least 1, got 0"), ("meda", "rounds=0", "must be at least 1, got 0"),
    ("jdsh", "left_share=2", "must be at most 1, got 2"), ("dgcpn", "neighbours=40", "must be at most 1, got 40 .a share of the training pairs"),
    ("pt_fuch", "temperature=0", "must be above 0, got 0"), ("dccae", "ridge=0", "must be above 0, got 0"),
    ("djsrh", "intra=-50", "must be at least 0, got -50"),
    ("ucch", "margin=nan", "expected a finite number, got 'nan'"), ("scl", "dropout=1", "must be below 1, got 1"),
])
def test_options_out_of_range(name, text, problem):
    key, _, value = text.partition("=")
    with pytest.raises(UserError, match=f"^method.options.{key}: {problem}"):
        method_options(METHODS[name].load(), {key: value})


def test_limits_are_of_options_and_hold_for_their_defaults():
    for entry in METHODS.values():
        method = entry.load()
        assert method.limits.keys() <= method.defaults.keys()
        assert method_options(method, {key: str(method.defaults[key]) for key in method.limits}) == method.defaults


def test_sign_codes_owe_nothing_to_the_order_of_the_gallery(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    labels = {name: torch.arange(10).repeat_interleave(30) for name in ("GrayImg", "PointCloud")}
    equal = {name: torch.ones(300, 4) for name in labels}
    table = score_codes(equal, labels, signs=True)
    assert abs(table["sign/avg"] - table["map/chance"]) < 0.01  # sorted by class, a stable sort would be far from chance
    codes = {name: torch.randn(300, 4, generator=generator) for name in labels}
    order = torch.randperm(300, generator=generator)
    moved = score_codes({name: rows[order] for name, rows in codes.items()}, {name: rows[order] for name, rows in labels.items()}, signs=True)
    table = score_codes(codes, labels, signs=True)
    assert moved["map/GP"] == pytest.approx(table["map/GP"]) and abs(moved["sign/GP"] - table["sign/GP"]) < 0.005
    assert "sign/avg" not in score_codes(codes, labels, signs=False)
    monkeypatch.setattr(run, "mean_average_precision", lambda *given, seed: 2**seed)
    assert score_codes(codes, labels, signs=True)["sign/GP"] == 1023 / 10  # seeds 0 to 9


def test_the_table_of_methods_has_what_was_published(capsys):
    assert METHODS["ucch"].published() == pytest.approx({"3D MNIST": 0.7928, "ModelNet10": 0.7690, "MI3DOR": 0.6690, "ModelNet40": 0.7636}, abs=5e-5)
    assert METHODS["cca"].published()["3D MNIST"] == pytest.approx(0.3945, abs=5e-5)
    assert {name: METHODS[name].published()["3D MNIST"] for name in ("rono", "mrl")} == pytest.approx({"rono": 0.955, "mrl": 0.9495})  # 20 % wrong labels
    assert METHODS["revgrad_oracle"].published() == {}
    baselines.__main__.main([])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(METHODS) and next(line for line in lines if line.startswith("ucch")).split()[-4:] == ["79.3", "76.9", "66.9", "76.4"]


def test_the_table_names_what_every_method_reads():
    unsupervised = "cca kcca mcca dcca dccae revgrad meda djsrh jdsh dgcpn ucch scl pt_fuch cfrh toy cut"
    for names, reads in ((unsupervised, False), ("rono mrl revgrad_oracle meda_oracle sgd", True)):
        assert all(METHODS[name].reads_truth == reads for name in names.split())
    with pytest.raises(UserError, match="unknown method 'uch', did you mean 'ucch'"):
        run.main(["uch"])
