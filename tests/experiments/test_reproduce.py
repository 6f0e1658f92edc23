"""reproduce.py from end to end: recorded runs, measurements, one real table, and wrong calls."""

import json

import numpy as np
import pytest
import torch
import yaml
from smoke_tables import CLEAN

import reproduce
from benchmarks import loss_shapes, memory_bank
from experiments import runner
from experiments.records import read_records, record_run
from losses import build_robust_loss
from utils.errors import UserError
from utils.settings.config import load_config, to_dict
from utils.settings.options import Step1Config


@pytest.fixture
def finished(tmp_path):
    """A finished run folder of a clean tree."""
    folder = tmp_path / "runs" / "digits" / "step1" / "a-run"
    folder.mkdir(parents=True)
    command = ["train_step1.py", "--config", "configs/smoke/step1.yaml"]
    environment = {"git_sha": "c" * 40, "git_dirty": False, "gpu": None, "cpu": "a CPU", "threads": 1, "torch": "2", "command": command}
    config = to_dict(load_config(Step1Config, "configs/smoke/step1.yaml", ["optim.epochs=2", "pla.lambda_1=0.5"]))
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "env.json").write_text(json.dumps(environment))
    (folder / "metrics.jsonl").write_text(json.dumps({"epoch": 2, "seconds/train": 60.0, "agreement": 0.5, "map/avg": 0.4}) + "\n")
    (folder / "metrics.json").write_text(json.dumps({"map/GP": 0.4, "map/PG": 0.6, "map/avg": 0.5, "map/chance": 0.1, "row": "x"}))
    return folder, environment


def test_a_finished_run_is_recorded(tmp_path, finished):
    folder, environment = finished
    for _ in range(2):
        assert reproduce.main(["record", "mine", str(folder), "--results", str(tmp_path)]) == 0
    (record,) = read_records(tmp_path / "mine.jsonl")
    assert record["command"] == "python train_step1.py --config configs/smoke/step1.yaml" and record["commit"] == "c" * 40
    assert (record["row"], record["pair"], record["seed"], record["device"]) == ("step 1, PLA (class estimator), K 6 given", "GP", 0, "a CPU")
    text = (tmp_path / "mine.md").read_text()
    assert "| step 1, PLA (class estimator), K 6 given | 40.0 | 60.0 | 50.0 | 0 | 1.0 min | `ccccccc` |" in text
    (folder / "env.json").write_text(json.dumps({**environment, "command": [*environment["command"], "--set", "optim.epochs=2"]}))
    with pytest.raises(UserError, match="holds a run of another command in its place"):
        record_run(tmp_path / "mine.jsonl", folder)
    record_run(tmp_path / "mine.jsonl", folder, row="mine")
    assert [entry["row"] for entry in read_records(tmp_path / "mine.jsonl")] == ["step 1, PLA (class estimator), K 6 given", "mine"]
    (tmp_path / "mine.jsonl").write_text(json.dumps({**record, "id": "older", "setup": {**record["setup"], "hash": "of older settings"}}) + "\n")
    record_run(tmp_path / "mine.jsonl", folder)
    assert [entry["id"] for entry in read_records(tmp_path / "mine.jsonl")] == ["older", record["id"]]


def test_an_unfinished_or_dirty_run_is_not_recorded(tmp_path, finished):
    folder, environment = finished
    for dirty in (True, None):
        (folder / "env.json").write_text(json.dumps({**environment, "git_dirty": dirty}))
        with pytest.raises(UserError, match="made from uncommitted code"):
            record_run(tmp_path / "mine.jsonl", folder)
    (folder / "env.json").write_text(json.dumps(environment))
    (folder / "metrics.json").unlink()
    with pytest.raises(UserError, match="is not finished: 1 of 2 epochs, no metrics.json"):
        record_run(tmp_path / "mine.jsonl", folder)
    assert not (tmp_path / "mine.jsonl").exists()


def test_a_record_names_the_commit_that_scored_it_too(tmp_path, finished):
    folder, _ = finished
    metrics = json.loads((folder / "metrics.json").read_text())
    keep = lambda **scored: (folder / "metrics.json").write_text(json.dumps({**metrics, "scored": scored}))
    keep(git_sha="d" * 40, git_dirty=True)
    with pytest.raises(UserError, match="evaluation of .* was made from uncommitted code"):
        record_run(tmp_path / "mine.jsonl", folder)
    keep(git_sha="d" * 40, git_dirty=False)
    record_run(tmp_path / "mine.jsonl", folder)
    assert read_records(tmp_path / "mine.jsonl")[0]["commit"] == f"{'c' * 40}, {'d' * 40}"


def test_loss_shapes_against_the_formulas():
    p, classes, alpha = np.array([0.02, 0.05, 0.3, 0.6, 0.97]), 10, 0.35
    surprise, rest = -np.log(p), (classes - 1) * -np.log((1 - p) / (classes - 1))
    values, slopes = loss_shapes.evaluate_loss(build_robust_loss("gce", classes, alpha), torch.tensor(p), classes)
    assert np.allclose(values, (1 - p**0.7) / 0.7, rtol=1e-9) and np.allclose(slopes, -(p**-0.3), rtol=1e-9)
    found = loss_shapes.evaluate_loss(build_robust_loss("nce_agce", classes, alpha), torch.tensor(p), classes)
    assert np.allclose(found[0], surprise / (surprise + rest) + 4 * (7**1.5 - (6 + p) ** 1.5) / 1.5, rtol=1e-9)  # the other classes too
    curves = loss_shapes.curves(classes, alpha, 9)
    assert curves["p"] == pytest.approx(np.arange(1, 10) / 10)
    assert set(curves["curves"]) == {"RCLL, alpha = 0.35", "CE", "MAE", "GCE", "AUE", "NCE+AGCE"}


@pytest.fixture
def measured(monkeypatch):
    """Benchmarks run in this process, as one line of Python each, to save the start of another one."""
    def inside(cell, folder, device):
        module = {"memory_bank": memory_bank, "loss_shapes": loss_shapes}[cell.stage]
        module.main([*cell.arguments, "--device", "cpu", "--output", str(folder / "metrics.json")])
        return ["-S", "-c", "pass"]
    monkeypatch.setattr(runner, "command", inside)
    monkeypatch.setattr(runner, "code_state", lambda device: CLEAN)


def test_figure_3_and_table_9_from_end_to_end(tmp_path, measured, capsys):
    options = ["--dataset", "digits", "--scale", "small", "--device", "cpu", "--results", str(tmp_path / "results"), "--runs", str(tmp_path)]
    assert reproduce.main(["fig3", *options]) == 0
    assert (tmp_path / "results" / "fig3-digits-small.png").is_file()
    assert reproduce.main(["table9", *options]) == 0
    (record,) = read_records(tmp_path / "results" / "fig3-digits-small.jsonl")
    assert len(record["measured"]["p"]) == 99 and len(record["measured"]["curves"]) == 6
    assert f"a CPU, `{'a' * 7}`" in (tmp_path / "results" / "fig3-digits-small.md").read_text()
    text = (tmp_path / "results" / "table9-digits-small.md").read_text()
    assert f"| 1437 x 128 | {1437 * 128 * 4:,} | 0.702 | 19.531 |" in text and "1.3e-01" in text
    assert reproduce.main(["table9", *options, "--list"]) == 0
    listed = capsys.readouterr().out
    assert "1 cells: 1 done" in listed and "epochs" not in listed  # it trains none


def test_a_table_from_end_to_end(tmp_path, small_digits, monkeypatch):
    """One real table on real data: budget 0, a run, the same command again, and rendering."""
    added = tmp_path / "mine.yaml"
    own = [f"data.root={small_digits}", "optim.epochs=2"]
    added.write_text(yaml.safe_dump({
        "datasets": {"tiny": {"paper": "3D MNIST", "small": {"config": "configs/smoke", "step1": own, "step2": own}}}}))
    monkeypatch.setattr(runner, "code_state", lambda device: CLEAN)
    command = ["table2-romo", "--dataset", "tiny", "--scale", "small", "--seeds", "1", "--device", "cpu", "--add", str(added),
               "--results", str(tmp_path / "results"), "--runs", str(tmp_path)]
    assert reproduce.main([*command, "--budget", "0"]) == 3
    results = tmp_path / "results" / "table2-romo-tiny-small.jsonl"
    assert "| after RDL | 84.3 | not run |" in results.with_suffix(".md").read_text() and not results.exists()
    assert reproduce.main(command) == 0
    first, _, second = read_records(results)  # step 1 as what step 2 rests on and as a row, and step 2
    assert first["row"] is None and second["needs"] == [first["id"]] and second["row"] == "after RDL"
    assert second["curve"]["epoch"] == [1, 2] and 0 < second["scores"]["map/GP"] < 1 and second["commit"] == "a" * 40
    assert second["command"].startswith("python train_step2.py --config configs/smoke/step2.yaml --set")
    text = results.with_suffix(".md").read_text()
    assert f"{100 * second['scores']['map/GP']:.1f}" in text and "not run" not in text and str(tmp_path) not in text
    assert "`python reproduce.py table2-romo --dataset tiny --scale small --seeds 1 --add mine.yaml`" in text
    began = [path.stat().st_mtime_ns for path in (tmp_path / "tiny-small" / "cells").glob("*/output.log")]
    assert reproduce.main(command) == 0
    assert [path.stat().st_mtime_ns for path in (tmp_path / "tiny-small" / "cells").glob("*/output.log")] == began


@pytest.mark.parametrize("arguments,message", [
    (["table5", "--dataset", "digits"], "unknown table 'table5', did you mean"),
    (["table4", "--dataset", "digit"], "unknown data set 'digit', did you mean 'digits'"),
    (["table4", "--dataset", "digits", "--tasks", "RG"], "one letter of R, G"),
    (["table2", "--dataset", "smoke", "--list"], "smoke names no frozen features: use --mode e2e, or --add a head:"),
    (["table4", "--dataset", "digits", "--add", "no.yaml"], "no file no.yaml"),
    (["table4"], "--dataset is needed"), (["table4", "--dataset", "digits", "--seeds", "0"], "at least 1"),
    (["table4", "--dataset", "digits", "--budget", "-1"], "at least 0"), (["record", "mine"], "at least one run folder"),
    (["table4", "run"], "unexpected: run"),
])
def test_wrong_calls(arguments, message, capsys):
    with pytest.raises((UserError, SystemExit)) as error:
        reproduce.main(arguments)
    assert message in str(error.value) + capsys.readouterr().err and getattr(error.value, "code", 2) == 2


@pytest.mark.parametrize("line,scales,scale", [
    (["--mode", "e2e", "--scale", "small"], (), "small"), (["--mode", "e2e"], (), "full"), (["--mode", "head"], (), "head"),
    (["--mode", "e2e"], ("e2e",), "e2e"), (["--mode", "e2e", "--scale", "small"], ("e2e",), None), (["--scale", "full"], (), None),
])
def test_the_scale_of_a_comparison(line, scales, scale):
    """A record's command names it; where the mode has one size, another is refused."""
    arguments = reproduce.parse_arguments(["table2", "--dataset", "digits", *line])
    if scale is None:
        with pytest.raises(UserError, match="leave --scale out"):
            reproduce.scale_of(arguments, "head", scales)
        return
    assert reproduce.scale_of(arguments, "head", scales) == scale
    if arguments.mode == "head":
        with pytest.raises(UserError, match="table2 is of encoders that are trained: leave --mode out"):
            reproduce.scale_of(arguments, "e2e", scales)
    words = reproduce.command_of(arguments, scale).split()
    assert ("--scale" in words) == (scale in ("small", "full")) and (scale not in ("small", "full") or scale in words)
