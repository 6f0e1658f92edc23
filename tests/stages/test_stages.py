"""Both stages through their command lines: files, determinism, resume after a kill, clear errors."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import TRAIN, write_lists
from stage_runs import PSEUDO_LABELS, REPOSITORY, assert_same_result, distinct, kill_at, labels_of, log_lines, only_run, settings, weights

import evaluate
import train_step1
import train_step2
from utils.engine import epoch as epochs
from utils.engine.checkpoint import load_checkpoint
from utils.errors import UserError


def test_files_of_both_stages(finished, small_digits):
    for name in PSEUDO_LABELS:
        rows = (labels_of(finished) / name).read_text().splitlines()
        source = (small_digits / name.replace("_pseudo_labelling", "")).read_text().splitlines()
        assert [row.split()[0] for row in rows] == [row.split()[0] for row in source]
        assert all(0 <= int(row.split()[1]) < 16 and len(row.split()) == 2 for row in rows)
        assert len({row.split()[1] for row in rows}) >= 4  # equal files prove something
        assert json.loads((labels_of(finished) / f"{name}.meta.json").read_text())["num_clusters"] == 16
    for step in (1, 2):
        run = only_run(finished, step)
        assert {"config.yaml", "env.json", "log.txt", "metrics.jsonl", "last.pt", "metrics.json"} <= set(os.listdir(run))
        assert [line["epoch"] for line in log_lines(run)] == [1, 2, 3, 4][: 5 - step]
        assert "MiB of samples on cpu; k-means of scikit-learn; TF32 in products: " in (run / "log.txt").read_text()
        assert load_checkpoint(run / "last.pt")["rows"] == [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    first, second, *_ = log_lines(only_run(finished, 1))
    assert "loss/ssm" not in first and {"loss/ssm", "loss/mlm", "agreement"} <= second.keys()


def test_evaluate_prints_the_tasks_and_repeats_the_logged_scores(finished, small_digits, capsys):
    runs = [str(only_run(finished, step)) for step in (1, 2)]
    before = [json.loads((Path(run) / "metrics.json").read_text()) for run in runs]
    evaluate.main(["--run", *runs, "--device", "cpu"])
    table = capsys.readouterr().out
    assert all(word in table for word in ("GP", "PG", "avg", "chance", "step 1, PLA", "step 2, RDL"))
    for run, trained in zip(runs, before):
        scores = json.loads((Path(run) / "metrics.json").read_text())
        assert scores["peak_mib"] > 0 and all(scores[key] == trained[key] for key in ("peak_mib", "row", "oracle"))
        assert scores["map/avg"] == pytest.approx((scores["map/GP"] + scores["map/PG"]) / 2)
        assert scores["map/GP"] == pytest.approx(log_lines(Path(run))[-1]["map/GP"], abs=1e-12)
        assert {"anchored", "anchored, diffusion"} <= scores["variants"].keys() and len(scores["scored"]["git_sha"]) == 40
    write_lists(small_digits, "train", [None] * TRAIN)  # no label of theirs is needed
    evaluate.main(["--checkpoint", f"{runs[1]}/last.pt", "--device", "cpu"])
    assert "step 2, RDL" in capsys.readouterr().out and json.loads((Path(runs[1]) / "metrics.json").read_text())["variants"] == scores["variants"]
    shown = [f"data.train_lists.{name}={small_digits / f'digits_{folder}_test_list.txt'}" for name, folder in
             (("GrayImg", "GrayImgs"), ("PointCloud", "PointCloud"))]
    evaluate.main(["--run", runs[1], "--device", "cpu", "--set", *shown])
    assert "is in the training list" in capsys.readouterr().err and "anchored" not in json.loads((Path(runs[1]) / "metrics.json").read_text())["variants"]
    for path in small_digits.glob("*train_list.txt"):
        path.unlink()
    evaluate.main(["--run", runs[1], "--device", "cpu"])
    printed = capsys.readouterr()
    assert "no ranking by way of the training set" in printed.err and "anchored, diffusion" not in printed.out


@pytest.mark.parametrize("step, saved", [(1, False), (1, True), (2, False), (2, True)])
def test_stopped_around_a_checkpoint_and_resumed_equals_uninterrupted(finished, small_digits, tmp_path, monkeypatch, step, saved):
    module = train_step1 if step == 1 else train_step2
    more = [] if step == 1 else [f"rdl.pseudo_labels={labels_of(finished)}"]
    kill_at(monkeypatch, module.main, distinct(small_digits, tmp_path, step, *more), 2, saved)
    torch.manual_seed(123)  # a fresh process would not share this generator's state either
    module.main(["--resume", str(only_run(tmp_path, step))])
    assert_same_result(finished, tmp_path, step)
    assert log_lines(only_run(tmp_path, step)) == log_lines(only_run(finished, step))


@pytest.mark.parametrize("seconds_after_start", [0.0, 1.2])
def test_sigkill_and_resume_equals_uninterrupted(finished, small_digits, tmp_path, seconds_after_start):
    command = [sys.executable, "train_step1.py", *distinct(small_digits, tmp_path, 1)]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("runs/digits/step1/*/config.yaml")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(seconds_after_start)
    process.send_signal(signal.SIGKILL)
    process.wait()
    train_step1.main(["--resume", str(only_run(tmp_path, 1))])
    assert_same_result(finished, tmp_path, 1)


def test_errors_of_a_stage_name_the_mend(small_digits, tmp_path, monkeypatch):
    (tmp_path / "config.yaml").write_text("{}\n")
    nan = lambda index: {"loss/mlm": torch.tensor(float("nan"))}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for call, words in (
        (lambda: train_step2.main(settings(small_digits, tmp_path, 2)), "train_step1.py"),
        (lambda: train_step1.main(settings(small_digits, tmp_path, 1, "pla.num_clusters=50")), "50.*40"),
        (lambda: train_step1.main(settings(small_digits, tmp_path, 1, "pla.num_cluster=5")), "num_clusters"),
        (lambda: evaluate.main(["--run", str(tmp_path)]), "no checkpoint"),
        (lambda: train_step1.main([]), "configs/mnist3d_cpu/step1.yaml"),  # a bare command without a GPU
        (lambda: epochs.run_batches([torch.arange(2)] * 3, nan, title="step1 epoch 4", log_interval=2), "step1 epoch 4, step 2"),
    ):
        with pytest.raises(UserError, match=words):
            call()
    assert all((REPOSITORY / f"configs/mnist3d_cpu/step{step}.yaml").is_file() for step in (1, 2))


@pytest.mark.parametrize("command", [
    "train_step1.py --config no.yaml", "-m datasets.prepare_mnist3d --mnist nowhere --root no", "-m datasets.prepare_digits --points -1 --root no",
])
def test_command_lines_print_one_line_instead_of_a_traceback(command):
    result = subprocess.run([sys.executable, *command.split()], cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2 and result.stderr.startswith("error:") and "Traceback" not in result.stderr


def test_another_seed_is_another_run_and_step_2_refuses_pseudo_label_files_of_two(finished, small_digits, tmp_path):
    train_step1.main(distinct(small_digits, tmp_path, 1, "run.seed=1"))
    one, two = (weights(only_run(out, 1))[".encoders.PointCloud.conv5.weight"] for out in (finished, tmp_path))
    assert not torch.equal(one, two)
    for path in labels_of(finished).glob("*GrayImgs*"):  # as if step 1 had been cut off before the second file
        shutil.copy(path, labels_of(tmp_path))
    with pytest.raises(ValueError, match="different runs.*train_step1.py"):
        train_step2.main(settings(small_digits, tmp_path, 2))


@pytest.mark.parametrize("step, changed", [(1, "GrayImg, PointCloud"), (2, "pseudo-labels of GrayImg")])
def test_resume_refuses_changed_inputs(finished, small_digits, tmp_path, step, changed):
    shutil.copytree(labels_of(finished), tmp_path / "labels")
    module = train_step1 if step == 1 else train_step2
    module.main(settings(small_digits, tmp_path, step, *([f"rdl.pseudo_labels={tmp_path / 'labels'}"] if step == 2 else [])))
    if step == 1:
        for path in small_digits.glob("*train_list.txt"):
            path.write_text("".join(reversed(path.read_text().splitlines(keepends=True))))
    else:
        write_other_pseudo_labels(tmp_path / "labels" / PSEUDO_LABELS[0])
    with pytest.raises(ValueError, match=f"{changed} changed"):
        module.main(["--resume", str(only_run(tmp_path, step))])


def write_other_pseudo_labels(path: Path) -> None:
    """Move every sample to the next of the 16 clusters and mend the meta file."""
    rows = [row.split() for row in path.read_text().splitlines()]
    path.write_text("".join(f"{name} {(int(label) + 1) % 16}\n" for name, label in rows))
    meta = path.with_name(path.name + ".meta.json")
    facts = json.loads(meta.read_text())
    meta.write_text(json.dumps({**facts, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}))
