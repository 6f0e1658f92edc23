"""utils.engine.run_log: unique folders, untorn metrics, resume guards."""

import json

import numpy as np
import pytest
import torch

from utils.engine import run_log
from utils.engine.run_log import RunLog, check_same_config
from utils.errors import UserError

CONFIG = {"optim": {"epochs": 2, "learning_rate": 1e-4}, "run": {"seed": 3, "output": "runs"}, "data": {"lists": {}}}


def new_run(tmp_path):
    return RunLog.create(tmp_path / "runs", "digits", "step1", CONFIG, seed=3)


def test_create_and_open(tmp_path):
    run = new_run(tmp_path)
    assert run.folder.parent == tmp_path / "runs" / "digits" / "step1" and run.run_id == run.folder.name
    assert "-seed3" in run.run_id
    again = RunLog.open(run.folder)
    assert again.run_id == run.run_id and again.config() == CONFIG and again.read_epochs() == []
    environment = json.loads((run.folder / "env.json").read_text())
    assert environment["seed"] == 3 and environment["torch"] == torch.__version__
    assert {"git_sha", "git_dirty", "python", "cuda", "gpu", "cpu", "threads", "command"} <= set(environment)


def test_runs_of_the_same_second_get_their_own_folders(tmp_path):
    assert len({new_run(tmp_path).folder for _ in range(5)}) == 5


def test_without_git(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    environment = run_log.environment(0)
    assert environment["git_sha"] is None and environment["git_dirty"] is None


def test_open_refuses_what_is_no_run(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        RunLog.open(tmp_path / "gone")
    with pytest.raises(UserError, match="has no config.yaml"):
        RunLog.open(tmp_path)


def test_log_prints_and_appends(tmp_path, capsys):
    run = new_run(tmp_path)
    run.log("first")
    RunLog.open(run.folder).log("größer")
    assert capsys.readouterr().out == "first\ngrößer\n"
    lines = (run.folder / "log.txt").read_text(encoding="utf-8").splitlines()
    assert [line.split(" ", 2)[2] for line in lines] == ["first", "größer"]


def test_epochs_round_trip(tmp_path):
    run = new_run(tmp_path)
    run.write_epoch({"epoch": 1, "stage": "pla", "loss": torch.tensor(0.5), "map/RP": np.float64(0.25), "acc": None})
    run.write_epoch({"epoch": 2, "loss": np.float32(2)})
    assert run.read_epochs() == [
        {"epoch": 1, "stage": "pla", "loss": 0.5, "map/RP": 0.25, "acc": None},
        {"epoch": 2, "loss": 2.0},
    ]
    assert len((run.folder / "metrics.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize(
    "values, message",
    [
        ({"loss": 1.0}, "integer key 'epoch', got None"),
        ({"epoch": 1.0}, "integer key 'epoch', got 1.0"),
        ({"epoch": 1}, "already ends with epoch 1, cannot append epoch 1"),
        ({"epoch": 2, "loss": float("nan")}, "metric 'loss' is nan"),
        ({"epoch": 2, "loss": torch.tensor(float("inf"))}, "metric 'loss' is inf"),
    ],
)
def test_refused_epochs_change_nothing(tmp_path, values, message):
    run = new_run(tmp_path)
    run.write_epoch({"epoch": 1})
    with pytest.raises(ValueError, match=message):
        run.write_epoch(values)
    assert run.read_epochs() == [{"epoch": 1}]


@pytest.mark.parametrize("torn", ['{"epoch": 3, "lo', '{"epoch": 3', "\x00\x00"])
def test_torn_last_line(tmp_path, torn):
    run = new_run(tmp_path)
    for epoch in (1, 2):
        run.write_epoch({"epoch": epoch})
    with open(run.folder / "metrics.jsonl", "a") as stream:
        stream.write(torn)
    assert [entry["epoch"] for entry in run.read_epochs()] == [1, 2]
    run.write_epoch({"epoch": 3})
    assert [json.loads(line)["epoch"] for line in (run.folder / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3]


def test_damage_elsewhere_is_an_error(tmp_path):
    run = new_run(tmp_path)
    (run.folder / "metrics.jsonl").write_text('{"epoch": 1}\n{"epo\n{"epoch": 3}\n')
    with pytest.raises(ValueError, match="metrics.jsonl, row 2: not a JSON object"):
        run.read_epochs()


def test_truncate_after(tmp_path):
    run = new_run(tmp_path)
    for epoch in (1, 2, 3):
        run.write_epoch({"epoch": epoch})
    run.truncate_after(5)
    assert len(run.read_epochs()) == 3
    run.truncate_after(1)
    assert run.read_epochs() == [{"epoch": 1}]
    run.truncate_after(0)
    assert run.read_epochs() == []
    run.write_epoch({"epoch": 1})


def test_same_config():
    check_same_config(CONFIG, json.loads(json.dumps(CONFIG)))
    check_same_config(CONFIG, {**CONFIG, "run": {"seed": 3, "output": "elsewhere", "figures": True}})
    new = {"optim": {"epochs": 5, "learning_rate": 1e-4}, "run": {"seed": 4, "output": "runs"}, "data": {"lists": {"RGBImg": "x"}}}
    with pytest.raises(ValueError) as caught:
        check_same_config(CONFIG, new)
    message = str(caught.value)
    assert "optim.epochs: 2 in the run, 5 now" in message and "run.seed: 3 in the run, 4 now" in message
    assert "data.lists.RGBImg: '(absent)' in the run, 'x' now" in message and "learning_rate" not in message
    check_same_config(CONFIG, new, ignore=("optim.epochs", "run", "data"))
    with pytest.raises(ValueError, match="run.seed"):
        check_same_config(CONFIG, {**CONFIG, "run": {"output": "runs"}})
