"""The scheduler, with small processes in place of trainings."""

import multiprocessing
import os
import signal
import subprocess
import time
import types
from concurrent.futures import wait

import pytest
from smoke_tables import CLEAN

from experiments import runner
from experiments.cells import Cell
from experiments.runner import code_state, finished, folder_of, hold, provenance, run_cells, states
from utils.engine import run_log
from utils.errors import UserError


@pytest.fixture(autouse=True)
def small_processes(monkeypatch):
    """A cell runs the code among its arguments in its folder, and is complete if that left the file `out`."""
    def collect(cell, folder):
        if not (folder / "out").is_file():
            raise UserError("no out")
        return {"id": cell.id, "scores": {}}

    head = "import sys, os, pathlib, time, signal\nfolder = pathlib.Path(sys.argv[1])\n"
    own = {"command": lambda cell, folder, device: ["-S", "-c", f"{head}{cell.arguments[0]}\n(folder / 'out').touch()", str(folder)],
           "collect": collect, "code_state": lambda device: {**CLEAN, "device": device}, "POLL_SECONDS": 0.02, "GRACE_SECONDS": 2.0}
    for name, value in own.items():
        monkeypatch.setattr(runner, name, value)


def process(name, code="", needs=(), epochs=1):
    return Cell(name, "step1", f"cell {name}", (code,), epochs=epochs, needs=tuple(needs))


def training(name, total=40, pause=0.05):
    """Every epoch is a line with the process that did it, and a checkpoint of later; it goes on from there."""
    return process(name, epochs=total, code=f"""
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


def run(root, cells, devices=("cpu",), **options):
    with hold(root) as lock:
        run_cells(cells, root, devices, lock, **options)
    return statuses(root, cells)


def statuses(root, cells):
    return {name: state["status"] for name, state in states(cells, root).items()}


def test_cells_run_after_what_they_need_and_never_twice(tmp_path):
    code = "(folder.parent / 'order').open('a').write(folder.name)"
    a = process("a", code)
    b = process("b", code, [a])
    for _ in range(2):
        assert run(tmp_path, [a, b, process("c", code, [b])], ["cpu", "cpu"]) == {"a": "done", "b": "done", "c": "done"}
    assert (tmp_path / "cells" / "order").read_text() == "abc"
    found = finished([b], tmp_path)["b"]
    assert found["attempts"] == 1 and found["seconds"] >= 0 and not found["dirty"] and found["command"].startswith("python -S -c")


def test_no_device_is_idle_while_a_cell_is_ready_and_none_has_two(tmp_path):
    meet = "(folder / 'here').touch()\nwhile not (folder.parent / '{}' / 'here').exists(): time.sleep(0.01)"
    a = process("a", meet.format("c"))
    cells = [a, process("b", needs=[a]), process("c", meet.format("a"))]
    assert set(run(tmp_path, cells, ["cpu", "cpu"]).values()) == {"done"}
    alone = "(folder.parent / 'one').mkdir(); time.sleep(0.1); (folder.parent / 'one').rmdir()"
    assert set(run(tmp_path, [process("d", alone), process("e", alone)]).values()) == {"done"}


def test_a_failed_cell_stops_its_dependants_only_and_can_be_tried_again(tmp_path, capsys):
    a = process("a", "if not (folder / 'fixed').exists(): sys.exit('it is broken')")
    b = process("b", needs=[a])
    cells = [a, b, process("c", needs=[b]), process("d"), process("e", "sys.exit(0)")]
    assert run(tmp_path, cells) == {"a": "failed", "b": "skipped", "c": "skipped", "d": "done", "e": "failed"}
    assert [state.get("reason") for state in states(cells, tmp_path).values()] == [
        "exit status 1", "needs cell a", "needs cell b", None, "no out"]  # the last one ended well, but left nothing
    assert "it is broken" in capsys.readouterr().out
    with pytest.raises(UserError, match="--resume:\n  failed: cell a\n  failed: cell e"):
        run(tmp_path, cells)
    (folder_of(a, tmp_path) / "fixed").touch()
    cells[4] = process("e")
    assert set(run(tmp_path, cells, resume=True).values()) == {"done"}
    assert finished([a], tmp_path)["a"]["attempts"] == 2 and "reason" not in states(cells, tmp_path)["a"]


def test_a_bug_of_ours_is_no_failed_cell(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "collect", lambda cell, folder: {}["a bug"])
    with pytest.raises(KeyError, match="a bug"):
        run(tmp_path, [process("a")])


@pytest.fixture
def jump(tmp_path, monkeypatch):
    """The clock jumps ahead by 1000 s once cell a has begun, so that a budget ends then on any machine."""
    now = lambda: time.time() + 1000 * any((tmp_path / "cells" / "a").glob("**/metrics.jsonl"))
    monkeypatch.setattr(runner, "time", types.SimpleNamespace(time=now, monotonic=time.monotonic))


def test_the_budget_stops_at_a_checkpoint_and_the_rest_goes_on_later(tmp_path, jump, capsys):
    cells = [training("a"), training("b", total=2)]
    assert run(tmp_path, cells, budget=500) == {"a": "interrupted", "b": "waiting"}
    (log,) = folder_of(cells[0], tmp_path).glob("**/metrics.jsonl")
    begun = log.read_text().split()
    assert 0 < len(begun) < 40
    with pytest.raises(UserError, match="interrupted: cell a"):
        run(tmp_path, cells)
    cells[0] = training("a", total=len(begun) + 3)
    assert run(tmp_path, cells, resume=True) == {"a": "done", "b": "done"}
    found = log.read_text().split()
    assert found[: len(begun)] == begun and len(found) == len(begun) + 3  # nothing is lost or repeated
    assert len(set(found)) == 2 and finished(cells, tmp_path)["a"]["attempts"] == 2
    assert f"epochs: {len(found) + 2} of {len(found) + 2}," in capsys.readouterr().err


def test_the_budget_does_not_end_a_cell_without_checkpoints(tmp_path, jump):
    cells = [process("a", "(folder / 'metrics.jsonl').touch(); time.sleep(0.5)"), process("b")]
    assert run(tmp_path, cells, budget=500) == run(tmp_path, cells, budget=0) == {"a": "done", "b": "waiting"}
    assert run(tmp_path, cells) == {"a": "done", "b": "done"}


def test_ctrl_c_ends_the_processes_and_their_children_even_stubborn_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "GRACE_SECONDS", 0.3)
    stubborn = "os.fork()\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n(folder / str(os.getpid())).touch()\ntime.sleep(60)"
    cells = [process("a", stubborn), training("b", pause=0.5), process("c")]
    pids = folder_of(cells[0], tmp_path)

    def interrupted(*arguments):
        if len(list(pids.glob("[0-9]*"))) == 2 and statuses(tmp_path, cells)["b"] == "running":
            raise KeyboardInterrupt
        return wait(*arguments)

    monkeypatch.setattr(runner, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, cells, ["cpu", "cpu"])
    assert statuses(tmp_path, cells) == {"a": "interrupted", "b": "interrupted", "c": "waiting"}
    monkeypatch.setattr(runner, "wait", wait)
    cells = [process(cell.id) for cell in cells]  # a process that was left behind would hold the lock
    assert set(run(tmp_path, cells, ["cpu", "cpu"], resume=True).values()) == {"done"}


def test_a_process_that_outlives_a_killed_command_is_not_run_twice(tmp_path):
    cells = [process("a", "(folder / 'pid').write_text(str(os.getpid())); time.sleep(60)")]
    parent = multiprocessing.get_context("fork").Process(target=run, args=(tmp_path, cells))
    parent.start()
    pid = folder_of(cells[0], tmp_path) / "pid"
    while not (pid.is_file() and pid.read_text()):
        assert parent.is_alive()
        time.sleep(0.05)
    try:
        for _ in range(2):  # while the command lives, and when it was killed and its process lives on
            with pytest.raises(UserError, match="another reproduce.py, or a run that one started, works in"):
                run(tmp_path, cells)
            parent.kill()
            parent.join()
    finally:
        os.kill(int(pid.read_text()), signal.SIGKILL)
    message = "works in"
    while "works in" in message:  # the kernel drops the lock a moment later
        with pytest.raises(UserError) as error:
            run(tmp_path, cells)
        message = str(error.value)
    assert "running: cell a" in message
    assert run(tmp_path, [process("a")], resume=True) == {"a": "done"}


def test_attempts_of_different_commits_and_dirty_ones_are_joined():
    first, second = {**CLEAN, "command": "x", "seconds": 2.0}, {**CLEAN, "command": "y", "commit": "b" * 40, "seconds": None}
    found = provenance([first, second])
    assert found["commit"] == f"{'a' * 40}, {'b' * 40}" and found["command"] == "x" and found["seconds"] == 2.0 and not found["dirty"]
    assert provenance([{**first, "dirty": True}, second])["dirty"] and provenance([{**first, "dirty": None}])["dirty"]


def test_files_that_cannot_change_a_cell_leave_the_tree_clean(tmp_path, monkeypatch):
    monkeypatch.setattr(run_log, "REPOSITORY", tmp_path)
    assert code_state("cpu")["dirty"] is None  # no repository: git cannot tell
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    for name, dirty in (("mine.yaml", False), ("README.md", False), ("models/note.md", False), ("results/a.jsonl", False), ("configs/a.yaml", True), ("mine.py", True)):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
        assert code_state("cpu")["dirty"] is dirty, name
        assert run_log.environment(0)["git_dirty"] is (dirty or name == "mine.yaml"), name  # a training may have read that one
        (tmp_path / name).unlink()
