"""reproduce.py: cells and their ids, the scheduler with small processes, statistics, rendering, and one table end to end."""

import dataclasses
import json
import math
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
import yaml

import reproduce
from benchmarks import loss_shapes, memory_bank
from experiments import documents, runner
from experiments import jobs as jobs_module
from experiments.cells import all_cells, expand
from experiments.protocol import HERE, Setup, find_setup, load_protocol, pair_of
from experiments.records import add_records, load_table, read_records, record_run
from experiments.runner import MARKER, Job, hold, run_jobs, states
from experiments.statistics import compare, estimate
from experiments.tables import render, table_lines
from losses import build_robust_loss
from models import MemoryBank
from utils.engine.run_log import REPOSITORY
from utils.errors import UserError
from utils.settings.config import load_config, to_dict
from utils.settings.options import Step1Config

PROTOCOL = load_protocol()
SMOKE = Setup("digits", "small", Path("configs/smoke"), ("GP",), step2=("rdl.unclipped_epochs=1",), paper="3D MNIST", samples=(40,))
CLEAN = {"commit": "a" * 40, "dirty": False, "device": "a CPU", "threads": 1, "torch": "2"}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(runner, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(runner, "GRACE_SECONDS", 2.0)


def rows_of(table, setup=SMOKE, seeds=(0,)):
    return expand(PROTOCOL["tables"][table], setup, seeds)


def ids(rows):
    return {cell.id for cell in all_cells(rows)}


# Cells


def test_every_table_expands_on_every_data_set():
    for dataset, entry in PROTOCOL["datasets"].items():
        for scale in set(entry) & {"full", "small"}:
            setup = find_setup(PROTOCOL, dataset, scale)
            assert (REPOSITORY / setup.config / "step2.yaml").is_file() and entry["paper"] == setup.paper
            one = dataclasses.replace(setup, pairs=setup.pairs[-1:])
            assert len(all_cells(rows_of("table8", one))) == 8
    printed = dataclasses.replace(SMOKE, as_printed=dataclasses.replace(SMOKE, step2=("rdl.lambda_2=0.25",)))
    assert {name: len(all_cells(rows_of(name, printed))) for name in PROTOCOL["tables"]} == {
        "headline": 3, "stages": 3, "clip": 3, "estimators": 3, "tasks": 6, "table2-romo": 2, "table4": 10, "table6": 15, "table8": 8,
        "table9": 1, "fig3": 1, "fig4": 26, "fig5": 7, "fidelity": 8,
    }
    with pytest.raises(UserError, match="needs as_printed of digits"):
        rows_of("headline")
    (cell,) = rows_of("tasks")[5].cells[0].values()
    assert "data.modalities=[RGBImg,GrayImg,PointCloud,Mesh]" in cell.arguments


def test_rows_and_tables_share_step_1_and_equal_cells():
    rows = {row.name: row.cells[0]["GP"] for row in rows_of("table4")}
    assert len({cell.needs for cell in rows.values()}) == 1 and len({cell.id for cell in rows.values()}) == 9
    (first,) = rows["CE"].needs
    assert rows_of("table2-romo")[0].cells[0]["GP"] == first
    shared = {name: ids(rows_of(name)) for name in ("table4", "table6", "table8", "fig4", "fig5")}
    for other in ("table6", "table8", "fig4", "fig5"):
        assert {first.id, rows["RCLL"].id} <= shared[other]  # 0.25 and 0.3 of the grids are the configuration's own values
    assert rows["CE"].id in shared["fig5"]
    order = [cell.id for cell in all_cells(rows_of("table4", seeds=(0, 1)))]
    assert len(order) == 20 and order.index(first.id) == 0


def test_an_id_depends_on_what_decides_the_result_and_on_nothing_else(tmp_path):
    def cell(overrides=(), seed=0, text=None, stage="step2"):
        folder = Path("configs/smoke") if text is None else tmp_path
        for name in ("step1", "step2") if text is not None else ():
            (folder / f"{name}.yaml").write_text(f"{text}extends: {REPOSITORY}/configs/smoke/{name}.yaml\n")
        setup = Setup("digits", "small", folder, ("GP",), **{stage: tuple(overrides)})
        return expand({"rows": {"row": {}}}, setup, [seed])[0].cells[seed]["GP"]

    plain = cell()
    assert cell().id == plain.id and cell(text="# a comment\n").id == plain.id
    assert cell(["rdl.loss=rcll"]).id == plain.id  # the default, said aloud
    assert cell(["run.device=cuda:0", "run.threads=2", "run.figures=true", "run.output=elsewhere"]).id == plain.id
    different = [cell(seed=1), cell(["rdl.loss=ce"]), cell(["run.amp=true"]), cell(["pla.lambda_1=0.5"], stage="step1")]
    assert len({plain.id, *(entry.id for entry in different)}) == 5
    assert different[3].needs[0].id != plain.needs[0].id  # other pseudo-labels, so another step 2
    assert different[0].needs[0].seed == 1


def test_placeholders_and_tasks():
    setup = find_setup(PROTOCOL, "modelnet10", "small", ["PR", "RP", "MG"])
    assert setup.pairs == ("RP", "GM") and pair_of("MR") == "RM"
    cells = {row.name: row.cells[0] for row in rows_of("table8", setup)}
    assert "pla.banks=[GrayImg]" in cells["bank of 2D alone, after PLA"]["GM"].arguments
    assert "pla.banks=[PointCloud]" in cells["bank of 3D alone"]["RP"].needs[0].arguments
    assert "optim.epochs=10" in cells["no bank"]["RP"].arguments and cells["no bank"]["RP"].epochs == 10
    for task in ("RG", "PM", "R", "XP"):
        with pytest.raises(ValueError, match="one letter of R, G"):
            pair_of(task)


def test_an_added_file_brings_data_sets_tables_and_rows(tmp_path):
    added = tmp_path / "mine.yaml"
    added.write_text(yaml.safe_dump({
        "datasets": {"shapes": {"small": {"config": "configs/smoke", "step1": ["data.dataset=shapes"], "step2": ["data.dataset=shapes"]}}},
        "tables": {"table4": {"rows": {"GCE, more of it": {"step2": ["rdl.loss=gce", "rdl.lambda_2=0.5"]}}},
                   "mine": {"title": "mine", "rows": {"one": {}}}},
    }))
    protocol = load_protocol(added)
    setup = find_setup(protocol, "shapes", "small")
    assert setup.pairs == ("GP",) and setup.paper is None  # the pair of the configuration
    names = [row.name for row in expand(protocol["tables"]["table4"], setup, [0])]
    assert names[0] == "RCLL" and names[-1] == "GCE, more of it" and len(protocol["tables"]["mine"]["rows"]) == 1
    added.write_text("tables: {table4: {rows: {GCE: {step3: []}}}}")
    with pytest.raises(ValueError, match=r"rows.GCE: unknown key 'step3', did you mean"):
        load_protocol(added)
    with pytest.raises(ValueError, match="unknown data set 'digit', did you mean 'digits'"):
        find_setup(protocol, "digit", "small")
    assert find_setup(protocol, "smoke", "full").config == Path("configs/smoke")  # a folder of configs/ is enough
    with pytest.raises(ValueError, match="compared with 'nothing'"):
        expand({"baseline": "nothing", "rows": {"one": {}}}, SMOKE, [0])


def test_commands(tmp_path):
    (row,) = [row for row in rows_of("table4") if row.name == "CE"]
    cell, folder = row.cells[0]["GP"], Path("runs/x/cells/abc")
    line = jobs_module.command(cell, folder, "cuda:1")
    assert line[:3] == ["train_step2.py", "--config", "configs/smoke/step2.yaml"] and {"rdl.loss=ce", "run.device=cuda:1"} <= set(line)
    assert f"rdl.pseudo_labels=runs/x/cells/{cell.needs[0].id}/pseudo_labels" in line
    assert not [part for part in line if part.startswith("run.threads")]
    assert "run.threads=1" in jobs_module.command(cell, folder, "cpu")
    run = tmp_path / "runs" / "digits" / "step2" / "x"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("")
    assert jobs_module.command(cell, tmp_path, "cpu") == ["train_step2.py", "--resume", str(run)]
    release = rows_of("fidelity")[1].cells[0]["GP"]
    line = jobs_module.command(release, folder, "cpu")
    assert line[:6] == ["-m", "baselines.release_protocol", "--config-dir", "configs/smoke", "--variant", "oracle_labels"]
    assert line[-8:] == ["--seed", "0", "--device", "cpu", "--threads", "1", "--output", "runs/x/cells/abc"]


# Runner


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


def test_workers_run_at_the_same_time(tmp_path):
    wait = "other = {'a': 'b', 'b': 'a'}[folder.name]\n(folder / 'here').touch()\n"
    wait += "while not (folder.parent / other / 'here').exists(): time.sleep(0.01)"
    assert set(run(tmp_path, [process(tmp_path, "a", wait), process(tmp_path, "b", wait)], ["cpu", "cpu"]).values()) == {"done"}


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
    monkeypatch.setattr(runner, "time", types.SimpleNamespace(time=now, monotonic=time.monotonic))


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

    def wait(*given, original=runner.wait):
        if pid.is_file() and pid.read_text() and (tmp_path / "b" / runner.STATE).is_file():
            raise KeyboardInterrupt
        return original(*given)

    monkeypatch.setattr(runner, "wait", wait)
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


# Statistics


@pytest.mark.parametrize("values", [[0.1, 0.2], [0.78, 0.79, 0.77], list(np.random.default_rng(0).random(9))])
def test_intervals_are_scipys(values):
    found = estimate(values)
    low, high = scipy.stats.t.interval(0.95, len(values) - 1, loc=np.mean(values), scale=scipy.stats.sem(values))
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-12)
    assert found.mean == pytest.approx(np.mean(values)) and found.std == pytest.approx(np.std(values, ddof=1))


def test_interval_by_hand_and_limits():
    found = estimate([1.0, 2.0, 3.0])  # t(0.975, 2) = 4.302653
    assert (found.low, found.high) == pytest.approx((2 - 4.302653 / math.sqrt(3), 2 + 4.302653 / math.sqrt(3)), abs=1e-6)
    assert estimate([0.7]).std is None and estimate([0.7]).low is None
    for values in ([], [0.1, float("nan")]):
        with pytest.raises(ValueError, match="finite values"):
            estimate(values)


def test_paired_comparison():
    base = {0: 0.70, 1: 0.80, 2: 0.75}
    better = compare({0: 0.72, 1: 0.821, 2: 0.771}, base)  # small differences that agree, although the seeds differ by 0.1
    assert better.verdict == "better" and better.difference.mean == pytest.approx(0.062 / 3)
    assert compare(base, {0: 0.72, 1: 0.821, 2: 0.771}).verdict == "worse"
    noisy = compare({0: 0.75, 1: 0.80, 2: 0.76}, base)  # + 0.05, 0, + 0.01
    assert noisy.verdict == "within noise" and noisy.difference.mean > 0
    low, high = scipy.stats.ttest_rel([0.75, 0.80, 0.76], [0.70, 0.80, 0.75]).confidence_interval(0.95)
    assert (noisy.difference.low, noisy.difference.high) == pytest.approx((low, high))
    assert compare(base, base).verdict == "within noise"
    short = compare({0: 0.9, 1: 0.9, 5: 0.9}, base)
    assert short.verdict == "n/a" and short.n == 2 and short.difference is None


# Records and rendering


def lines_of(rows, score, dirty=lambda row, cell: False, absent=(), letters="GP"):
    """A record of every cell; score(row name, seed) is the mAP of GP, and 0.02 more that of PG."""
    lines = []
    for row in (row for row in rows if row.name not in absent):
        for seed, pairs in row.cells.items():
            for entry in (*pairs[letters].needs, pairs[letters]):
                value = score(row.name, seed)
                lines.append({
                    "row": row.name if entry is pairs[letters] else None, "pair": letters, "setup": row.setup, "id": entry.id,
                    "stage": entry.stage, "seed": seed, "needs": [need.id for need in entry.needs], "seconds": 60.0, **CLEAN,
                    "scores": {f"map/{letters}": value, f"map/{letters[::-1]}": value + 0.02, "map/chance": 0.117, "clipped": 0.05},
                    "epochs": 2, "curve": {"epoch": [1, 2], "map/avg": [0.1, value]}, "dirty": dirty(row.name, entry),
                    "command": f"python train_{entry.stage}.py", "call": "python reproduce.py",
                })
    return lines


def rendered(folder, table, lines, protocol=PROTOCOL, stem="{}-digits-small"):
    path = folder / f"{stem.format(table)}.jsonl"
    add_records(path, lines)
    render(path, protocol)
    text = path.with_suffix(".md").read_text()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    return text, {line[0]: dict(zip(rows[0], line)) for line in rows[2:]}


def test_a_table_with_clean_dirty_and_missing_cells(tmp_path):
    level = {"RCLL": 0.78, "CE": 0.70, "MAE": 0.781, "GCE": 0.79, "AUE": 0.6}
    bumps = {"MAE": (0.03, -0.03, 0.0), "GCE": (0.001, 0.0, 0.002)}
    score = lambda name, seed: level.get(name, 0.5) + 0.01 * seed + bumps.get(name, (0, 0, 0))[seed]
    dirty = lambda name, cell: cell.stage == "step2" and (name == "AUE" or (name == "CE" and cell.seed == 2))
    text, found = rendered(tmp_path, "table4", lines_of(rows_of("table4", seeds=(0, 1, 2)), score, dirty, absent=("NCE+AGCE",)))
    assert found["RCLL"]["GP"] == "79.0 ± 1.0 [76.5, 81.5]" and found["RCLL"]["GP, paper (3D MNIST)"] == "84.3"
    assert found["RCLL"]["avg"] == "80.0 ± 1.0 [77.5, 82.5]" and found["RCLL"]["avg, paper (3D MNIST)"] == "84.1"
    assert found["RCLL"]["avg, difference"] == "" and found["RCLL"]["seeds"] == "0, 1, 2" and found["RCLL"]["wall time"] == "2.0 min"
    assert found["RCLL"]["device"] == "a CPU, 1 thread" and found["RCLL"]["commit"] == "`aaaaaaa`" and found["chance"]["avg"] == "11.7"
    assert found["GCE"]["avg, difference"].startswith("+1.1 [") and found["MAE"]["avg, difference"].startswith("within noise (+0.1 [")
    assert found["CE"]["avg, difference"] == "n/a" and found["CE"]["seeds"] == "0, 1; dirty tree: 2"
    assert found["AUE"]["GP"] == found["AUE"]["avg"] == "dirty tree" and found["AUE"]["seeds"] == "dirty tree: 0, 1, 2"
    assert found["NCE+AGCE"]["avg"] == "not run" and found["NCE+AGCE"]["seeds"] == "not run: 0, 1, 2"
    assert "- Order of the means, ours: GCE > MAE > RCLL > CE" in text
    assert "- Order of the means, paper: RCLL > GCE > NCE+AGCE > AUE > MAE > CE" in text
    assert "better: GCE" in text and "within noise: MAE" in text and "n/a, fewer than 3 seeds: CE" in text
    facts = ", ".join(f"{key.split('_size')[0].replace('_rate', ' rate')} {value:g}" for key, value in rows_of("table4")[0].setup.items()
                      if isinstance(value, (int, float)))
    assert f"- Settings: ours, not the paper's (`configs/smoke`): 2 + 2 epochs, {facts}\n" in text


def test_files_that_cannot_change_a_cell_leave_the_tree_clean(tmp_path, monkeypatch):
    monkeypatch.setattr(jobs_module, "REPOSITORY", tmp_path)
    assert jobs_module.code_state("cpu")["dirty"] is None  # no repository: git cannot tell
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    for name, dirty in (("mine.yaml", False), ("docs/note.md", False), ("results/a.jsonl", False), ("configs/a.yaml", True), ("mine.py", True)):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
        assert jobs_module.code_state("cpu")["dirty"] is dirty, name
        (tmp_path / name).unlink()


def test_a_dirty_or_missing_step_1_makes_its_step_2_dirty_or_missing(tmp_path):
    lines = lines_of(rows_of("table2-romo"), lambda name, seed: 0.7, dirty=lambda name, cell: cell.stage == "step1")
    _, found = rendered(tmp_path, "table2-romo", lines)
    assert found["after RDL"]["avg"] == "dirty tree"
    (tmp_path / "table2-romo-digits-small.jsonl").unlink()
    _, found = rendered(tmp_path, "table2-romo", [line for line in lines if line["stage"] == "step2"])
    assert found["after RDL"]["avg"] == "not run"


def test_tasks_of_several_pairs_and_of_more_modalities(tmp_path):
    both = rows_of("table2-romo", dataclasses.replace(SMOKE, pairs=("RP", "GP")))
    score = lambda name, seed: 0.6
    lines = lines_of(both[:1], score, letters="RP") + lines_of(both, score, letters="GP")
    text, found = rendered(tmp_path, "table2-romo", lines, stem="{}-smoke-small")
    assert "paper" not in text.splitlines()[4] and "smoke, small scale" in text
    assert found["after PLA"]["avg"] == "61.0" and found["after PLA"]["PR"] == "62.0"
    assert found["after RDL"]["GP"] == "60.0" and found["after RDL"]["RP"] == "not run" and found["after RDL"]["avg"] == "not run"
    tasks = {row.name: row for row in rows_of("tasks")}
    name = "step 1, PLA (class estimator), R+G+P at once"
    pair, three = tasks["step 1, PLA (class estimator)"], lines_of([tasks[name]], score, letters="RGP")
    three[0]["scores"] = {"map/RP": 0.5, "map/PR": 0.5, "map/GP": 0.7, "map/PG": 0.7, "map/RG": 0.9, "map/GR": 0.9}
    _, found = rendered(tmp_path, "tasks", three + lines_of([pair], score))
    assert found[name]["avg"] == "60.0" and found[name]["RG"] == "90.0"  # the mean is over 2D-3D tasks alone
    assert found[pair.name]["RP"] == "" and found[pair.name]["avg"] == "61.0"


def test_papers_average_of_table_8_and_unassigned_rows_of_table_6(tmp_path):
    _, found = rendered(tmp_path, "table8", lines_of(rows_of("table8"), lambda name, seed: 0.7))
    assert found["no bank"]["avg, paper (3D MNIST)"] == "76.4" and found["both banks, after PLA"]["avg, paper (3D MNIST)"] == ""
    _, found = rendered(tmp_path, "table6", lines_of(rows_of("table6"), lambda name, seed: 0.7))
    assert found["full"]["PG, paper (3D MNIST)"] == "83.9" and found["RDL without L_mlm"]["GP, paper (3D MNIST)"] == "11.7"
    assert found["PLA without L_ssm"]["GP, paper (3D MNIST)"] == ""


def test_the_headline_shows_the_paper_beside_both_settings(tmp_path):
    _, found = rendered(tmp_path, "headline", [])
    assert (found["paper, Table II"]["GP"], found["paper, Table II"]["avg"]) == ("84.3", "84.1")
    assert found["ours, step 2"]["GP"] == found["as printed, step 2"]["avg"] == "not run"
    printed = dataclasses.replace(SMOKE, config=Path("configs/digits"))
    lines = lines_of(rows_of("headline", dataclasses.replace(SMOKE, as_printed=printed))[1:], lambda name, seed: 0.6 + 0.1 * ("ours" in name))
    for line in lines:
        line["setup"] = {**line["setup"], "config": line["setup"]["config"].replace("digits", "mnist3d_paper_cpu")}
    text, found = rendered(tmp_path, "headline", lines)
    assert found["ours, step 2"]["GP"] == "70.0" and found["as printed, step 2"]["GP"] == "60.0"
    assert "- Settings: the paper's as printed, inputs and encoders in CPU size (`configs/mnist3d_paper_cpu`): 2 + 2 epochs" in text


def test_a_table_never_joins_settings_and_keeps_every_record(tmp_path):
    old = lines_of(rows_of("clip", seeds=(0, 1)), lambda name, seed: 0.5)
    for line in old:  # as recorded before a key was renamed
        line |= {"id": f"old-{line['id']}", "needs": [f"old-{need}" for need in line["needs"]], "setup": {**line["setup"], "hash": None},
                 "command": "python train_step2.py --set rdl.warmup_epochs=0"}
    assert rendered(tmp_path, "clip", old)[1]["step 2, RDL"]["seeds"] == "0, 1"
    new = [line for line in lines_of(rows_of("clip"), lambda name, seed: 0.7) if line["row"] in (None, "step 2, RDL")]
    for _ in range(2):  # the same records again change nothing
        _, found = rendered(tmp_path, "clip", new)
        assert found["step 2, RDL"]["GP"] == "70.0" and found["step 2, RDL"]["seeds"] == "0" and found["step 2, RDL"]["clipped"] == "5.0"
        assert found["step 2, RDL, clipped from the start"]["GP"] == "not run"
        kept = read_records(tmp_path / "clip-digits-small.jsonl")
        assert [line for line in old if line not in kept] == [] and len(kept) == len({json.dumps(line) for line in old + new})


@pytest.mark.parametrize("table", ["fig4", "fig5"])
def test_figures_are_drawn_of_clean_cells_only(tmp_path, table):
    protocol = {**PROTOCOL, "tables": {table: {**PROTOCOL["tables"][table], "values": [0.25, 0.5]}}}
    rows = expand(protocol["tables"][table], SMOKE, (0, 1))
    picture = tmp_path / f"{table}-digits-small.png"
    text, found = rendered(tmp_path, table, [], protocol)
    assert "figure: not run" in text and not picture.exists() and found[rows[0].name]["avg"] == "not run"
    lines = lines_of(rows, lambda name, seed: 0.7 + 0.01 * seed, dirty=lambda name, cell: True)
    assert "figure: dirty tree" in rendered(tmp_path, table, lines, protocol)[0]
    text, _ = rendered(tmp_path, table, [{**line, "dirty": False} for line in lines], protocol)
    assert f"]({picture.name})" in text and picture.read_bytes().startswith(b"\x89PNG")


def test_documents_are_rendered_from_the_records_alone(tmp_path):
    expected, _ = rendered(tmp_path, "table4", lines_of(rows_of("table4"), lambda name, seed: 0.7))
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text("a\n<!-- table: table4-digits-small -->\nstale\n<!-- end -->\nb\n")
    (tmp_path / "docs" / "speed.md").write_text("<!-- benchmark: nothing -->\n9.9\n<!-- end -->\n")
    documents.rewrite(tmp_path, tmp_path, PROTOCOL)
    assert (tmp_path / "README.md").read_text() == f"a\n<!-- table: table4-digits-small -->\n{expected}<!-- end -->\nb\n"
    assert (tmp_path / "docs" / "speed.md").read_text() == "<!-- benchmark: nothing -->\nnot run\n<!-- end -->\n"


def test_the_documents_show_what_is_recorded():
    """`reproduce.py render` would change nothing: no number in a document is typed by hand."""
    for document in (REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))):
        for name, shown in re.findall(r"<!-- table: ([\w-]+) -->\n(.*?)<!-- end -->", document.read_text(), flags=re.DOTALL):
            assert "\n".join(table_lines(load_table(REPOSITORY / "results" / f"{name}.jsonl", PROTOCOL))) + "\n" == shown, (document, name)


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


def test_a_finished_run_is_recorded(tmp_path, finished, capsys):
    folder, environment = finished
    for _ in range(2):
        assert reproduce.main(["record", "mine", str(folder), "--results", str(tmp_path)]) == 0
    (record,) = read_records(tmp_path / "mine.jsonl")
    assert record["command"] == "python train_step1.py --config configs/smoke/step1.yaml" and record["commit"] == "c" * 40
    assert (record["row"], record["pair"], record["seed"], record["device"]) == ("step 1, PLA (class estimator)", "GP", 0, "a CPU")
    text = (tmp_path / "mine.md").read_text()
    assert "| step 1, PLA (class estimator) | 40.0 | 60.0 | 50.0 | 0 | 1.0 min | a CPU, 1 thread | `ccccccc` |" in text
    (folder / "env.json").write_text(json.dumps({**environment, "command": [*environment["command"], "--set", "optim.epochs=2"]}))
    with pytest.raises(UserError, match="holds a run of another command in its place"):
        record_run(tmp_path / "mine.jsonl", folder)
    record_run(tmp_path / "mine.jsonl", folder, row="mine")
    assert [entry["row"] for entry in read_records(tmp_path / "mine.jsonl")] == ["step 1, PLA (class estimator)", "mine"]


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


def test_the_papers_numbers_have_the_rows_that_the_protocol_names():
    numbers = yaml.safe_load((HERE / "paper.yaml").read_text())
    for name, table in PROTOCOL["tables"].items():
        for row in table.get("rows", {}).values():
            for tasks in numbers[table["paper"]].values() if "paper" in row else ():
                assert all(row["paper"] in values for values in tasks.values()), (name, row)
    assert numbers["romo"]["3D MNIST"]["RP"]["RoMo"] == numbers["robust_losses"]["3D MNIST"]["RP"]["RoMo"] == 0.849
    for dataset, tasks in numbers["ablation"].items():
        assert {task: values["row_9"] for task, values in tasks.items()} == {
            task: values["RoMo"] for task, values in numbers["romo"][dataset].items()}
    assert numbers["bank_cost"]["3D MNIST"]["mib"] == pytest.approx(5000 * 1024 * 4 / 2**20, abs=1e-3)


# Figure 3 and Table IX


def test_loss_shapes_against_the_formulas():
    p, classes, alpha = np.array([0.02, 0.05, 0.3, 0.6, 0.97]), 10, 0.35
    clip = (math.log(classes)) ** alpha * (1 - 1 / classes)
    surprise, rest = -np.log(p), (classes - 1) * -np.log((1 - p) / (classes - 1))
    expected = {
        "ce": (surprise, -1 / p), "mae": (2 * (1 - p), np.full(5, -2.0)), "gce": ((1 - p**0.7) / 0.7, -(p**-0.3)),
        "aue": (((5.5 - p) ** 3 - 4.5**3) / 3, -((5.5 - p) ** 2)),
        "rcll": (np.where(p > 0.1, surprise**alpha * (1 - p), clip),
                 np.where(p > 0.1, -(surprise**alpha) - alpha * surprise ** (alpha - 1) * (1 - p) / p, 0)),
    }
    for name, (values, slopes) in expected.items():
        found = loss_shapes.evaluate_loss(build_robust_loss(name, classes, alpha), torch.tensor(p), classes)
        assert np.allclose(found[0], values, rtol=1e-9) and np.allclose(found[1], slopes, rtol=1e-9), name
    found = loss_shapes.evaluate_loss(build_robust_loss("nce_agce", classes, alpha), torch.tensor(p), classes)
    assert np.allclose(found[0], surprise / (surprise + rest) + 4 * (7**1.5 - (6 + p) ** 1.5) / 1.5, rtol=1e-9)
    curves = loss_shapes.curves(classes, alpha, 9)
    assert curves["p"] == pytest.approx(np.arange(1, 10) / 10) and set(curves["curves"]) == {
        "RCLL, alpha = 0.35", "CE", "MAE", "GCE", "AUE", "NCE+AGCE"}


def test_memory_bank_is_measured(monkeypatch):
    calls = {"update": [], "fill": []}
    monkeypatch.setattr(MemoryBank, "update", lambda self, index, rows: calls["update"].append((len(index), tuple(rows.shape))))
    monkeypatch.setattr(MemoryBank, "fill", lambda self, rows: calls["fill"].append(tuple(rows.shape)))
    found = memory_bank.measure(10, 8, 4, torch.device("cpu"), repeats=2)
    assert found["bytes"] == 320 and found["mib"] == 320 / 2**20 and found["update_seconds"] > 0
    assert calls["update"] == [(4, (4, 8)), (4, (4, 8)), (2, (2, 8))] * 3 and calls["fill"] == [(10, 8)] * 3  # one uncounted each


# From end to end


@pytest.fixture
def measured(monkeypatch):
    """Benchmarks run in this process, as one line of Python each, to save the start of another one."""
    def inside(cell, folder, device):
        module = {"memory_bank": memory_bank, "loss_shapes": loss_shapes}[cell.stage]
        module.main([*cell.arguments, "--device", "cpu", "--output", str(folder / "metrics.json")])
        return ["-S", "-c", "pass"]
    monkeypatch.setattr(jobs_module, "command", inside)
    monkeypatch.setattr(reproduce, "code_state", lambda device: CLEAN)


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
    assert "1 cells: 1 done" in capsys.readouterr().out


def test_a_table_from_end_to_end(tmp_path, small_digits, monkeypatch):
    """One real table on real data: budget 0, a run, the same command again, and rendering."""
    added = tmp_path / "mine.yaml"
    own = [f"data.root={small_digits}", "optim.epochs=2"]
    added.write_text(yaml.safe_dump({
        "datasets": {"tiny": {"paper": "3D MNIST", "small": {"config": "configs/smoke", "step1": own, "step2": own}}}}))
    monkeypatch.setattr(reproduce, "code_state", lambda device: CLEAN)
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
    (["table5", "--dataset", "digits"], "unknown table 'table5', did you mean"), (["table4", "--dataset", "digit"], "unknown data set"),
    (["table4", "--dataset", "digits", "--tasks", "RG"], "one letter of R, G"), (["table4", "--dataset", "digits", "--add", "no.yaml"], "no file no.yaml"),
])
def test_wrong_calls(arguments, message):
    with pytest.raises(UserError, match=message):
        reproduce.main(arguments)


@pytest.mark.parametrize("arguments", [["table4"], ["table4", "--dataset", "digits", "--seeds", "0"], ["table4", "--dataset", "digits", "--budget", "-1"]])
def test_wrong_options_exit_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as error:
        reproduce.main(arguments)
    assert error.value.code == 2
