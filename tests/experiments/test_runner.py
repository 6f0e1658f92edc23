"""The scheduler, with small processes in place of trainings."""

import json
import multiprocessing
import os
import signal
import time
import types

import pytest
from smoke_tables import CLEAN

from experiments import jobs as jobs_module
from experiments import runner
from experiments.cells import Cell
from experiments.jobs import MARKER, STATE, Job, provenance
from experiments.runner import hold, run_jobs, states
from utils.errors import UserError


@pytest.fixture(autouse=True)
def small_processes(monkeypatch):
    """A cell runs the code among its arguments in its folder, and is complete if that left the file `out`."""
    def collect(cell, folder):
        if not (folder / "out").is_file():
            raise UserError("no out")
        return {"id": cell.id, "scores": {}}

    head = "import sys, os, pathlib, time, signal\nfolder = pathlib.Path(sys.argv[1])\n"
    monkeypatch.setattr(jobs_module, "command", lambda cell, folder, device: [
        "-S", "-c", head + cell.arguments[0] + "\n(folder / 'out').write_text('x')", str(folder)])
    monkeypatch.setattr(jobs_module, "collect", collect)
    monkeypatch.setattr(jobs_module, "code_state", lambda device: {**CLEAN, "device": device})
    monkeypatch.setattr(runner, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(runner, "GRACE_SECONDS", 2.0)


def process(folder, name, code="", needs=(), epochs=1):
    return Job(Cell(name, "step1", f"cell {name}", (code,), epochs=epochs, needs=tuple(job.cell for job in needs)), folder)


def training(folder, name, total=40, pause=0.05):
    """Every epoch is a line with the process that did it, and a checkpoint of later; it goes on from there."""
    return process(folder, name, epochs=total, code=f"""
run = folder / 'runs' / 'digits' / 'step1' / 'x'
run.mkdir(parents=True, exist_ok=True)
log = run / 'metrics.jsonl'
done = log.read_text().split() if log.exists() else []
while len(done) < {total}:
    time.sleep({pause})
    done.append(str(os.getpid()))
    (run / 'new').write_text('\\n'.join(done)); (run / 'new').replace(log)
    (run / 'last.pt').touch(); os.utime(run / 'last.pt', (time.time() + 1000,) * 2)
""")


def run(root, jobs, devices=("cpu",), **options):
    with hold(root) as lock:
        run_jobs(jobs, list(devices), lock, **options)
    return {job.cell.id: state["status"] for job, state in zip(jobs, states(jobs))}


def test_jobs_run_after_what_they_need_and_never_twice(tmp_path):
    code = "(folder.parent / 'order').open('a').write(folder.name)"
    a = process(tmp_path, "a", code)
    b = process(tmp_path, "b", code, [a])
    for _ in range(2):
        assert run(tmp_path, [a, b, process(tmp_path, "c", code, [b])], ["cpu", "cpu"]) == {"a": "done", "b": "done", "c": "done"}
    assert (tmp_path / "cells" / "order").read_text() == "abc"
    record = json.loads((b.folder / MARKER).read_text())
    assert record["attempts"] == 1 and record["seconds"] >= 0 and not record["dirty"] and record["command"].startswith("python -S -c")


def test_a_failed_job_stops_its_dependants_only_and_can_be_tried_again(tmp_path, capsys):
    a = process(tmp_path, "a", "if not (folder / 'fixed').exists(): sys.exit('it is broken')")
    b = process(tmp_path, "b", needs=[a])
    jobs = [a, b, process(tmp_path, "c", needs=[b]), process(tmp_path, "d"), process(tmp_path, "e", "sys.exit(0)")]
    assert run(tmp_path, jobs) == {"a": "failed", "b": "skipped", "c": "skipped", "d": "done", "e": "failed"}
    assert [state.get("reason") for state in states(jobs)] == [
        "exit status 1", "needs cell a", "needs cell b", None, "no out"]  # the last one ended well, but left nothing
    assert "it is broken" in capsys.readouterr().out
    with pytest.raises(UserError, match="--resume:\n  failed: cell a\n  failed: cell e"):
        run(tmp_path, jobs)
    (a.folder / "fixed").touch()
    jobs[4] = process(tmp_path, "e")
    assert set(run(tmp_path, jobs, resume=True).values()) == {"done"}
    assert json.loads((a.folder / MARKER).read_text())["attempts"] == 2 and "reason" not in states(jobs)[0]


@pytest.fixture
def jump(tmp_path, monkeypatch):
    """The clock jumps ahead by 1000 s once job a has begun, so that a budget ends then on any machine."""
    def now():
        return time.time() + 1000 * any((tmp_path / "cells" / "a").glob("**/metrics.jsonl"))
    monkeypatch.setattr(runner, "time", types.SimpleNamespace(time=now, sleep=time.sleep))


def test_the_budget_stops_at_a_checkpoint_and_the_rest_goes_on_later(tmp_path, jump, capsys):
    jobs = [training(tmp_path, "a"), training(tmp_path, "b", total=2)]
    assert run(tmp_path, jobs, budget=500) == {"a": "interrupted", "b": "waiting"}
    (log,) = jobs[0].folder.glob("**/metrics.jsonl")
    begun = log.read_text().split()
    assert 0 < len(begun) < 40
    with pytest.raises(UserError, match="interrupted: cell a"):
        run(tmp_path, jobs)
    jobs[0] = training(tmp_path, "a", total=len(begun) + 3)
    assert run(tmp_path, jobs, resume=True) == {"a": "done", "b": "done"}
    found = log.read_text().split()
    assert found[: len(begun)] == begun and len(found) == len(begun) + 3  # nothing is lost or repeated
    assert len(set(found)) == 2 and json.loads((jobs[0].folder / MARKER).read_text())["attempts"] == 2
    assert f"epochs: {len(found) + 2} of {len(found) + 2}," in capsys.readouterr().err


def test_the_budget_does_not_end_a_job_without_checkpoints(tmp_path, jump):
    jobs = [process(tmp_path, "a", "(folder / 'metrics.jsonl').touch(); time.sleep(0.5)"), process(tmp_path, "b")]
    assert run(tmp_path, jobs, budget=500) == run(tmp_path, jobs, budget=0) == {"a": "done", "b": "waiting"}
    assert run(tmp_path, jobs) == {"a": "done", "b": "done"}


def test_ctrl_c_ends_the_processes_even_stubborn_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "GRACE_SECONDS", 0.3)
    stubborn = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n(folder / 'pid').write_text(str(os.getpid()))\ntime.sleep(60)"
    jobs = [process(tmp_path, "a", stubborn), training(tmp_path, "b", pause=0.5), process(tmp_path, "c")]
    pid = jobs[0].folder / "pid"

    def sleep(seconds):
        if pid.is_file() and pid.read_text() and (jobs[1].folder / STATE).is_file():
            raise KeyboardInterrupt
        time.sleep(seconds)

    monkeypatch.setattr(runner, "time", types.SimpleNamespace(time=time.time, sleep=sleep))
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, jobs, ["cpu", "cpu"])
    assert [state["status"] for state in states(jobs)] == ["interrupted", "interrupted", "waiting"]
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


def test_a_process_that_outlives_a_killed_command_is_not_run_twice(tmp_path):
    jobs = [process(tmp_path, "a", "(folder / 'pid').write_text(str(os.getpid())); time.sleep(60)")]
    parent = multiprocessing.get_context("fork").Process(target=run, args=(tmp_path, jobs))
    parent.start()
    pid = jobs[0].folder / "pid"
    while not (pid.is_file() and pid.read_text()):
        assert parent.is_alive()
        time.sleep(0.05)
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
    assert run(tmp_path, [process(tmp_path, "a")], resume=True) == {"a": "done"}


def test_attempts_of_different_commits_and_dirty_ones_are_joined():
    first, second = {**CLEAN, "command": "x", "seconds": 2.0}, {**CLEAN, "command": "y", "commit": "b" * 40, "seconds": None}
    found = provenance([first, second])
    assert found["commit"] == f"{'a' * 40}, {'b' * 40}" and found["command"] == "x" and found["seconds"] == 2.0 and not found["dirty"]
    assert provenance([{**first, "dirty": True}, second])["dirty"] and provenance([{**first, "dirty": None}])["dirty"]
