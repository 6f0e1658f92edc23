"""The scheduler, with small processes in place of cells."""

import json
import multiprocessing
import os
import signal
import sys
import time
import types

import pytest
from smoke_tables import CLEAN

from experiments import runner
from experiments.runner import MARKER, Job, hold, run_jobs, states
from utils.errors import UserError


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(runner, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(runner, "GRACE_SECONDS", 2.0)


def process(folder, name, code="", needs=(), units=1, **more):
    """A job that runs `code` with its folder as argument and is complete if it left the file `out`."""
    path = folder / name

    def collect():
        if not (path / "out").is_file():
            raise UserError("no out")
        return {"id": name, "needs": list(needs), "scores": {}}

    text = f"import sys, os, pathlib, time, signal\nfolder = pathlib.Path(sys.argv[1])\n{code}\n(folder / 'out').write_text('x')"
    return Job(name, f"cell {name}", path, lambda device: [sys.executable, "-S", "-c", text, str(path)], collect, tuple(needs), units, **more)


def run(root, jobs, devices=("cpu",), **options):
    with hold(root) as lock:
        found = run_jobs(jobs, list(devices), lock, lambda device: {**CLEAN, "device": device}, **options)
    return {name: state["status"] for name, state in found.items()}


def marker(root, name):
    return json.loads((root / name / MARKER).read_text())


def test_jobs_run_after_what_they_need_and_never_twice(tmp_path):
    code = "(folder.parent / 'order').open('a').write(folder.name)"
    jobs = [process(tmp_path, "a", code), process(tmp_path, "b", code, ["a"]), process(tmp_path, "c", code, ["b"])]
    for _ in range(2):
        assert run(tmp_path, jobs, ["cpu", "cpu"]) == {"a": "done", "b": "done", "c": "done"}
    assert (tmp_path / "order").read_text() == "abc"
    record = marker(tmp_path, "b")
    assert record["attempts"] == 1 and record["seconds"] >= 0 and not record["dirty"] and record["command"].startswith("python -S -c")


def test_a_failed_job_stops_its_dependants_only_and_can_be_tried_again(tmp_path, capsys):
    bad = "if not (folder / 'fixed').exists(): sys.exit('it is broken')"
    jobs = [process(tmp_path, "a", bad), process(tmp_path, "b", needs=["a"]), process(tmp_path, "c", needs=["b"]),
            process(tmp_path, "d"), process(tmp_path, "e", "sys.exit(0)")]
    assert run(tmp_path, jobs) == {"a": "failed", "b": "skipped", "c": "skipped", "d": "done", "e": "failed"}
    assert [state.get("reason") for state in states(jobs).values()] == [
        "exit status 1", "needs cell a", "needs cell b", None, "no out"]  # the last one ended well, but left nothing
    assert "it is broken" in capsys.readouterr().out
    with pytest.raises(UserError, match="--resume:\n  failed: cell a\n  failed: cell e"):
        run(tmp_path, jobs)
    for name in "ae":
        (tmp_path / name / "fixed").touch()
    jobs[4] = process(tmp_path, "e")
    assert set(run(tmp_path, jobs, resume=True).values()) == {"done"}
    assert marker(tmp_path, "a")["attempts"] == 2 and "reason" not in states(jobs)["a"]


EPOCHS = """
done = (folder / 'epochs').read_text().split() if (folder / 'epochs').exists() else []
while len(done) < {total}:
    time.sleep({pause})
    done.append(str(os.getpid()))
    (folder / 'new').write_text(' '.join(done)); (folder / 'new').replace(folder / 'epochs')
"""


def training(folder, name, total=40, pause=0.05, **more):
    """A job whose checkpoint is the list of its epochs, each by the process that did it, and which goes on from there."""
    file = folder / name / "epochs"
    return process(folder, name, EPOCHS.format(total=total, pause=pause), units=total, **more,
                   progress=lambda: len(file.read_text().split()) if file.exists() else 0,
                   checkpoint=lambda: file.stat().st_mtime + 1000 if file.exists() else 0.0)


@pytest.fixture
def jump(tmp_path, monkeypatch):
    """The clock jumps ahead by 1000 s once job a has begun, so that a budget ends then on any machine."""
    def now():
        return time.time() + 1000 * any((tmp_path / "a" / name).exists() for name in ("epochs", "here"))
    monkeypatch.setattr(runner, "time", types.SimpleNamespace(time=now, monotonic=time.monotonic, sleep=time.sleep))


def test_the_budget_stops_at_a_checkpoint_and_the_rest_goes_on_later(tmp_path, jump, capsys):
    jobs = [training(tmp_path, "a"), training(tmp_path, "b", total=2)]
    assert run(tmp_path, jobs, budget=500) == {"a": "interrupted", "b": "waiting"}
    begun = (tmp_path / "a" / "epochs").read_text().split()
    assert 0 < len(begun) < 40
    with pytest.raises(UserError, match="interrupted: cell a"):
        run(tmp_path, jobs)
    jobs[0] = training(tmp_path, "a", total=len(begun) + 3)
    assert run(tmp_path, jobs, resume=True) == {"a": "done", "b": "done"}
    found = (tmp_path / "a" / "epochs").read_text().split()
    assert found[: len(begun)] == begun and len(found) == len(begun) + 3  # nothing is lost or repeated
    assert len(set(found)) == 2 and marker(tmp_path, "a")["attempts"] == 2
    assert f"epochs: {len(found) + 2} of {len(found) + 2}," in capsys.readouterr().err


def test_the_budget_does_not_end_a_job_without_checkpoints(tmp_path, jump):
    jobs = [process(tmp_path, "a", "(folder / 'here').touch(); time.sleep(0.5)"), process(tmp_path, "b")]
    assert run(tmp_path, jobs, budget=500) == {"a": "done", "b": "waiting"}
    assert run(tmp_path, jobs, budget=0) == {"a": "done", "b": "waiting"}
    assert run(tmp_path, jobs) == {"a": "done", "b": "done"}


def test_ctrl_c_ends_the_processes_even_stubborn_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "GRACE_SECONDS", 0.3)
    stubborn = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n(folder / 'pid').write_text(str(os.getpid()))\ntime.sleep(60)"
    jobs = [process(tmp_path, "a", stubborn), training(tmp_path, "b", pause=0.5), process(tmp_path, "c")]
    pid = tmp_path / "a" / "pid"

    def sleep(seconds):
        if pid.is_file() and pid.read_text() and (tmp_path / "b" / runner.STATE).is_file():
            raise KeyboardInterrupt
        time.sleep(seconds)

    monkeypatch.setattr(runner, "time", types.SimpleNamespace(time=time.time, monotonic=time.monotonic, sleep=sleep))
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, jobs, ["cpu", "cpu"])
    assert [state["status"] for state in states(jobs).values()] == ["interrupted", "interrupted", "waiting"]
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


def test_a_process_that_outlives_a_killed_command_is_not_run_twice(tmp_path):
    code = "(folder / 'pid').write_text(str(os.getpid())); time.sleep(60)"
    parent = multiprocessing.get_context("fork").Process(target=run, args=(tmp_path, [process(tmp_path, "a", code)]))
    parent.start()
    pid = tmp_path / "a" / "pid"
    while not (pid.is_file() and pid.read_text()):
        assert parent.is_alive()
        time.sleep(0.05)
    jobs = [process(tmp_path, "a")]
    try:
        for _ in range(2):  # while the command lives, and when it was killed and its process lives on
            with pytest.raises(UserError, match="another reproduce.py, or a run that one started, works in"):
                run(tmp_path, jobs)
            parent.kill()
            parent.join()
    finally:
        os.kill(int(pid.read_text()), signal.SIGKILL)
    message = "works in"
    while "works in" in message:  # the kernel drops the lock a moment later
        with pytest.raises(UserError) as error:
            run(tmp_path, jobs)
        message = str(error.value)
    assert "running: cell a" in message
    assert run(tmp_path, jobs, resume=True) == {"a": "done"}


def test_attempts_of_different_commits_and_dirty_ones_are_joined():
    first, second = {**CLEAN, "command": "x", "seconds": 2.0}, {**CLEAN, "command": "y", "commit": "b" * 40, "seconds": None}
    found = runner.provenance([first, second])
    assert found["commit"] == f"{'a' * 40}, {'b' * 40}" and found["command"] == "x" and found["seconds"] == 2.0 and not found["dirty"]
    assert runner.provenance([{**first, "dirty": True}, second])["dirty"] and runner.provenance([{**first, "dirty": None}])["dirty"]
