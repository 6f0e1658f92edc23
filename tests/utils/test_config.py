"""utils.settings.config and utils.settings.options: what is accepted, and the words of every refusal; device selection too."""

import dataclasses
import os
from pathlib import Path

import pytest
import torch
import yaml

from utils.engine.device import select_device, set_threads
from utils.engine.session import stage_parser
from utils.errors import UserError
from utils.settings.config import config_hash, load_config, to_dict
from utils.settings.options import CONFIGS, Step1Config, Step2Config

PRETRAINED = ["model.pretrained.RGBImg=imagenet", "model.pretrained.PointCloud=none"]


def step1(*overrides, path=None):
    return load_config(Step1Config, path, [*PRETRAINED, *overrides])


def write(tmp_path, text):
    path = tmp_path / "step1.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_file_then_overrides_in_order_with_values_of_every_kind(tmp_path):
    path = write(tmp_path, "optim: {epochs: 7, batch_size: 10, learning_rate: 1e-3}\ndata:\n  augment:\n    image_scale: [0.5, 2]\n")
    config = step1(
        "optim.epochs=8", "optim.epochs=9", "data.augment.point_jitter=0", "data.modalities=[GrayImg,PointCloud]", "optim.weight_decay=1",
        "model.pretrained={GrayImg: none, PointCloud: pretrained/model.1024.t7}", "run.threads=null", r"data.instance_id=(\d+)$",
        "data.train_lists.GrayImg=a=b.txt", path=path,
    )
    assert (config.optim.epochs, config.optim.batch_size, config.optim.learning_rate) == (9, 10, 0.001)
    assert config.data.augment.image_scale == (0.5, 2.0) and type(config.data.augment.image_scale[1]) is float
    assert config.data.augment.point_jitter == 0.0 and config.optim.schedule == "cosine" and type(config.optim.weight_decay) is float
    assert config.model.pretrained == {"GrayImg": "none", "PointCloud": "pretrained/model.1024.t7"} and config.run.threads is None
    assert config.data.modalities == ("GrayImg", "PointCloud") and config.data.instance_id == r"(\d+)$"
    assert config.data.train_lists == {"GrayImg": "a=b.txt"}


def test_round_trip_and_hash(tmp_path):
    config = step1("optim.epochs=8", "data.test_lists={RGBImg: x.txt}")
    again = load_config(Step1Config, write(tmp_path, yaml.safe_dump(to_dict(config))))
    assert again == config and config_hash(again) == config_hash(config)
    assert config_hash(config) != config_hash(step1("optim.epochs=9", "data.test_lists={RGBImg: x.txt}"))


@pytest.mark.parametrize("override, message", [
    ("rdl.loss=rcl", "rdl.loss must be one of rcll, ce, mae, gce, aue, nce_agce, or module:Class, found 'rcl', did you mean 'rcll'"),
    ("rdl.loss=''", "or module:Class, found ''"), ("rdl.warmup_epochs=3", "this setting is now called rdl.unclipped_epochs"),
    ("optim.epoch=3", "--set optim.epoch=3: optim.epoch: unknown key, did you mean 'epochs'"),
    ("optm.epochs=3", "optm: unknown key, did you mean 'optim'"),
    ("optim.zzz=3", "optim.zzz: unknown key, valid here: epochs, batch_size"),
    ("optim.epochs=2.0", "optim.epochs: expected int, got '2.0'"),
    ("optim.learning_rate=.nan", "optim.learning_rate: expected float, got '.nan'"),
    ("optim.learning_rate=1e999", "optim.learning_rate: expected float, got '1e999'"),
    ("optim.epochs='3'", "optim.epochs: expected int, got '3'"), ("optim.epochs=" + "9" * 400, "optim.epochs: expected int"),
    ("run.amp=1", "run.amp: expected bool, got '1'"), ("data.root=[3]", "data.root: expected str, got ['3']"),
    ("run.output=~nobody-has-this-name/x", "there is no home folder '~nobody-has-this-name/x'"),
    ("run.output=$HOME/x", "run.output: '$HOME/x': variables are not replaced here"),
    ("model.pretrained.RGBImg=${HOME}/w.pth", "model.pretrained.RGBImg: '${HOME}/w.pth': variables"),
    ("optim.epochs.more=3", "optim.epochs: expected int, got {'more': '3'}"),
    ("data.modalities=RGBImg", "data.modalities: expected tuple[str, ...], got 'RGBImg'"),
    ("data.augment.image_scale=[1, 2, 3]", "image_scale: expected 2 values, got 3"),
    ("model.pretrained=none", "model.pretrained: expected dict[str, str], got 'none'"),
    ("optim.schedule=cosin", "expected one of constant, cosine, got 'cosin', did you mean 'cosine'"),
    ("optim.batch_size=1", "optim.batch_size: must be at least 2, got 1 (instances per"), ("optim.learning_rate=0", "must be above 0, got 0"),
    ("optim.epochs=0", "optim.epochs: 0 needs the encoders of a finished run"),
    ("rdl.alpha=0.3 optim.epochs=0", "optim.epochs: must be at least 1 in step 2, got 0"),
    ("pla.lambda_1=1.5", "pla.lambda_1: must be at most 1, got 1.5"), ("pla.momentum=1", "pla.momentum: must be below 1, got 1"),
    ("data.augment.image_scale=[2, 1]", "data.augment.image_scale must be [low, high]"),
    ("data.modalities=[RGBImage, PointCloud]", "unknown modality 'RGBImage', did you mean 'RGBImg'"),
    ("data.modalities=[RGBImg, RGBImg]", "at least two different modalities"),
    ("pla.estimator=hard", "pla.symmetric_joint needs pla.estimator: class, found hard"),
    ("data.modalities=[GrayImg, PointCloud]", "model.pretrained says nothing about GrayImg: give imagenet (images only), none"),
    ("model.pretrained.PointCloud=imagenet", "model.pretrained.PointCloud: imagenet is for images only"),
    ("model.pretrained.Mehs=none", "model.pretrained: unknown modality 'Mehs'"),
    ("model.pretrained.RGBImg=", "model.pretrained.RGBImg: expected str, got '', that is nothing"),
    ("data.train_lists={Pointcloud: x}", "data.train_lists: unknown modality 'Pointcloud', did you mean 'PointCloud'"),
    ("data.instance_id=((", "data.instance_id is not a regular expression"), (r"data.instance_id=\d+", "needs exactly one group, got 0"),
    ("data.views.RGBImg=0", "data.views: must be at least 1, got 0"),
    ("data.views.RGBImg=1.5", "data.views.RGBImg: expected int, got '1.5'"), ("run.threads=0", "run.threads: must be at least 1, got 0"),
    ("data.dataset=../up", "data.dataset names files and folders"),
    ("data.image_resize=200", "data.image_resize (200) must be at least data.image_size (224)"),
    ("data.num_points=10", "model.num_neighbors (20) must not exceed data.num_points (10)"),
    ("pla.warmup_epochs=3", "--set pla.warmup_epochs=3: pla.warmup_epochs: this setting is now called pla.mlm_only_epochs"),
    ("pla.mlm_only_epochs=21", "pla.mlm_only_epochs (21) must not exceed optim.epochs, 20"),
    ("run.seed", "--set expects section.key=value, got 'run.seed'"), ("run..seed=3", "--set expects section.key=value"),
    ("optim.epochs=[1", "--set optim.epochs=[1: the value is not valid YAML"),
])
def test_refused_override(override, message):
    with pytest.raises(UserError) as caught:
        if override.startswith("rdl"):
            load_config(Step2Config, None, [*PRETRAINED, *override.split()])
        step1("pla.symmetric_joint=true", override)
    assert message in str(caught.value)


@pytest.mark.parametrize("text, message", [
    ("optim:\n  epochs: [1\n", "step1.yaml is not valid YAML"), ("optim: {epochs: 1}\noptim: {epochs: 2}", "key 'optim' is given twice"),
    ("- 1\n- 2", "step1.yaml must hold sections (data:, model:, ...), found a list"),
    ("rdl: {alpha: 0.3}", "step1.yaml: rdl: unknown key, valid here: data, model, optim, mlm, eval, run, pla"),
    ("optim: 3", "step1.yaml: optim: expected a section"), ("1: 2", "step1.yaml: 1: unknown key"),
    ("data: {modalities: [RGBImg, Foo]}", "step1.yaml with --set"),
    ("pla: {warmup_epochs: 3}", "step1.yaml: pla.warmup_epochs: this setting is now called pla.mlm_only_epochs"),
    ("extends:", "step1.yaml: extends: expected a file or a list of files, got ''"),
    ("extends: {a: b}", "step1.yaml: extends: expected a file or a list of files, got {'a': 'b'}"),
    ("extends: gone.yaml", "gone.yaml, which "), ("extends: ~nobody-has-this-name/a.yaml", "no configuration file"),
    ("extends: step1.yaml", "step1.yaml extends itself by way of"),
    ("data: {extends: step1.yaml}", "step1.yaml: data.extends: unknown key"),
])
def test_refused_file(tmp_path, text, message):
    with pytest.raises(UserError) as caught:
        step1(path=write(tmp_path, text))
    assert message in str(caught.value)


def test_words_and_switches_are_what_their_settings_say(tmp_path):
    for text in ("off", "on", "no", "Yes", "2026-11-28", "1:30", "007", "1_000", "0x10", "1e3", ".inf", "3", "'null'", "a: b", "a #1"):
        assert step1(f"data.root={text}").data.root == text.strip("'")
    for text, expected in (("on", True), ("Yes", True), ("TRUE", True), ("off", False), ("no", False), ("False", False)):
        assert step1(f"run.amp={text}").run.amp is expected
    assert step1("run.compile=off").run.compile == "off" and step1("data.num_classes=~").data.num_classes is None
    assert step1("optim.epochs=010").optim.epochs == 10 and step1("data.dataset=no").data.dataset == "no"
    assert step1("data.modalities=[RGBImg, PointCloud]", "model.pretrained.Mesh=off").model.pretrained["Mesh"] == "off"
    path = write(tmp_path, "data: {dataset: 2026-11-28, root: no}\nrun: {compile: off, amp: on}\noptim: {fused: yes}\n")
    config = step1(path=path)
    assert (config.data.dataset, config.data.root, config.run.compile) == ("2026-11-28", "no", "off")
    assert config.run.amp is True and config.optim.fused is True
    again = load_config(Step1Config, write(tmp_path, yaml.safe_dump(to_dict(config))))
    assert again == config and type(again.data.root) is str


def test_home_in_every_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path, "run: {output: ~/runs}\nmodel: {pretrained: {Mesh: ~/mesh.pth, GrayImg: none}}\n")
    paths = ["data.root=~/d", "data.train_lists.RGBImg=~/a", "data.test_lists.RGBImg='~/b'", "run.pseudo_labels=~/p", "pla.start=~/s"]
    config = step1(*paths, path="~/step1.yaml")
    assert (config.run.output, config.model.pretrained["Mesh"]) == (f"{tmp_path}/runs", f"{tmp_path}/mesh.pth")
    assert (config.data.root, config.data.train_lists, config.data.test_lists) == (f"{tmp_path}/d", {"RGBImg": f"{tmp_path}/a"}, {"RGBImg": f"{tmp_path}/b"})
    assert (config.run.pseudo_labels, config.pla.start, config.model.pretrained["GrayImg"]) == (f"{tmp_path}/p", f"{tmp_path}/s", "none")
    assert load_config(Step2Config, None, [*PRETRAINED, "rdl.pseudo_labels=~/l"]).rdl.pseudo_labels == f"{tmp_path}/l"
    assert step1("data.root=./~/d").data.root == "./~/d"


def test_extends(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/base.yaml").write_text("extends: ../root.yaml\noptim: {epochs: 7, batch_size: 10}\nmodel: {pretrained: {Mesh: a}}\n")
    (tmp_path / "root.yaml").write_text("optim: {epochs: 6, weight_decay: 0.5, learning_rate: 0}\nrun: {seed: 3}\n")
    (tmp_path / "other.yaml").write_text("optim: {batch_size: 11}\nmodel: {pretrained: {GrayImg: b}}\n")
    path = write(tmp_path, "extends: [sub/base.yaml, other.yaml]\noptim: {learning_rate: 0.1}\nrun:\n")
    config = step1(path=path)
    assert (config.optim.epochs, config.optim.batch_size, config.optim.weight_decay, config.optim.learning_rate) == (7, 11, 0.5, 0.1)
    assert config.model.pretrained == {"RGBImg": "imagenet", "PointCloud": "none", "Mesh": "a", "GrayImg": "b"} and config.run.seed == 3
    for text, message in (
        ("optim: {epochs: 7}", "root.yaml: optim.learning_rate: must be above 0"),
        ("optim: {learning_rate: 1}\npla: {mlm_only_epochs: 30}", "step1.yaml extending {0}/sub/base.yaml, {0}/root.yaml with --set"),
        ("optim: {learning_rate: 1}\nrun: {sed: 1}", "step1.yaml: run.sed: unknown key"),
    ):
        with pytest.raises(UserError) as caught:
            step1(path=write(tmp_path, f"extends: sub/base.yaml\n{text}\n"))
        assert message.format(tmp_path) in str(caught.value)
    (tmp_path / "root.yaml").write_text("extends: sub/base.yaml\n")
    with pytest.raises(UserError, match="base.yaml extends itself by way of .*base.yaml and .*root.yaml"):
        step1(path=path)
    (tmp_path / "root.yaml").write_text("run: {seed: 1, seed: 2}\n")
    with pytest.raises(UserError, match="root.yaml is not valid YAML: key 'seed' is given twice"):
        step1(path=path)


def test_defaults_are_those_of_the_default_configuration():
    for cls, name in ((Step1Config, "step1"), (Step2Config, "step2")):
        shipped, defaults = load_config(cls, f"configs/mnist3d/{name}.yaml"), load_config(cls, None, PRETRAINED)
        given = {"data": {"num_classes": 10}, "model": {"pretrained": shipped.model.pretrained}}
        changed = {key: dataclasses.replace(getattr(defaults, key), **values) for key, values in given.items()}
        assert shipped == dataclasses.replace(defaults, **changed)


@pytest.mark.parametrize("dataset,alpha", [("mnist3d", 0.3), ("modelnet10", 0.25), ("modelnet40", 0.3), ("mi3dor", 0.35)])
def test_paper_configurations_hold_what_the_paper_states(dataset, alpha):
    first, second, small, small_second = (
        load_config(cls, f"configs/{dataset}_{kind}/{cls.__name__[:5].lower()}.yaml")
        for kind in ("paper", "paper_cpu") for cls in (Step1Config, Step2Config)
    )
    for config, epochs, dim in ((first, 20, 1024), (second, 50, 256)):
        optim = config.optim
        assert (optim.epochs, optim.batch_size, optim.learning_rate, config.model.embedding_dim) == (epochs, 50, 2e-4, dim)
        assert config.mlm.self_term and config.data.dataset == dataset
    assert (first.pla.lambda_1, first.pla.momentum, first.pla.renormalise, first.pla.mlm_only_epochs) == (0.25, 0.9, False, 0)
    assert (second.rdl.loss, second.rdl.lambda_2, second.rdl.alpha, second.rdl.unclipped_epochs) == ("rcll", 0.25, alpha, 0)
    ours = load_config(Step1Config, f"configs/{dataset}/step1.yaml")
    assert (ours.pla.tau_1, ours.data.num_points, ours.data.image_size) == (first.pla.tau_1, first.data.num_points, first.data.image_size)
    assert first.data.views == second.data.views == {} and first.data.augment.image_elastic == second.data.augment.point_warp == 0
    assert (first.pla.fuse, second.rdl.start, second.eval.representation, second.data.eval_subsets) == ("none", "fresh", "embedding", 1)
    sizes = {"data": {"image_size", "image_resize", "num_points"},
             "model": {"num_neighbors", "point_width", "image_stages", "mesh_width", "mesh_conv_width", "pretrained"}}
    for large, reduced in ((to_dict(first), to_dict(small)), (to_dict(second), to_dict(small_second))):
        changed = {section: {key for key in large[section] if large[section][key] != reduced[section][key]} for section in large}
        assert {section: keys for section, keys in changed.items() if keys} == sizes


@pytest.mark.parametrize("dataset", ["mnist3d", "mnist3d_cpu", "digits", "modelnet10", "modelnet40", "modelnet10_splat", "modelnet40_splat", "mi3dor"])
def test_every_configuration_of_ours_takes_the_recipe(dataset):
    first, second = (load_config(cls, f"configs/{dataset}/{cls.__name__[:5].lower()}.yaml") for cls in (Step1Config, Step2Config))
    unpaired = dataset == "mi3dor"
    assert first.data.views == second.data.views == {"RGBImg": 2, "GrayImg": 2} and first.data.augment == second.data.augment
    assert first.data.augment.image_elastic and first.data.augment.point_warp and first.data.eval_subsets > 1
    assert (first.pla.num_clusters, first.pla.fuse, first.pla.mlm_only_epochs) == ((40, "none", 5) if unpaired else ("auto", "trusted", "all"))
    assert (second.rdl.start, second.rdl.lambda_2, second.eval.representation) == ("inherited", 0.9, "posterior")
    assert first.model == second.model or dataset == "mnist3d_cpu"  # of one size, so that step 2 can inherit


def test_every_shipped_configuration_loads():
    files = sorted(Path("configs").glob("*/step[12].yaml"))
    assert len(files) >= 38
    for path in files:
        config = load_config(CONFIGS[path.stem], str(path))
        assert config.run.output == "runs"
        if "_splat_cpu" in str(path):
            assert config == load_config(type(config), str(path).replace("_cpu", ""))
    assert len([path for path in files if "_splat_cpu" in str(path)]) == 4


def test_missing_or_empty_file(tmp_path):
    with pytest.raises(UserError, match="no configuration file .*gone.yaml"):
        load_config(Step1Config, str(tmp_path / "gone.yaml"))
    with pytest.raises(UserError, match="defaults: model.pretrained says nothing about RGBImg, PointCloud"):
        load_config(Step2Config, None)  # random weights are never a default
    assert step1(path=write(tmp_path, "# nothing\noptim:\n")) == step1()


def test_arguments():
    parser = stage_parser("")
    arguments = parser.parse_args("--config f.yaml --set a.b=1 c.d=[x,y] --set e=2".split())
    assert parser.parse_args(["--resume=~/run"]).resume == os.path.expanduser("~/run")
    assert arguments.config == "f.yaml" and arguments.overrides == ["a.b=1", "c.d=[x,y]", "e=2"] and arguments.resume is None
    assert parser.parse_args([]).overrides == []


def test_device(monkeypatch):
    assert select_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert select_device("auto") == torch.device("cpu")
    for name in ("cuda", "cuda:0"):
        with pytest.raises(ValueError, match=f"run.device is '{name}', but torch .* sees 0 CUDA devices"):
            select_device(name)
    for name in ("gpu", "cuda:", "cuda:x", "cudax", ""):
        with pytest.raises(ValueError, match="must be auto, cpu, cuda or cuda:N"):
            select_device(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert select_device("auto") == select_device("cuda") == torch.device("cuda", 0)
    assert select_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(ValueError, match="sees 2 CUDA devices"):
        select_device("cuda:2")
    with pytest.raises(UserError, match="at least 1, got 0"):
        set_threads(0)
