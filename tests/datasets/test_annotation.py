"""datasets.annotation and the posteriors beside pseudo-labels: whose belief counts, and what files are refused."""

import numpy as np
import pytest
import torch

from datasets.annotation import Annotation, measure_reliability
from datasets.pseudo_labels import read_own_ids, read_posteriors, write_posteriors
from datasets.samples import PairedSamples
from models.heads import LinearClassifier
from utils.errors import UserError
from utils.settings.data_options import DataConfig

BELIEFS = {
    "GrayImg": torch.tensor([[0.9, 0.1], [0.4, 0.6], [0.6, 0.4]]), "PointCloud": torch.tensor([[0.7, 0.3], [0.8, 0.2], [0.1, 0.9]]),
}


@pytest.mark.parametrize("method,image,cloud", [
    ("none", [0, 1, 0], [0, 0, 1]),  # each by itself
    ("mean", [0, 0, 1], [0, 0, 1]),
    ("trusted", [0, 1, 0], [0, 1, 0]),  # odds 19 : 1 for the image
])
def test_whose_belief_counts(method, image, cloud):
    found = Annotation.of(BELIEFS, method, {"GrayImg": 0.95, "PointCloud": 0.5}, paired=True)
    assert (found.ids["GrayImg"].tolist(), found.ids["PointCloud"].tolist()) == (image, cloud)
    assert found.agreement == pytest.approx(1 / 3)  # before fusing
    assert (found.own["GrayImg"].tolist(), found.own["PointCloud"].tolist()) == ([0, 1, 0], [0, 0, 1])
    for name, rows in found.posteriors.items():
        assert rows.argmax(1).tolist() == found.ids[name].tolist()
    other = found.with_ids(torch.tensor([1, 1, 1]))
    assert other.ids["PointCloud"].tolist() == [1, 1, 1] and other.posteriors is found.posteriors
    unpaired = Annotation.of({"GrayImg": BELIEFS["GrayImg"], "Mesh": torch.tensor([[0.3, 0.7]])}, "none", {}, paired=False)
    assert unpaired.agreement is None and [len(ids) for ids in unpaired.ids.values()] == [3, 1]


def test_features_are_reliable_as_far_as_their_views_agree():
    data = DataConfig(modalities=("GrayImg", "PointCloud"), features={"GrayImg": 2, "PointCloud": 2})
    one, other = torch.eye(2)[[0, 1, 0, 1]], torch.eye(2)[[0, 1, 1, 1]]  # a view of each of four samples
    arrays = {"GrayImg": torch.stack([one, other], dim=1), "PointCloud": torch.stack([one, one], dim=1)}
    identity = dict.fromkeys(arrays, torch.nn.Identity())
    heads = dict.fromkeys(arrays, LinearClassifier(2, 2, 1.0))
    heads["GrayImg"].start_from(torch.eye(2))
    measure = lambda arrays: measure_reliability(identity, heads, PairedSamples({}, arrays), data, torch.device("cpu"), 0)
    assert measure(arrays) == pytest.approx({"GrayImg": 0.5, "PointCloud": 1.0})  # (3/4 - 1/2) / (1 - 1/2)
    assert measure({**arrays, "PointCloud": one[:, None]}) == {}
    assert Annotation.of(BELIEFS, "trusted", {}, True).ids["GrayImg"].tolist() == [0, 0, 1]  # as "mean"


def test_posteriors_come_back_and_strange_files_are_refused(tmp_path):
    path, beliefs = tmp_path / "p.npz", {name: rows.numpy() for name, rows in BELIEFS.items()}
    assert read_own_ids(path, "GrayImg") is None
    write_posteriors(path, beliefs, {"GrayImg": np.array([1, 0, 1])}, "run-1")
    assert read_own_ids(path, "GrayImg").tolist() == [1, 0, 1] and read_own_ids(path, "Mesh") is None
    read = lambda **change: read_posteriors(
        **{"path": path, "modalities": list(beliefs), "run_id": "run-1", "count": 3, "num_clusters": 2, **change})
    assert all(np.array_equal(read()[name], rows) for name, rows in beliefs.items())
    for change, words in (
        ({"run_id": "run-2"}, "is of run run-1, the pseudo-labels beside it of run-2"), ({"count": 4}, r"expected posteriors \(4, 2\)"),
        ({"modalities": ["Mesh"]}, "not the posteriors of Mesh"), ({"path": tmp_path / "no.npz"}, "not found"),
    ):
        with pytest.raises(UserError, match=words):
            read(**change)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match="not the posteriors of"):
        read()
