"""Several processes (gloo, CPU) against one process with the same global batch, from single layers to whole runs."""

import json
import os
import subprocess
import sys

import pytest
import torch
import torch.multiprocessing as mp
from sklearn.metrics import adjusted_rand_score
from stage_runs import PSEUDO_LABELS, REPOSITORY, labels_of, only_run, settings, smoke_samples, weights
from torch import nn

import train_step1
import train_step2
from models.kernels.edge_conv import EdgeConv
from models.sync_batchnorm import synchronise
from utils.engine import distributed
from utils.engine.run_log import RunLog
from utils.evaluation import tables

WORLD = 2


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """What the functions below return in WORLD processes with a gloo group: name -> one result per process."""
    folder = tmp_path_factory.mktemp("processes")
    mp.spawn(_process, (folder,), nprocs=WORLD)
    results = [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]
    return {name: [result[name] for result in results] for name in results[0]} | {"log": (folder / "log.txt").read_text()}


def _process(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=WORLD)
    results = {kind: trained_share(kind) for kind in ("batchnorm", "edge_conv")}
    torch.save({**results, "collected": collected(rank), "ranked": ranked(rank, folder)}, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def batch(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_layer(kind):
    torch.manual_seed(0)
    if kind == "edge_conv":
        layer = nn.Sequential(EdgeConv(3, 5, 4))
        signs = torch.tensor([1.0, -1.0, 1.0, -1.0, 0.5])
        layer[0].bn.weight.data.mul_(signs)
        return layer.double()
    return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 2)).double()


def inputs(kind):
    return batch(6, 10, 3) if kind == "edge_conv" else 3 + 2 * batch(6, 3)


def loss_of(out):
    """Couples all rows of the batch, as the contrastive loss does."""
    rows = out.flatten(1)
    return (rows @ rows.T).exp().mean() / 100 + rows.sin().sum()


def trained_share(kind):
    """What one process gets: gradients averaged over the processes, input gradients of its share, running statistics."""
    layer = synchronise(make_layer(kind))
    values = inputs(kind)[distributed.own_share(6)].clone().requires_grad_()
    loss = loss_of(distributed.gather_batch(layer(values)))
    loss.backward()
    grads = {name: distributed.add_over_processes(p.grad) / WORLD for name, p in layer.named_parameters()}
    return {"loss": loss.detach(), "grads": grads, "input": values.grad / WORLD, "buffers": dict(layer.named_buffers())}


@pytest.mark.parametrize("kind", ["batchnorm", "edge_conv"])
def test_two_processes_give_the_gradients_of_one(made, kind):
    layer, values = make_layer(kind), inputs(kind).requires_grad_()
    loss = loss_of(layer(values))
    loss.backward()
    for rank, result in enumerate(made[kind]):
        torch.testing.assert_close(result["loss"], loss.detach())
        for name, parameter in layer.named_parameters():
            torch.testing.assert_close(result["grads"][name], parameter.grad, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(result["input"], values.grad[3 * rank : 3 * rank + 3], rtol=1e-6, atol=1e-9)
        for name, buffer in layer.named_buffers():
            torch.testing.assert_close(result["buffers"][name], buffer)


def collected(rank):
    rows = torch.arange(5.0).view(5, 1)[distributed.own_share(5)]
    module = nn.BatchNorm1d(2)
    module.running_mean.fill_(rank + 1)
    distributed.copy_from_main(module.buffers())
    sent = distributed.from_main(lambda: {"rank": distributed.rank()})
    return {"rows": distributed.gather_shares(rows, 5), "mean": module.running_mean, "sent": sent, "main": distributed.is_main()}


def test_shares_buffers_and_objects(made):
    for rank, result in enumerate(made["collected"]):
        assert result["rows"].flatten().tolist() == [0, 1, 2, 3, 4]
        assert result["mean"].tolist() == [1, 1] and result["sent"] == {"rank": 0} and result["main"] == (rank == 0)


def ranked(rank, folder):
    calls = []
    tables.retrieval_table = lambda *_, **__: calls.append(rank) or {"map/avg": 0.5}
    scores = tables.Evaluator(lambda: {}, {})()
    try:
        with RunLog(folder).failures_logged():
            if rank == 1:
                raise KeyError("a bug of one process")
    except KeyError:
        pass
    return {"calls": calls, "scores": scores}


def test_the_main_process_alone_ranks_and_any_process_logs_its_failure(made):
    assert [result["calls"] for result in made["ranked"]] == [[0], []]
    assert all(result["scores"] == {"map/avg": 0.5} for result in made["ranked"])
    log = made["log"]
    assert "process 1: Traceback" in log and "KeyError: 'a bug of one process'" in log and "process 0" not in log


def torchrun(script, arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={WORLD}", script, *arguments]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stderr[-3000:]
    return result


def losses(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return torch.tensor([(line["loss/mlm"], line.get("loss/ssm", line.get("loss/rcll", 0.0))) for line in lines])


def test_torchrun_with_two_processes_equals_one_process(small_digits, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    # Adam's first steps are signs: small ones keep rounding small
    more = ("optim.epochs=2", "optim.learning_rate=0.0001", "pla.num_clusters=30")
    train_step1.main(settings(small_digits, one, 1, *more))
    printed = torchrun("train_step1.py", settings(small_digits, two, 1, *more)).stdout
    assert printed.count("epoch 2/2") == 1 and printed.count("run folder") == 1
    torch.testing.assert_close(losses(only_run(two, 1)), losses(only_run(one, 1)), rtol=1e-3, atol=1e-3)
    ours, theirs = weights(only_run(two, 1)), weights(only_run(one, 1))
    assert ours.keys() == theirs.keys()
    for key in ours:
        if ".encoders" in key and ours[key].is_floating_point():
            torch.testing.assert_close(ours[key], theirs[key], rtol=1e-2, atol=2e-3, msg=key)
    for name in PSEUDO_LABELS:  # the same clusters, but for samples that rounding moves, and by whatever numbers
        alone, shared = ([row.split()[1] for row in (labels_of(out) / name).read_text().splitlines()] for out in (one, two))
        equal = sum(a == b for a, b in zip(alone, shared, strict=True)) / len(alone)  # of clouds, which lie almost all in one
        assert max(adjusted_rand_score(alone, shared), equal) > 0.8
    assert len({row.split()[1] for row in (labels_of(one) / PSEUDO_LABELS[0]).read_text().splitlines()}) >= 4
    labels, more = f"rdl.pseudo_labels={labels_of(one)}", more[:2]
    train_step2.main(settings(small_digits, one, 2, *more))
    torchrun("train_step2.py", settings(small_digits, two, 2, labels, *more))
    torch.testing.assert_close(losses(only_run(two, 2)), losses(only_run(one, 2)), rtol=1e-3, atol=1e-3)


def test_views_as_positives_and_resume_under_torchrun(small_digits, tmp_path):
    more = ("optim.epochs=2", "data.positives=views", "data.pairing=none")
    torchrun("train_step1.py", settings(small_digits, tmp_path, 1, *more))
    run = only_run(tmp_path, 1)
    before = (run / "last.pt").read_bytes()
    torchrun("train_step1.py", ["--resume", str(run)])
    assert (run / "last.pt").read_bytes() == before


def test_uneven_batches_are_refused(small_digits, monkeypatch):
    config, samples = smoke_samples(small_digits)
    monkeypatch.setattr(distributed, "world", lambda: 3)
    with pytest.raises(ValueError, match="batch of 16.*3 processes.*optim.batch_size"):
        train_step1.PLALearner(config, samples, torch.device("cpu"))
