"""utils.engine.run_log: unique folders, untorn metrics, resume guards."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

import evaluate
import reproduce
from utils.engine import run_log
from utils.engine.run_log import RunLog, check_same_config, plain_row
from utils.engine.session import run_command
from utils.errors import UserError
from utils.settings.config import load_config, to_dict
from utils.settings.options import Step1Config

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


def test_runs_of_the_same_second_get_their_own_folders_with_or_without_git(tmp_path, monkeypatch):
    assert len({new_run(tmp_path).folder for _ in range(5)}) == 5
    (tmp_path / "runs" / "digits" / "step2").symlink_to(tmp_path / "gone")
    with pytest.raises(FileExistsError):
        RunLog.create(tmp_path / "runs", "digits", "step2", CONFIG, seed=3)
    monkeypatch.setenv("PATH", "")
    environment = run_log.environment(0)
    assert environment["git_sha"] is None and environment["git_dirty"] is None


def test_new_records_and_documents_leave_the_code_clean(tmp_path, monkeypatch):
    monkeypatch.setattr(run_log, "REPOSITORY", tmp_path)
    git = lambda *words: subprocess.run(["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a", *words], check=True)
    for name in ("results/table.jsonl", "docs/results.md", "README.md", "train.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    git("init", "-q")
    git("add", "-A")
    git("commit", "-qm", "first")
    for name, dirty in (("results/table.jsonl", False), ("results/new.jsonl", False), ("docs/results.md", False), ("README.md", False),
                        ("train.py", True)):
        (tmp_path / name).write_text("changed")
        assert run_log.environment(0)["git_dirty"] is dirty


def test_open_refuses_what_is_no_run(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        RunLog.open(tmp_path / "gone")
    with pytest.raises(UserError, match="has no config.yaml"):
        RunLog.open(tmp_path)
    (tmp_path / "config.yaml").write_text("data: {dataset: digits}\n")  # a stray folder, or a file cut short
    with pytest.raises(UserError, match="config.yaml is damaged"):
        RunLog.open(tmp_path).config()


def test_a_leading_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert RunLog.open(f"~/{os.path.relpath(new_run(tmp_path).folder, tmp_path)}").config() == CONFIG
    arguments = reproduce.parse_arguments(["render", "--runs=~/a", "--results=~/b", "--add=~/c"])
    assert [arguments.runs, arguments.results, arguments.add] == [tmp_path / name for name in "abc"]
    for option in ("--run=~/gone", "--checkpoint=~/gone/last.pt"):
        with pytest.raises(UserError, match=f"{tmp_path}/gone does not exist"):
            evaluate.main(["--device", "cpu", option])


@pytest.mark.parametrize("action, status, shown", [
    ("print('line')", 141, b""), ("print('line' * 100_000)", 141, b""),  # within and beyond what is buffered
    ("pipe.send(1)", 1, b"BrokenPipeError"),  # another pipe: a bug keeps its traceback
])
def test_a_command_whose_reader_leaves_ends_quietly(action, status, shown):
    code = ("import multiprocessing, sys; from utils.engine.session import run_command; pipe, other = multiprocessing.Pipe(); other.close(); "
            f"sys.exit(run_command(lambda: {action}))")
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        if status == 141:
            process.stdout.close()
        errors = process.stderr.read()
    assert process.returncode == status and (shown in errors if shown else not errors)


def test_log_and_epochs_round_trip(tmp_path, capsys):
    assert run_command(lambda: torch.empty(10**15)) == 2
    assert "error: out of memory" in capsys.readouterr().err
    run = new_run(tmp_path)
    run.log("first")
    RunLog.open(run.folder).log("größer")
    assert capsys.readouterr().out == "first\ngrößer\n"
    lines = (run.folder / "log.txt").read_text(encoding="utf-8").splitlines()
    assert [line.split(" ", 2)[2] for line in lines] == ["first", "größer"]
    assert not run.has_record
    row = plain_row({"epoch": 1, "stage": "pla", "loss": torch.tensor(0.5), "map/RP": np.float64(0.25), "acc": None})
    run.write_epochs([row, {"epoch": 2}])
    assert run.read_epochs() == [{"epoch": 1, "stage": "pla", "loss": 0.5, "map/RP": 0.25, "acc": None}, {"epoch": 2}]
    assert len((run.folder / "metrics.jsonl").read_text().splitlines()) == 2 and run.has_record
    for value in (float("nan"), torch.tensor(float("inf"))):
        with pytest.raises(ValueError, match="metric 'loss' is (nan|inf)"):
            plain_row({"epoch": 2, "loss": value})


def test_a_torn_last_line_is_passed_over_and_damage_elsewhere_an_error(tmp_path):
    run = new_run(tmp_path)
    for torn in ('{"epoch": 3, "lo', '{"epoch": 3', "\x00\x00"):
        (run.folder / "metrics.jsonl").write_text('{"epoch": 1}\n{"epoch": 2}\n' + torn)
        assert [entry["epoch"] for entry in run.read_epochs()] == [1, 2]
    (run.folder / "metrics.jsonl").write_text('{"epoch": 1}\n{"epo\n{"epoch": 3}\n')
    with pytest.raises(UserError, match="metrics.jsonl, row 2: not a JSON object"):
        run.read_epochs()


def test_same_config():
    assert check_same_config(CONFIG, json.loads(json.dumps(CONFIG))) == []
    moved = {**CONFIG, "run": {"seed": 3, "output": "elsewhere", "threads": 1}}
    assert check_same_config(CONFIG, moved) == [
        "run.output: 'runs' in the run, 'elsewhere' now", "run.threads: '(absent)' in the run, 1 now"]
    new = {"optim": {"epochs": 5, "learning_rate": 1e-4}, "run": {"output": "runs"}, "data": {"lists": {"RGBImg": "x"}}}
    with pytest.raises(UserError) as caught:
        check_same_config(CONFIG, new)
    message = str(caught.value)
    assert "optim.epochs: 2 in the run, 5 now" in message and "run.seed: 3 in the run, '(absent)' now" in message
    assert "data.lists.RGBImg: '(absent)' in the run, 'x' now" in message and "learning_rate" not in message


def test_a_setting_that_did_not_exist_when_the_run_was_started_counts_as_its_default(tmp_path):
    now = to_dict(load_config(Step1Config, "configs/smoke/step1.yaml", ["pla.fuse=trusted"]))  # its default
    then = {key: value for key, value in now.items() if key != "mlm"}
    then["pla"] = {key: value for key, value in now["pla"].items() if key != "fuse"}
    saved = to_dict(RunLog.create(tmp_path, "digits", "step1", then, seed=0).settings(Step1Config))
    assert check_same_config(saved, now) == []
    with pytest.raises(UserError, match="mlm.self_term: False in the run, True now"):
        check_same_config(saved, {**saved, "mlm": {"self_term": True}})
