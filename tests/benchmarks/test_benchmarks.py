"""Benchmarks at toy sizes: counted work against hand-worked values, the JSON they write, and checks that can fail."""

import argparse
import json
import multiprocessing
import re
import sys
import time

import pytest
import torch
from torch import nn

from benchmarks import cells, edge_conv, floors, gpu_suite, loss_curves, retrieval_metrics, start_up, training_step
from benchmarks.floors import count_work
from models.kernels.edge_conv import EdgeConv
from models.kernels.knn import knn
from utils.engine.run_log import REPOSITORY
from utils.errors import UserError
from utils.evaluation.metrics import mean_average_precision
from utils.settings.data_options import DataConfig

CPU = torch.device("cpu")
HEADER = {"command", "device", "threads", "torch", "commit", "dirty"}
TIME = {"seconds", "flops", "bytes", "flop_floor_seconds", "byte_floor_seconds", "share_of_matmul_rate"}
SMOKE = REPOSITORY / "configs" / "smoke"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Small measurements of the rates; threads as they were afterwards."""
    monkeypatch.setattr(floors, "PRODUCT_SECONDS", 1e-5)
    monkeypatch.setattr(floors, "COPIED_BYTES", {"cpu": 2**20, "cuda": 2**20})
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def run(benchmark, path, *argv, code=None):
    """Run a benchmark on the CPU and return its report, whose header and floors are checked."""
    assert benchmark.main([*argv, "--threads", "1", "--device", "cpu", "--output", str(path)]) == code
    report = json.loads(path.read_text())
    assert HEADER <= report.keys() and report["threads"] == 1 and report["command"].startswith(f"python -m {benchmark.__name__} ")
    check_floors(report, report.get("rates"))
    return report


def check_floors(tree, rates):
    """The floors of every time in a report, worked out again."""
    for row in (entry for entry in tree.values() if isinstance(entry, dict)):
        check_floors(row, rates)
        if "flop_floor_seconds" in row:
            assert TIME <= row.keys() and all(row[key] > 0 for key in TIME)
            assert row["flop_floor_seconds"] == pytest.approx(row["flops"] / rates["flops_per_second"])
            assert row["byte_floor_seconds"] == pytest.approx(row["bytes"] / rates["bytes_per_second"])
            assert row["share_of_matmul_rate"] == pytest.approx(row["flop_floor_seconds"] / row["seconds"])


@pytest.mark.parametrize("action,expected", [
    (lambda a, b: a @ b, 2 * 4 * 6 * 5), (lambda a, b: (a @ b).add_(1).relu(), 2 * 4 * 6 * 5),
    (lambda a, b: torch.zeros(4, 5).addmm_(a, b), 2 * 4 * 6 * 5), (lambda a, b: a @ b[:, 0], 2 * 4 * 6),
    (lambda a, b: torch.zeros(3, 4, 5).baddbmm_(a.expand(3, 4, 6), b.expand(3, 6, 5)), 3 * 2 * 4 * 6 * 5),
    (lambda a, b: a + 1, 0),
    (lambda a, b: nn.functional.conv1d(a[None], torch.ones(2, 4, 3)), 2 * 4 * 3 * 2 * 4),
], ids=["mm", "in place after", "addmm_", "mv", "baddbmm_", "sum", "convolution"])
def test_counted_flops(action, expected):
    assert count_work(lambda: action(torch.ones(4, 6), torch.ones(6, 5))).flops == expected


TABLE, ROWS = torch.zeros(1000, 8), torch.tensor([3, 1])  # 32,000 and 16 bytes; two rows are 64


@pytest.mark.parametrize("action,expected", [
    (lambda: TABLE + 1, 64_000), (lambda: TABLE.add_(0), 64_000), (lambda: TABLE.zero_(), 32_000), (lambda: TABLE.T[2:], 0),
    (lambda: torch.empty(1000), 0), (lambda: TABLE[ROWS], 16 + 64 + 64),
    (lambda: TABLE.index_add_(0, ROWS, torch.empty(2, 8)), 16 + 64 * 3),
    (lambda: TABLE.copy_(torch.empty(1000, 8)), 64_000), (lambda: torch._foreach_add_([TABLE, TABLE[:1]], 0), 2 * 32_032),
    (lambda: torch.add(TABLE, 1, out=torch.empty(1000, 8)), 64_000),
    (lambda: torch.ones(8).expand(1000, 8).sum(), 32 + 32 + 4),
], ids=["read and write", "in place", "overwrite", "views", "allocation", "gather", "scatter", "copy", "lists", "out", "expanded"])
def test_counted_traffic(action, expected):
    assert count_work(action).bytes == expected


@pytest.mark.parametrize("implementation", ["fused", "reference"])
def test_all_products_of_an_edge_conv_are_counted(implementation):
    """The fused layer is a custom autograd function; its FLOPs worked out from its formulas."""
    batch, points, c, out, k = 2, 16, 3, 8, 4
    layer, x = EdgeConv(c, out, k, implementation), torch.randn(batch, points, c, requires_grad=True)
    index, m = knn(x, k), batch * points
    forward = 2 * (2 * m * c * out) + 2 * m * 2 * c + 2 * out * c + 2 * out * 2 * c  # u and v; sums over the edges, shift and mean
    backward = 4 * (2 * m * c * out)  # gradients of weight and points
    expected = {"fused": forward + backward, "reference": 3 * 2 * m * k * 2 * c * out}
    assert count_work(lambda: layer(x, index).sum().backward()).flops == expected[implementation]


def test_the_default_file_is_named_by_benchmark_and_device(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(floors, "REPOSITORY", tmp_path)
    path = floors.write_report("edge_conv-n256", {"device": "NVIDIA H100 80GB (HBM3)"}, None)
    assert path == tmp_path / "results" / "benchmarks" / "edge_conv-n256-nvidia-h100-80gb-hbm3.json"
    assert json.loads(path.read_text()) == {"device": "NVIDIA H100 80GB (HBM3)"} and str(path) in capsys.readouterr().out


@pytest.mark.parametrize("argv,message", [(["--device", "cuda:99"], "cuda:99|auto, cpu"), (["--repeats", "0"], "--repeats must be at least 1")])
def test_a_wrong_call_is_refused(capsys, argv, message):
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=1)
    with pytest.raises((SystemExit, UserError)) as caught:
        floors.start("memory_bank", parser, argv)
    assert re.search(message, str(caught.value) + capsys.readouterr().err)


@pytest.mark.parametrize("loop", retrieval_metrics.LOOPS)
def test_the_loops_on_a_hand_worked_ranking(loop):
    query, gallery = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[3.0, 0.1], [1.0, 1.0], [0.1, 9.0]])
    labels, items = torch.tensor([0, 5]), torch.tensor([1, 0, 0])  # first: hits at ranks 2 and 3; second: none
    assert retrieval_metrics.loop_map(loop, query, labels, gallery, items) == pytest.approx(((1 / 2 + 2 / 3) / 2 + 0) / 2, abs=1e-15)


def test_retrieval_metrics(tmp_path, capsys):
    report = run(retrieval_metrics, tmp_path / "a.json", "--loop-size", "40", "--dim", "6", "--sizes", "60", "--repeats", "1", code=0)
    assert report["equal"] and report["difference"] < 1e-6 and set(report["speedup"]) == {"double loop", "loop over ranks"}
    assert set(report["times"]) == {"metrics, 40 x 40", "double loop", "loop over ranks", "metrics, 60 x 60", "diffusion, 60 x 60"}
    assert report["times"]["metrics, 60 x 60"]["flops"] == 2 * 60 * 60 * 6
    assert report["map"]["metrics, 60 x 60"] == mean_average_precision(*retrieval_metrics.make_problem(60, 6, CPU))
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("double loop", "FLOP floor s", "byte floor s", "below 1e-06"))


@pytest.mark.parametrize("error", [2e-6, -2e-6])
def test_a_wrong_metric_gives_exit_code_1(monkeypatch, tmp_path, error):
    monkeypatch.setattr(retrieval_metrics, "mean_average_precision", lambda *problem: mean_average_precision(*problem) + error)
    argv = ["--loop-size", "20", "--dim", "4", "--sizes", "--repeats", "1"]
    assert run(retrieval_metrics, tmp_path / "a.json", *argv, code=1)["equal"] is False


@pytest.mark.parametrize("modalities,placement", [("[GrayImg,PointCloud]", "auto"), ("[RGBImg,Mesh]", "host")])
def test_training_step(monkeypatch, tmp_path, capsys, modalities, placement):
    monkeypatch.setattr(training_step, "CLUSTERS", 6)  # of 8 samples
    settings = [f"data.modalities={modalities}", "optim.batch_size=4", "data.max_faces=8", f"data.placement={placement}", "data.workers=0"]
    argv = ["--config-dir", str(SMOKE), "--steps", "2", "--epochs", "1", "--set", *settings]
    for row in run(training_step, tmp_path / "a.json", *argv)["stages"].values():
        assert row["pairs_per_second"] == pytest.approx(8 / row["epoch_seconds"][0])
        assert row["seconds"] == pytest.approx(row["epoch_seconds"][0] / 2)
        assert 0 < row["share_waiting_for_data"] < 1
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("step1, one step", "step2, one step", "waiting for data"))


def test_edge_conv(monkeypatch, tmp_path, capsys):
    if not torch.cuda.is_initialized():  # forked processes start faster, but cannot follow autograd's threads for a GPU
        fork = multiprocessing.get_context("fork")
        monkeypatch.setattr(floors.multiprocessing, "get_context", lambda method: fork)
    report = run(edge_conv, tmp_path / "a.json", "--batch", "4", "--points", "64", "--k", "4", "--repeats", "1")
    assert report["reference"]["flops"] > report["fused"]["flops"]
    assert report["speedup"] == pytest.approx(report["reference"]["seconds"] / report["fused"]["seconds"])
    assert report["largest_relative_difference"]["fused from reference"]["output"] < 1e-4
    assert {"k-NN, C = 3", "k-NN, C = 64", "k-NN, C = 128"} < report.keys()
    assert "speedup: " in capsys.readouterr().out


def test_loss_curves_of_two_variants(small_digits, tmp_path, capsys):
    argv = ["--config-dir", str(SMOKE), "--epochs", "2", "--variants", "1", "--set", f"data.root={small_digits}", "optim.epochs=2"]
    report = run(loss_curves, tmp_path / "curves.json", *argv)
    for stage, key in (("step1", "loss/mlm"), ("step2", "loss/rcll")):
        differences, plain = report["differences"][stage], report["epochs"][stage][loss_curves.PLAIN]
        first = [report["epochs"][stage]["fused EdgeConv"][0]], plain[:1]
        assert differences[loss_curves.PLAIN] == 0 and loss_curves.largest_difference(*first) < 5e-3
        assert 0 < differences["fused EdgeConv"] < 0.1  # Adam's steps let rounding grow
        assert [row["epoch"] for row in plain] == [1, 2] and key in plain[1]
    assert (tmp_path / "curves.png").stat().st_size > 5000 and "largest relative difference" in capsys.readouterr().out
    plain = [{"loss/mlm": 2.0}, {"loss/mlm": 4.0, "loss/ssm": -1.0}]
    assert loss_curves.largest_difference([plain[0], {"loss/mlm": 4.0, "loss/ssm": -1.5}], plain) == pytest.approx(0.5)


def test_two_cells_side_by_side_and_in_turn(small_digits, tmp_path, monkeypatch):
    argv = ["--config", str(SMOKE / "step1.yaml"), "--epochs", "1", "--repeats", "2", "--set", f"data.root={small_digits}"]
    train, calls = cells._train, []

    def first_alone(command, seeds, threads):
        calls.append((seeds, threads))
        return train(command, seeds, threads) if len(calls) == 1 else time.sleep(0.01)

    monkeypatch.setattr(cells, "_train", first_alone)
    report = run(cells, tmp_path / "cells.json", *argv)
    assert calls == [((0, 1), 1), ((0,), 2), ((1,), 2)] * 2
    together, in_turn = (report["seconds_of_both"][way] for way in ("side by side", "in turn"))
    assert report["speedup"] == {"side by side": pytest.approx(in_turn / together)} and together > in_turn > 0.02
    with pytest.raises(UserError, match="failed: .*optim.nothing"):
        train([sys.executable, "train_step1.py", *argv[:2], "--set", "optim.nothing=1"], (0,), 1)


def test_mesh_preparation_times_every_mesh(tmp_path):
    pytest.importorskip("pyvista", reason="meshes need the packages of requirements-data.txt")
    from benchmarks import mesh_preparation

    with pytest.raises(UserError, match="no .off file"):
        mesh_preparation.main(["--meshes", str(tmp_path)])
    corners = "0 0 0\n1 0 0\n0 1 0\n0 0 1\n"
    (tmp_path / "bathtub_0001.off").write_text(f"OFF\n4 4 0\n{corners}3 0 2 1\n3 0 1 3\n3 0 3 2\n3 1 2 3\n")
    report = run(mesh_preparation, tmp_path / "out.json", "--meshes", str(tmp_path))
    assert report["objects"]["bathtub_0001"]["faces_left"] == 4 and report["mean_seconds"] > 0


def test_the_gpu_suite_goes_on_where_it_was_stopped(tmp_path, capsys):
    records, facts = tmp_path / "results" / "suite.jsonl", {"commit": "a1", "device": "none"}
    slow = tmp_path / "slow.txt"
    go_on = f"import pathlib, time; p = pathlib.Path({str(slow)!r}); d = p.exists(); p.touch(); d or time.sleep(60)"
    steps = {"first": ["-c", "print('fine')"], "slow": ["-c", go_on], "broken": ["-c", "raise SystemExit('a cause')"]}
    assert gpu_suite.run_steps(steps, records, 5, facts) == gpu_suite.LEFT
    assert gpu_suite.read_states(records, "a1") == {"first": "done", "slow": "stopped"}
    assert gpu_suite.run_steps(steps, records, 60, facts) == 1 and "a cause" in capsys.readouterr().out
    steps["broken"] = ["-c", ""]
    assert gpu_suite.run_steps(steps, records, 60, facts) == 0 == gpu_suite.run_steps(steps, records, 0, facts)
    rows = [json.loads(line) for line in records.read_text().splitlines()]
    assert [(row["step"], row["status"]) for row in rows] == [
        ("first", "done"), ("slow", "stopped"), ("slow", "done"), ("broken", "failed"), ("broken", "done")]
    assert rows[0]["output"] == "fine\n" and rows[0]["command"] == ["python", "-c", "print('fine')"] and rows[0]["device"] == "none"
    assert gpu_suite.run_steps(steps, records, 0, facts | {"commit": "b2"}) == gpu_suite.LEFT  # nothing is done at this commit


def test_the_gpu_suite_without_a_gpu_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(gpu_suite, "run_steps", None)
    assert gpu_suite.main([]) == 0 and "No CUDA device here: none of the" in capsys.readouterr().out
    assert gpu_suite.main(["--list"]) == 0 and "not run  tests: python -m pytest -q -m gpu tests" in capsys.readouterr().out


def test_a_later_start_reads_what_the_first_stored(tmp_path):
    start_up.fabricate(tmp_path, 140, 40, 8)
    data = DataConfig(dataset="fabricated", root=str(tmp_path), modalities=("GrayImg", "PointCloud"), image_size=8, image_resize=8,
                      num_points=32, eval_subsets=1)
    first = start_up.measure(data, 1)
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / ".arrays").glob("*_list-*")}
    later = start_up.measure(data, 1)
    assert len(written) == 4 and {path: path.stat().st_mtime_ns for path in (tmp_path / ".arrays").glob("*_list-*")} == written
    assert later.keys() == first.keys() and all(value > 0 for value in later.values())
    with pytest.raises(FileExistsError):
        start_up.fabricate(tmp_path, 1, 1, 8)
