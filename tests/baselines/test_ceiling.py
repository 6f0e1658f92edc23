"""baselines.ceiling: what it learns are the true labels, and its record says where it came from."""

import json

from stage_runs import settings

from baselines import ceiling


def test_true_labels_are_learned_and_recorded(small_digits, tmp_path, monkeypatch):
    seen = []

    class Recording(ceiling.RDLLearner):
        def __init__(self, config, samples, labels, device):
            seen.append((config, labels))
            super().__init__(config, samples, labels, device)

    monkeypatch.setattr(ceiling, "RDLLearner", Recording)
    output = tmp_path / "ceiling.json"
    ceiling.main([*settings(small_digits, tmp_path, 2, "optim.epochs=1"), "--points", "16", "32", "--output", str(output)])
    truth = [int(row.split()[-1]) for row in (small_digits / "digits_GrayImgs_train_list.txt").read_text().splitlines()]
    for points, (config, labels) in zip((16, 32), seen, strict=True):
        assert labels.labels["GrayImg"].tolist() == labels.labels["PointCloud"].tolist() == truth and labels.num_clusters == 10
        assert (config.data.num_points, config.rdl.loss, config.rdl.lambda_2, config.rdl.start) == (points, "ce", 1, "fresh")
    record = json.loads(output.read_text())
    assert {"git_sha", "cpu", "command", "seed", "settings"} <= record.keys() and list(record["by_points"]) == ["16", "32"]
    for scores in record["by_points"].values():
        assert {"accuracy/G", "accuracy/P", "map/GP", "map/PG", "map/PP", "map/GG"} <= scores.keys()
        assert all(0 <= value <= 1 for value in scores.values())
