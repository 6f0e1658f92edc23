"""`model.freeze`, `model.headless` and `mlm.relations`: what stands still, what moves towards it, resume, refusals."""

import pytest
import torch
from stage_runs import assert_same_result, kill_at, log_lines, only_run, settings, smoke_config, trained, weights

import train_step1
from models import DGCNN
from utils.errors import UserError
from utils.evaluation.report import row_name
from utils.settings.config import to_dict

KEPT = ["model.freeze=[PointCloud]", "model.headless=[PointCloud]", "model.embedding_dim=64", "mlm.relations=0.5"]


@pytest.fixture
def start(tmp_path):
    """The trunk of a DGCNN with drawn weights and statistics, under the names of the public file."""
    state, path = {}, tmp_path / "dgcnn.t7"
    for key, value in DGCNN(16, k=4, width=32).state_dict().items():
        part, *rest = key.removeprefix("edge_convs.").split(".")
        if part != "head":
            place = f"conv{int(part) + 1}.{int(rest.pop(0) == 'bn')}" if part.isdigit() else f"conv5.{int(part == 'bn5')}"
            state[".".join([place, *rest])] = value + torch.rand(value.shape) if value.is_floating_point() else value + 7
    torch.save(state, path)
    return path


def test_the_frozen_encoder_stands_still_through_both_stages_and_a_resume(small_digits, start, tmp_path, monkeypatch):
    more = [*KEPT, f"model.pretrained.PointCloud={start}", "optim.epochs=3"]
    first = trained(small_digits, tmp_path / "whole", 1, *more)
    kill_at(monkeypatch, train_step1.main, settings(small_digits, tmp_path / "parts", 1, *more), 2)
    train_step1.main(["--resume", str(only_run(tmp_path / "parts", 1))])
    assert_same_result(tmp_path / "whole", tmp_path / "parts", 1)
    second = trained(small_digits, tmp_path / "whole", 2, *KEPT, "model.pretrained.PointCloud=none", "rdl.start=inherited")
    given = torch.load(start, weights_only=True)
    for run in (first, second):
        found = weights(run)
        clouds = {key: value for key, value in found.items() if key.startswith(".encoders.PointCloud.")}
        assert not any("head" in key for key in clouds) and len(clouds) == len(given)
        assert all(any(torch.equal(value, other) for other in given.values()) for value in clouds.values())
        assert found[".encoders.GrayImg.head.1.num_batches_tracked"] > 0


def test_a_pretrained_trunk_moves_at_its_own_rate_and_its_projection_at_the_full_one(small_digits, start, tmp_path):
    def after_one_step(factor):
        return weights(trained(small_digits, tmp_path / str(factor), 1, f"model.pretrained.PointCloud={start}",
                               f"optim.trunk_rate={factor}", "optim.learning_rate=0.01", "optim.epochs=1", "optim.batch_size=40"))

    given = torch.load(start, weights_only=True)["conv5.0.weight"]
    slow, full = after_one_step(0.1), after_one_step(1)
    for found, rate in ((slow, 0.001), (full, 0.01)):  # Adam's first step is the rate, wherever there is a gradient
        assert (found[".encoders.PointCloud.conv5.weight"] - given).abs().max() == pytest.approx(rate, rel=0.01)
    for key in (".encoders.PointCloud.head.0.weight", ".encoders.GrayImg.backbone.conv1.weight"):
        assert torch.equal(slow[key], full[key])


def test_the_weight_of_relations_is_that_of_the_other_loss(small_digits, start, tmp_path):
    def first_loss(weight):
        run = trained(small_digits, tmp_path / str(weight), 1, *KEPT[:3], f"mlm.relations={weight}", f"model.pretrained.PointCloud={start}",
                      "optim.epochs=1", "optim.batch_size=40", "optim.learning_rate=1e-12")
        return log_lines(run)[0]["loss/mlm"]

    invariance, mixed, relations = map(first_loss, (0.0, 0.25, 1.0))
    assert mixed == pytest.approx(0.75 * invariance + 0.25 * relations, rel=1e-5) and 0 < relations < invariance


def test_what_freezing_refuses(small_digits, start, tmp_path):
    for more, words in (
        (["model.freeze=[PointCloud]"], "would keep random weights"),
        (["model.freeze=[PointCloud]", f"model.pretrained.PointCloud={start}"], "head.0.weight.*model.headless"),
        (["model.freeze=[GrayImg,PointCloud]"], "no encoder to train"), (["model.freeze=[Mesh]"], "model.freeze names Mesh"),
        (["model.headless=[PointCloud]"], "has 64 dimensions"), (["mlm.relations=0.5"], "needs a frozen encoder"),
        ([*KEPT, "data.pairing=none", "data.positives=views"], "rows that are pairs"),
    ):
        with pytest.raises(UserError, match=words):
            train_step1.main(settings(small_digits, tmp_path, 1, *more))
    assert row_name(to_dict(smoke_config(small_digits, *KEPT))).endswith("P frozen, relations")
