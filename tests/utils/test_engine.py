"""Routes and switches of the training engine that must not change a number: host or device samples, fused Adam, compilation."""

import pytest
import torch
from stage_runs import assert_same_result, distinct, labels_of, log_lines, smoke_config, smoke_samples, trained

import train_step1
import train_step2


@pytest.mark.parametrize("workers", [0, 2])
def test_samples_on_the_host_give_the_same_run(finished, small_digits, tmp_path, workers):
    train_step1.main(distinct(small_digits, tmp_path, 1, "data.placement=host", f"data.workers={workers}"))
    assert_same_result(finished, tmp_path, 1)


def test_the_route_does_not_shift_the_masks_of_meshes(small_digits, tmp_path):
    more = ("data.modalities=[GrayImg,Mesh]", "optim.epochs=2")
    device, host = (mlm_losses(trained(small_digits, tmp_path / place, 1, f"data.placement={place}", *more)) for place in ("device", "host"))
    assert device == host


def mlm_losses(run):
    return [line["loss/mlm"] for line in log_lines(run)]


def test_faster_steps_track_the_plain_ones(small_digits, tmp_path):
    default = mlm_losses(trained(small_digits, tmp_path / "default", 1))
    for switch, tolerance in (("optim.fused=false", 1e-5), ("run.amp=true", 5e-3)):
        switched = mlm_losses(trained(small_digits, tmp_path / switch, 1, switch))
        assert switched[0] == pytest.approx(default[0], rel=tolerance)
        assert switched == pytest.approx(default, rel=0.1) and switched[-1] != default[-1]  # what is rounded grows from epoch to epoch


@pytest.mark.parametrize("loss", ["ce", "nce_agce"])
def test_step_2_trains_with_other_robust_losses(finished, small_digits, tmp_path, loss):
    labels = f"rdl.pseudo_labels={labels_of(finished)}"
    (line,) = log_lines(trained(small_digits, tmp_path, 2, labels, f"rdl.loss={loss}", "optim.epochs=1"))
    assert line[f"loss/{loss}"] > 0 and "loss/rcll" not in line and 0 <= line["clipped"] <= 1


def test_equation_4_with_the_losses_scale(finished, small_digits, tmp_path, monkeypatch):
    totals = []
    optimise = train_step2.RDLLearner.optimise
    monkeypatch.setattr(train_step2.RDLLearner, "optimise", lambda self, loss: (totals.append(float(loss.detach())), optimise(self, loss)))
    more = [f"rdl.pseudo_labels={labels_of(finished)}", "rdl.loss_scale=0.1", "rdl.lambda_2=0.6", "optim.epochs=1"]
    (line,) = log_lines(trained(small_digits, tmp_path, 2, *more))
    assert sum(totals) / len(totals) == pytest.approx(0.6 * 0.1 * line["loss/rcll"] + 0.4 * line["loss/mlm"], rel=1e-5)


def test_memory_without_a_bank_is_the_last_epochs_features(small_digits):
    learner = train_step1.PLALearner(*smoke_samples(small_digits, "pla.mlm_only_epochs=0", "pla.banks=[PointCloud]"), torch.device("cpu"))
    learner.train_epoch(1)
    before = {name: bank.memory.clone() for name, bank in learner.banks.items()}
    features = {name: values.embeddings for name, values in learner.describe().items()}
    learner.train_epoch(2)
    torch.testing.assert_close(learner.banks["GrayImg"].memory, features["GrayImg"])  # refreshed once, not blended
    assert not torch.allclose(before["GrayImg"], features["GrayImg"], atol=1e-3)
    assert not torch.allclose(learner.banks["PointCloud"].memory, features["PointCloud"], atol=1e-3)
    with pytest.raises(ValueError, match="pla.banks names Mesh"):
        smoke_config(small_digits, "pla.banks=[Mesh]")
