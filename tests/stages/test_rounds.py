"""The recipe through the command lines: views, communities, inherited encoders, rounds; deterministic, resumable, without labels."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import TRAIN, with_lists, write_lists
from stage_runs import Killed, assert_same_result, kill, kill_at, log_lines, only_run, settings, trained

import evaluate
import train_step1
import train_step2
from datasets import label_runs
from datasets.pseudo_labels import posteriors_path, pseudo_label_path, read_origin
from utils.engine.checkpoint import load_checkpoint, save_checkpoint
from utils.engine.run_log import RunLog
from utils.errors import UserError

VIEWS = ["data.views={GrayImg: 2}", "data.augment={image_elastic: 0.05, point_warp: 0.05}"]
STEP1 = [*VIEWS, "pla.num_clusters=auto", "pla.fuse=trusted", "pla.mlm_only_epochs=3", "optim.epochs=3", "optim.batch_size=16"]
STEP2 = [*VIEWS, "rdl.start=inherited", "eval.representation=posterior", "rdl.unclipped_epochs=20", "rdl.lambda_2=1", "optim.epochs=20",
         "optim.learning_rate=0.005", "run.eval_every=0"]


def train(root, out, rounds=1):
    """Run step 1 and the given number of rounds of step 2; return their run folders."""
    runs = [trained(root, out, 1, *STEP1)]
    for number in range(rounds):
        runs.append(trained(root, out / f"round-{number}", 2, *STEP2, "--from", str(runs[-1])))
    return runs


GUARD = label_runs.check_it_helped


@pytest.fixture(scope="module", autouse=True)
def any_round_goes():
    """Whether a round on forty samples helps is a matter of rounding; the guard has tests of its own."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (label_runs, train_step2):
            patch.setattr(module, "check_it_helped", lambda folder, origin: None)
        yield


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, _digits_folder):
    out = tmp_path_factory.mktemp("recipe")
    return out, train(with_lists(_digits_folder), out, rounds=2)


def origin_of(run):
    return read_origin(pseudo_label_path(run / "pseudo_labels", "digits", "GrayImg"))


def ids_of(run, name="GrayImg"):
    rows = pseudo_label_path(run / "pseudo_labels", "digits", name).read_text().splitlines()
    return [int(row.split()[-1]) for row in rows]


def test_one_id_for_all_modalities_and_what_it_was_decided_on(recipe):
    _, runs = recipe
    for run in runs:
        assert ids_of(run) == ids_of(run, "PointCloud")
        origin = origin_of(run)
        assert origin["run_id"] == run.name and 0 <= origin["agreement"] <= 1
        assert set(origin["reliability"]) == {"GrayImg", "PointCloud"}
        with np.load(posteriors_path(run / "pseudo_labels", "digits")) as beliefs:
            assert str(beliefs["run_id"]) == run.name
            np.testing.assert_allclose(beliefs["GrayImg"].sum(1), 1, atol=1e-5)
            assert beliefs["GrayImg"].shape == (TRAIN, origin["clusters"]["num_clusters"])
            if run is not runs[0]:  # of step 1 the communities themselves
                assert beliefs["GrayImg"].argmax(1).tolist() == ids_of(run)
    found = origin_of(runs[0])["clusters"]
    assert found["num_clusters"] == len(set(ids_of(runs[0]))) and {"resolution", "trials"} <= found.keys()
    assert f"{found['num_clusters']} clusters ({found['method']})" in (runs[0] / "log.txt").read_text()


def test_a_round_starts_from_the_run_before(recipe):
    _, runs = recipe
    for before, run in zip(runs, runs[1:]):
        assert f"initial weights of every encoder: {before / 'last.pt'}" in (run / "log.txt").read_text()
        assert json.loads((run / "pseudo_labels.json").read_text())["run_id"] == before.name
        assert origin_of(run)["clusters"]["agreement_before"] == origin_of(before)["agreement"]


def test_one_call_trains_every_round(recipe, small_digits, tmp_path):
    _, (step1, *alone) = recipe
    train_step2.main([*settings(small_digits, tmp_path, 2, *STEP2, "rdl.rounds=2"), "--from", str(step1)])
    folders = lambda: sorted((tmp_path / "runs" / "digits" / "step2").iterdir())
    together = folders()
    assert len(together) == 2 and [RunLog.open(run).config()["rdl"]["rounds"] for run in together] == [2, 1]
    for run, same in zip(together, alone, strict=True):
        assert ids_of(run) == ids_of(same)
        assert [line["loss/rcll"] for line in log_lines(run)] == [line["loss/rcll"] for line in log_lines(same)]
    train_step2.main(["--resume", str(together[0])])  # it had been trained to its end
    assert folders() == together
    together[1].rename(tmp_path / "lost")
    state = load_checkpoint(together[0] / "last.pt")
    save_checkpoint(together[0] / "last.pt", state | {"epoch": state["epoch"] - 1, "rows": state["rows"][:-1]})
    train_step2.main(["--resume", str(together[0])])  # its last epoch, and the round after it
    assert len(folders()) == 2


def test_no_round_follows_one_that_did_not_help(recipe, small_digits, tmp_path, monkeypatch):
    _, runs = recipe

    def refuse(folder, origin):
        raise UserError(f"{folder} did not help")

    monkeypatch.setattr(train_step2, "check_it_helped", refuse)
    for rounds, words in ((3, "no further round"), (1, "warning")):  # of the last round it is said as well
        run = trained(small_digits, tmp_path / str(rounds), 2, *STEP2, "optim.epochs=1", f"rdl.rounds={rounds}", "--from", str(runs[0]))
        assert f"{words}: {run / 'pseudo_labels'} did not help" in (run / "log.txt").read_text()


def test_evaluation_prints_every_representation(recipe, small_digits, capsys):
    _, runs = recipe
    evaluate.main(["--run", *map(str, runs), "--device", "cpu"])
    table = capsys.readouterr().out
    assert table.count("posterior, diffusion") == 3 and "transductive" in table
    assert table.count("reliability/PointCloud") == table.count("own_acc/PointCloud") == 3
    for run in runs[1:]:
        scores = json.loads((run / "metrics.json").read_text())
        assert scores["map/avg"] == scores["variants"]["posterior"]["map/avg"] == pytest.approx(log_lines(run)[-1]["map/avg"])
        assert len({round(found["map/avg"], 6) for found in scores["variants"].values()}) > 3


@pytest.mark.parametrize("kind", ["permuted", "absent"])
def test_labels_change_no_bit(recipe, small_digits, tmp_path, kind):
    out, runs = recipe
    labels = np.random.default_rng(5).permutation(10).repeat(TRAIN // 10).tolist() if kind == "permuted" else [None] * TRAIN
    write_lists(small_digits, "train", labels)
    again = train(small_digits, tmp_path)
    assert_same_result(out, tmp_path, 1)
    assert [ids_of(run) for run in again] == [ids_of(run) for run in runs[:2]]


@pytest.mark.parametrize("epochs", [1, 2])
def test_resume_equals_uninterrupted(recipe, small_digits, tmp_path, monkeypatch, epochs):
    """Stopped after some epochs, and once more after the last one, before the communities are written."""
    out, runs = recipe
    kill_at(monkeypatch, train_step1.main, settings(small_digits, tmp_path, 1, *STEP1), epochs)
    run = only_run(tmp_path, 1)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(train_step1, "write_annotation", kill)
        train_step1.main(["--resume", str(run)])
    train_step1.main(["--resume", str(run)])
    assert ids_of(run) == ids_of(runs[0])
    assert_same_result(out, tmp_path, 1)


@pytest.mark.parametrize("now,before,words", [
    ({"agreement": 0.5}, {"agreement_before": 0.6}, "its modalities agree on 0.5000 of the objects, after 0.6000"),
    ({"agreement": 0.6, "reliability": {"GrayImg": 0.5, "PointCloud": 0.5}},
     {"agreement_before": 0.6, "reliability_before": {"GrayImg": 0.4, "PointCloud": 0.7}}, "views of a sample agree to 0.5000 beyond chance, after 0.5500"),
])
def test_a_round_that_did_not_help_starts_no_other(recipe, small_digits, tmp_path, monkeypatch, now, before, words):
    _, runs = recipe
    monkeypatch.setattr(label_runs, "check_it_helped", GUARD)
    labels = tmp_path / "run" / "pseudo_labels"
    shutil.copytree(runs[2] / "pseudo_labels", labels)
    for name in ("GrayImg", "PointCloud"):
        meta = pseudo_label_path(labels, "digits", name)
        meta = meta.with_name(f"{meta.name}.meta.json")
        content = json.loads(meta.read_text())
        content["provenance"] |= now
        content["provenance"]["clusters"] |= before
        meta.write_text(json.dumps(content))
    with pytest.raises(UserError, match=f"did not help: {words}"):
        train_step2.main(settings(small_digits, tmp_path, 2, *STEP2, f"rdl.pseudo_labels={labels}"))


def test_labels_of_other_samples_under_the_same_names_are_refused(recipe, small_digits, tmp_path):
    _, runs = recipe
    labels = tmp_path / "run" / "pseudo_labels"
    shutil.copytree(runs[1] / "pseudo_labels", labels)
    metas = [path.with_name(f"{path.name}.meta.json") for path in (pseudo_label_path(labels, "digits", name) for name in ("GrayImg", "PointCloud"))]
    written = [json.loads(meta.read_text()) for meta in metas]
    made_of = written[0]["provenance"]["inputs"]
    cloud = made_of["PointCloud"]
    assert made_of.keys() == {"GrayImg", "PointCloud"} and cloud["shape"][1::2] == [1, 3] and len(cloud["array"]) == len(cloud["rows"]) == 64
    other = {**cloud, "array": cloud["array"][::-1]}
    command = [*settings(small_digits, tmp_path, 2, *STEP2, f"rdl.pseudo_labels={labels}", "optim.epochs=1", "rdl.start=fresh")]
    for inputs, words in ((made_of | {"PointCloud": other}, "made of other samples of PointCloud .*repeat.*remove"),
                          ({"PointCloud": {**other, "shape": [40, 1, 9, 3]}}, None), ({"PointCloud": {**other, "rows": ""}}, None), ([1], None)):
        for meta, content in zip(metas, written):
            content["provenance"]["inputs"] = inputs
            meta.write_text(json.dumps(content))
        if words:
            with pytest.raises(UserError, match=words):
                train_step2.main(command)
        else:
            train_step2.main(command)


def test_confidence_weighs_samples(recipe, small_digits, tmp_path):
    _, runs = recipe
    (weighted,) = log_lines(trained(small_digits, tmp_path, 2, *STEP2, "rdl.confidence=true", "optim.epochs=1", "--from", str(runs[1])))
    assert weighted["loss/rcll"] > 0 and weighted["loss/rcll"] != pytest.approx(log_lines(runs[2])[0]["loss/rcll"], rel=1e-6)
    posteriors_path(runs[1] / "pseudo_labels", "digits").rename(tmp_path / "elsewhere.npz")
    with pytest.raises(UserError, match="rdl.confidence needs the posteriors"):
        train_step2.main([*settings(small_digits, tmp_path / "x", 2, *STEP2, "rdl.confidence=true"), "--from", str(runs[1])])
    (tmp_path / "elsewhere.npz").rename(posteriors_path(runs[1] / "pseudo_labels", "digits"))


def test_inherited_encoders_must_be_there_and_fit(recipe, small_digits, tmp_path):
    _, runs = recipe
    copy = tmp_path / "labels"
    shutil.copytree(runs[0] / "pseudo_labels", copy)
    with pytest.raises(UserError, match="rdl.start: inherited needs the checkpoint of a finished run"):
        train_step2.main(settings(small_digits, tmp_path, 2, *STEP2, f"rdl.pseudo_labels={copy}"))
    with pytest.raises(UserError, match="encoders of one size in both runs"):
        train_step2.main([*settings(small_digits, tmp_path, 2, *STEP2, "model.embedding_dim=8"), "--from", str(runs[0])])


@pytest.fixture(scope="module")
def given(recipe, tmp_path_factory):
    """K chosen anew on the encoders of step 1."""
    out = tmp_path_factory.mktemp("given")
    train_step1.main(["--from", str(recipe[1][0]), "--set", f"run.output={out / 'runs'}", "pla.num_clusters=4"])
    return out


def test_ids_of_each_modality_by_itself(recipe, tmp_path):
    train_step1.main(["--from", str(recipe[1][0]), "--set", f"run.output={tmp_path / 'runs'}", "pla.fuse=none"])
    run = only_run(tmp_path, 1)
    with np.load(posteriors_path(run / "pseudo_labels", "digits")) as beliefs:
        for name in ("GrayImg", "PointCloud"):
            assert ids_of(run, name) == beliefs[name].argmax(1).tolist()
    assert ids_of(run) != ids_of(run, "PointCloud")
    assert set(origin_of(run)["reliability"]) == {"GrayImg", "PointCloud"}  # what the guard of a round compares


def test_k_is_chosen_anew_without_training(recipe, given, small_digits, tmp_path, capsys):
    source, run = recipe[1][0], only_run(given, 1)
    before, after = (load_checkpoint(folder / "last.pt")["learner"] for folder in (source, run))
    for name, values in before["encoders"].items():
        assert torch.equal(values, after["encoders"][name])
    assert after["num_clusters"] == 4 != before["num_clusters"]
    assert 1 < len(set(ids_of(run))) <= 4 and ids_of(run) == ids_of(run, "PointCloud")
    origin = origin_of(run)
    assert (origin["run_id"], origin["clusters"]["encoders"], origin["epoch"]) == (run.name, source.name, 0)
    assert origin["reliability"]["PointCloud"] == 0 < origin["reliability"]["GrayImg"]  # the clouds are all in one cluster
    (row,) = log_lines(run)
    assert row["epoch"] == 0 and not any(key.startswith("loss/") for key in row) and row["map/avg"] > 0
    evaluate.main(["--run", str(run), "--device", "cpu"])
    assert "from the encoders of the run before" in capsys.readouterr().out
    second = trained(small_digits, tmp_path, 2, *STEP2, "optim.epochs=1", "--from", str(run))
    assert f"initial weights of every encoder: {run / 'last.pt'}" in (second / "log.txt").read_text()
    assert load_checkpoint(second / "last.pt")["learner"]["num_clusters"] == 4


@pytest.mark.parametrize("dies", ["cluster", "write_annotation"])
def test_choosing_k_is_resumed_bit_for_bit_and_without_labels(recipe, given, small_digits, tmp_path, monkeypatch, dies):
    write_lists(small_digits, "train", [None] * TRAIN)
    owner = train_step1.PLALearner if dies == "cluster" else train_step1
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(owner, dies, kill)
        train_step1.main(["--from", str(recipe[1][0]), "--set", f"run.output={tmp_path / 'runs'}", "pla.num_clusters=4"])
    torch.manual_seed(123)
    train_step1.main(["--resume", str(only_run(tmp_path, 1))])
    assert_same_result(given, tmp_path, 1)
    assert log_lines(only_run(tmp_path, 1)) == log_lines(only_run(given, 1))


def test_training_goes_on_from_finished_encoders(recipe, tmp_path):
    train_step1.main(["--from", str(recipe[1][0]), "--set", f"run.output={tmp_path / 'runs'}", "optim.epochs=1"])
    (row,) = log_lines(only_run(tmp_path, 1))
    assert row["epoch"] == 1 and row["loss/ssm"] < 0


def test_k_is_chosen_anew_of_finished_runs_of_step_1_alone(recipe, small_digits, tmp_path):
    output = f"run.output={tmp_path / 'runs'}"
    with pytest.raises(UserError, match="expected a run of the same stage"):
        train_step1.main(["--from", str(recipe[1][1]), "--set", output])
    with pytest.raises(UserError, match="encoders of one size in both runs"):
        train_step1.main(["--from", str(recipe[1][0]), "--set", output, "model.embedding_dim=8"])
    half = tmp_path / "half"
    half.mkdir()
    for name in ("config.yaml", "last.pt"):
        (half / name).write_bytes((recipe[1][0] / name).read_bytes())
    (half / "metrics.jsonl").write_text((recipe[1][0] / "metrics.jsonl").read_text().splitlines(keepends=True)[0])
    with pytest.raises(UserError, match="has not finished; go on with it first, by --resume"):
        train_step1.main(["--from", str(half), "--set", output])


def test_the_checkpoint_knows_the_clusters(recipe):
    state = load_checkpoint(recipe[1][0] / "last.pt")["learner"]
    assert state["num_clusters"] == state["classifiers"]["GrayImg.weight"].shape[0] == state["clusters"]["record"]["num_clusters"]
    assert torch.equal(state["clusters"]["ids"], torch.tensor(ids_of(recipe[1][0])))
