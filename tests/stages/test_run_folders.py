"""Run folders that are moved, partial, damaged or read-only, training without test labels, and whose labels step 2 learns."""

import shutil

import pytest
import torch
from conftest import TEST, write_lists
from stage_runs import PSEUDO_LABELS, Killed, distinct, kill, labels_of, log_lines, only_run, settings, trained

import evaluate
import train_step1
import train_step2
import training
from datasets.label_runs import newest_labels
from utils.engine import checkpoint
from utils.engine.session import run_command
from utils.errors import UserError
from utils.files import read_json
from utils.settings.config import load_config
from utils.settings.options import Step2Config


@pytest.fixture
def copied(finished, small_digits, tmp_path):
    """A copy of both finished runs, to be damaged."""
    shutil.copytree(finished, tmp_path / "copy")
    return tmp_path / "copy"


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# Whose pseudo-labels


def test_step_2_names_the_run_it_learned_from(finished, copied):
    first, second = only_run(finished, 1), only_run(finished, 2)
    note = read_json(second / "pseudo_labels.json")
    assert note["run_id"] == first.name and note["num_clusters"] == 16 and note["seed"] == 0 and "git_sha" in note
    assert note["sha256"]["GrayImg"] == read_json(labels_of(finished) / f"{PSEUDO_LABELS[0]}.meta.json")["sha256"]
    assert read_json(second / "metrics.json")["pseudo_labels"] == note
    assert f"pseudo-labels of run {first.name}" in (second / "log.txt").read_text()
    (labels_of(copied) / PSEUDO_LABELS[0]).unlink()
    with pytest.raises(UserError, match="--resume"):
        train_step2.choose_pseudo_labels(step2(copied), str(only_run(copied, 1)))


def step2(out, *overrides):
    return load_config(Step2Config, "configs/smoke/step2.yaml", [f"run.output={out / 'runs'}", *overrides])


def test_the_newest_finished_run_is_found_and_another_one_can_be_named(copied, tmp_path):
    run = only_run(copied, 1)
    newer, unfinished = run.with_name("29990101T000000Z-seed1"), run.with_name("29990101T000001Z-seed0")
    shutil.copytree(run, newer)
    shutil.copytree(run, unfinished, ignore=shutil.ignore_patterns("pseudo_labels"))
    runs, data = run.parent, step2(copied).data
    assert newest_labels(runs, data) == newer / "pseudo_labels"  # though it was renamed
    chosen = train_step2.choose_pseudo_labels(step2(copied), str(run)).rdl.pseudo_labels
    assert chosen == str(run / "pseudo_labels")
    with pytest.raises(UserError, match="give one of them"):
        train_step2.choose_pseudo_labels(step2(copied, "rdl.pseudo_labels=somewhere"), str(run))
    with pytest.raises(UserError, match="no finished run of step 1.*no run is there.*train_step1.py"):
        newest_labels(tmp_path / "nowhere", data)
    with pytest.raises(UserError, match="--from beside --resume"):
        train_step2.main(["--from", str(run), "--resume", str(only_run(copied, 2))])


def test_a_given_folder_says_what_it_replaces(small_digits, tmp_path, capsys):
    quick = [f"run.pseudo_labels={tmp_path / 'labels'}", "optim.epochs=1", "pla.mlm_only_epochs=0", "optim.batch_size=16"]
    first = trained(small_digits, tmp_path / "a", 1, *quick)
    train_step1.main(["--resume", str(first)])
    assert "replacing" not in capsys.readouterr().out
    second = trained(small_digits, tmp_path / "b", 1, "run.seed=1", *quick)
    assert capsys.readouterr().out.count(f"replacing that of {first.name}") == 2
    with pytest.raises(UserError, match=f"but of run {second.name}"):
        train_step2.choose_pseudo_labels(step2(tmp_path / "a"), str(first))
    (tmp_path / "labels" / f"{PSEUDO_LABELS[0]}.meta.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        train_step2.choose_pseudo_labels(step2(tmp_path / "a"), str(first))


# Without test labels


@pytest.mark.parametrize("kind", ["no list", "no labels"])
def test_training_starts_without_test_labels(small_digits, tmp_path, kind, capsys):
    write_lists(small_digits, "test", [None] * TEST)
    if kind == "no list":
        (small_digits / "digits_GrayImgs_test_list.txt").unlink()
    quick = ["optim.batch_size=16", "optim.epochs=2"]
    first = trained(small_digits, tmp_path, 1, "run.figures=true", *quick)
    for run, module in ((first, train_step1), (trained(small_digits, tmp_path, 2, *quick), train_step2)):
        metrics = read_json(run / "metrics.json")
        assert metrics["epoch"] == 2 and not any(key.startswith("map/") for key in metrics) and "oracle" not in metrics
        assert (run / "log.txt").read_text().count("no evaluation: ") == 1
        module.main(["--resume", str(run)])
    assert [path.name for path in (first / "figures").iterdir()] == ["curves.png"]
    with pytest.raises(UserError, match="labels|test list"):
        evaluate.main(["--run", str(run), "--device", "cpu"])
    with pytest.raises(UserError, match="elsewhere.txt not found"):  # a list that is asked for by name must be there
        train_step1.main(settings(small_digits, tmp_path / "b", 1, "data.test_lists={GrayImg: elsewhere.txt}"))


# Moved, partial and damaged folders


def test_an_interrupted_run_goes_on_elsewhere(finished, copied, small_digits, tmp_path, monkeypatch):
    moved, out = tmp_path / "data", tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(train_step1.PLALearner, "agreement", kill)
        train_step1.main(distinct(small_digits, out, 1))
    shutil.copytree(small_digits, moved)
    run = only_run(out, 1).rename(tmp_path / "renamed")
    train_step1.main(["--resume", str(run), "--set", f"data.root={moved}", "run.threads=1", f"run.output={tmp_path}"])
    assert log_lines(run) == log_lines(only_run(finished, 1)) and f"{str(moved)!r} now" in (run / "log.txt").read_text()
    with pytest.raises(UserError, match="optim.learning_rate"):
        train_step1.main(["--resume", str(run), "--set", "optim.learning_rate=0.5"])


@pytest.mark.parametrize("record", ["metrics.jsonl", "metrics.json"])
def test_a_run_without_its_checkpoint_is_left_alone(copied, record):
    run = only_run(copied, 1)
    for name in {"last.pt", "metrics.jsonl", "metrics.json"} - {record}:
        (run / name).unlink()
    before = content(run)
    with pytest.raises(UserError, match="last.pt.*Nothing was changed"):
        train_step1.main(["--resume", str(run)])
    assert content(run) == before


@pytest.mark.parametrize("damage", [None, "{\n{}\n", '{"epoch": 1}\n'])
def test_a_lost_record_comes_back_from_the_checkpoint(copied, finished, damage):
    run = only_run(copied, 1)
    (run / "metrics.jsonl").unlink()
    (run / "env.json").unlink()
    if damage:
        (run / "metrics.jsonl").write_text(damage)
    train_step1.main(["--resume", str(run)])
    assert (run / "metrics.jsonl").read_bytes() == (only_run(finished, 1) / "metrics.jsonl").read_bytes()
    assert read_json(run / "metrics.json")["map/avg"] == log_lines(run)[-1]["map/avg"]


@pytest.mark.parametrize("name,damage,message", [
    ("last.pt", b"PK half", "last.pt .*damaged"), ("config.yaml", b"a: [", "config.yaml"), ("config.yaml", b"- 1\n", "config.yaml"),
    ("config.yaml", None, "no config.yaml"), ("last.pt", "foreign", "no checkpoint of step1|not a checkpoint of a training stage"),
])
@pytest.mark.parametrize("command", [
    lambda run: train_step1.main(["--resume", str(run)]), lambda run: evaluate.main(["--run", str(run), "--device", "cpu"]),
])
def test_damaged_folders_are_one_message(copied, name, damage, message, command):
    run = only_run(copied, 1)
    (run / name).unlink()
    if damage == "foreign":
        checkpoint.save_checkpoint(run / name, {"w": torch.ones(1)})
    elif damage:
        (run / name).write_bytes(damage)
    before = content(run)
    with pytest.raises(UserError, match=message):
        command(run)
    assert content(run) == before


def test_evaluation_of_moved_partial_and_unwritable_folders(copied, small_digits, tmp_path, capsys):
    data, run = tmp_path / "data", only_run(copied, 1)
    shutil.copytree(small_digits, data)
    for path in data.glob("*train_list.txt"):
        path.unlink()
    (run / "metrics.json").unlink()
    (run / "metrics.json").mkdir()  # stands for whatever cannot be written, for root too
    shutil.rmtree(run / "pseudo_labels")
    evaluate.main(["--run", str(run), "--device", "cpu", "--set", f"data.root={data}", "run.threads=1"])
    said = capsys.readouterr()
    assert "mAP@All" in said.out and "acc/" not in said.out
    assert "no comparison of the pseudo-labels" in said.err and "are not kept" in said.err
    (run / "metrics.json").rmdir()
    (run / "metrics.json").write_text("{")
    evaluate.main(["--run", str(run), "--device", "cpu", "--set", f"data.root={data}"])
    assert "metrics.json is damaged" in capsys.readouterr().err
    with pytest.raises(UserError, match="optim.epochs"):
        evaluate.main(["--run", str(run), "--device", "cpu", "--set", "optim.epochs=7"])


# Failures


@pytest.mark.parametrize("more", [["optim.batch_size=40"], ["optim.batch_size=40", "pla.mlm_only_epochs=0"], ["run.eval_every=0"]])
def test_a_divergence_in_the_last_step_names_the_learning_rate(small_digits, tmp_path, more):
    with pytest.raises(UserError, match="optim.learning_rate"):
        train_step1.main(settings(small_digits, tmp_path, 1, "optim.learning_rate=1e30", "optim.epochs=2", *more))


def test_infinite_running_statistics_are_found_before_the_checkpoint(small_digits, tmp_path, monkeypatch):
    optimise = train_step1.PLALearner.optimise

    def spoil(self, loss):
        optimise(self, loss)
        next(values for name, values in self.encoders.named_buffers() if name.endswith("running_var")).fill_(float("inf"))

    monkeypatch.setattr(train_step1.PLALearner, "optimise", spoil)
    with pytest.raises(UserError, match="step1 epoch 1: weights or running statistics.*optim.learning_rate"):
        train_step1.main(settings(small_digits, tmp_path, 1, "run.eval_every=0", "optim.batch_size=40"))
    assert not (only_run(tmp_path, 1) / "last.pt").exists()


def test_a_bug_keeps_its_traceback_and_logs_it_a_mendable_failure_its_message(copied, monkeypatch, capsys):
    run = only_run(copied, 1)

    def broken(*_):
        raise error

    for error, code in ((KeyError("ours"), None), (UserError("theirs"), 2), (OSError(28, "No space left on device", "a"), 2)):
        monkeypatch.setattr(train_step1, "export", broken)
        resume = lambda: train_step1.main(["--resume", str(run)])
        if code is None:
            with pytest.raises(KeyError):
                run_command(resume)
        else:
            assert run_command(resume) == code and len(capsys.readouterr().err.splitlines()) == 1
    log = (run / "log.txt").read_text()
    assert "KeyError: 'ours'" in log and "in broken" in log and log.count("Traceback") == 2 and "error: theirs\n" in log


def test_resuming_a_finished_run_changes_nothing_and_releases_the_checkpoint_after_loading(copied, monkeypatch):
    sessions, fit, last = [], training.fit, only_run(copied, 1) / "last.pt"
    monkeypatch.setattr(training, "fit", lambda session, *more: (
        sessions.append((session, session.checkpoint["epoch"])), fit(session, *more))[1])
    before = last.read_bytes()
    train_step1.main(["--resume", str(last.parent)])
    ((session, epoch),) = sessions
    assert epoch == 4 and session.checkpoint is None and last.read_bytes() == before
