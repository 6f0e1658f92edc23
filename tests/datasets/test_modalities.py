"""More than one pair of modalities: the eight tasks, more than two at once, several views, rows that are not pairs."""

import json

import numpy as np
import pytest
import torch
from conftest import TRAIN, add_views, write_lists
from PIL import Image
from stage_runs import labels_of, only_run, settings
from stage_runs import smoke_config as config

import evaluate
import train_step1
import train_step2
from datasets import samples
from datasets.batches import BatchSource
from datasets.kinds import KINDS
from losses import ModalityInvarianceLoss
from models import LinearClassifier
from utils.engine.learner import plan_epoch
from utils.engine.seed import BatchGenerator
from utils.errors import UserError
from utils.evaluation.metrics import chance_map, retrieval_metrics
from utils.evaluation.report import row_name
from utils.evaluation.tables import format_matrix, format_table, retrieval_table, scored_tasks
from utils.modalities import MODALITIES, Modality
from utils.settings.config import load_config, to_dict
from utils.settings.options import Step1Config, Step2Config

FOUR = "data.modalities=[RGBImg,GrayImg,PointCloud,Mesh]"


def both_stages(root, out, *more):
    train_step1.main(settings(root, out, 1, *more))
    train_step2.main(settings(root, out, 2, *more))
    return [json.loads((only_run(out, step) / "metrics.json").read_text()) for step in (1, 2)]


@pytest.mark.parametrize("two, three, tasks", [
    ("RGBImg", "PointCloud", "RP PR"), ("RGBImg", "Mesh", "RM MR"), ("GrayImg", "PointCloud", "GP PG"), ("GrayImg", "Mesh", "GM MG"),
])
def test_the_eight_tasks_from_one_key(small_digits, tmp_path, two, three, tasks):
    for scores in both_stages(small_digits, tmp_path, f"data.modalities=[{two},{three}]", "optim.epochs=2"):
        assert {key for key in scores if key.startswith("map/")} == {*(f"map/{task}" for task in tasks.split()), "map/avg", "map/chance"}
        assert all(0 < scores[f"map/{task}"] <= 1 for task in tasks.split())


def test_four_modalities_at_once(small_digits, tmp_path, capsys):
    for scores in both_stages(small_digits, tmp_path, FOUR, "optim.epochs=2", "run.figures=true"):
        paper = [f"map/{task}" for task in "RP PR RM MR GP PG GM MG".split()]
        assert scores["map/avg"] == pytest.approx(sum(scores[key] for key in paper) / 8)
        assert {"map/RG", "map/GR", "map/PM", "map/MP"} <= scores.keys()
    figures = {path.name for path in (only_run(tmp_path, 2) / "figures").iterdir()}
    assert {"retrieval_RM.png", "retrieval_PG.png", "tsne.png"} <= figures and "retrieval_PM.png" not in figures
    labels = sorted(path.name for path in labels_of(tmp_path).glob("*.txt"))
    assert len(labels) == 4
    evaluate.main(["--run", str(only_run(tmp_path, 2)), "--device", "cpu"])
    printed = capsys.readouterr().out
    assert all(f"{a}{b} " in printed for a in "RGPM" for b in "RGPM")


def test_search_within_a_modality_leaves_the_query_out():
    rows = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]])
    labels = torch.tensor([0, 1, 1, 0])
    # Ranks without the query: 0 -> 1, 3, 2 (relevant: 3, second); 1 -> 0, 3, 2 (2, third); 2 -> 3, 1, 0 (1, second); 3 -> 2, 1, 0 (0, third).
    expected = (1 / 2 + 1 / 3 + 1 / 2 + 1 / 3) / 4
    assert retrieval_metrics(rows, labels, rows, labels, exclude_self=True)["map"] == pytest.approx(expected)
    table = retrieval_table({"RGBImg": rows, "Mesh": rows}, {"RGBImg": labels, "Mesh": labels}, within=True)
    assert table["map/RR"] == pytest.approx(expected) and table["map/RM"] > expected
    alone = retrieval_table({"RGBImg": rows[:1], "Mesh": rows}, {"RGBImg": labels[:1], "Mesh": labels}, within=True)
    assert "map/RR" not in alone and "map/MM" in alone and "map/RM" in alone
    with pytest.raises(ValueError, match="exclude_self"):
        retrieval_metrics(rows, labels, rows[:3], labels[:3], exclude_self=True)


def test_tables_of_sets_of_different_size_average_the_tasks_between_2d_and_3d():
    generator = torch.Generator().manual_seed(0)
    rows = {name: torch.nn.functional.normalize(torch.randn(count, 3, generator=generator), dim=1) for name, count in (("RGBImg", 7), ("Mesh", 5), ("PointCloud", 5))}
    labels = {"RGBImg": torch.tensor([0, 0, 1, 1, 2, 2, 2]), "Mesh": torch.tensor([0, 1, 2, 2, 2]), "PointCloud": torch.tensor([0, 1, 2, 2, 1])}
    table, pairs = retrieval_table(rows, labels), [("RGBImg", "Mesh"), ("RGBImg", "PointCloud"), ("Mesh", "RGBImg"), ("PointCloud", "RGBImg")]
    assert scored_tasks(rows) == pairs and scored_tasks(["RGBImg", "GrayImg"]) == [("RGBImg", "GrayImg"), ("GrayImg", "RGBImg")]
    assert table["map/RM"] == retrieval_metrics(rows["RGBImg"], labels["RGBImg"], rows["Mesh"], labels["Mesh"])["map"]
    assert table["map/avg"] == pytest.approx(sum(table[f"map/{task}"] for task in ("RM", "RP", "MR", "PR")) / 4)
    assert table["map/chance"] == pytest.approx(sum(chance_map(labels[a], labels[b]) for a, b in pairs) / 4)
    assert table["chance/MP"] == chance_map(labels["Mesh"], labels["PointCloud"]) != table["chance/RM"]
    heads, levels = (line.split()[-7:] for line in format_table([("x", table)]).splitlines()[:2])
    chance = dict(zip(heads, levels, strict=True))
    assert chance["MP"] == f"{100 * table['chance/MP']:.1f}" != chance["avg"] == f"{100 * table['map/chance']:.1f}"
    equal = retrieval_table({name: rows[name] for name in ("Mesh", "PointCloud")}, dict.fromkeys(("Mesh", "PointCloud"), labels["Mesh"]))
    assert not any(key.startswith("chance/") for key in equal)
    lines = format_matrix({"map/RR": 0.9, "map/RP": 0.5, "map/PR": 0.25}, ["RGBImg", "PointCloud"]).splitlines()
    assert [line.split()[1:] for line in lines[1:]] == [["RR", "90.0", "RP", "50.0"], ["PR", "25.0", "-"]]
    runs = [("one", {"map/RP": 0.5, "map/avg": 0.5, "map/chance": 0.1}), ("two", {"map/RM": 0.6, "map/avg": 0.6, "map/chance": 0.3})]
    assert [line.split() for line in format_table(runs).splitlines()[1:3]] == [["chance", "10.0", "-", "10.0"], ["chance", "-", "30.0", "30.0"]]


def brightness(training, data):
    """Mean of the first channel of one epoch's gray images, normalised as the encoder gets them."""
    source = BatchSource(training, data, torch.device("cpu"))
    (plan,) = plan_epoch(source.counts, source.stored_views, source.views, TRAIN, torch.Generator().manual_seed(0))
    ((index, raw),) = source.fetch([plan])
    assert torch.equal(index, plan[0]) and torch.equal(index[0], index[1])
    return source.augment(raw, BatchGenerator(torch.Generator().manual_seed(0)))[0].mean(dim=(2, 3))[:, 0]


class Brightness(torch.nn.Module):
    def forward(self, x):
        return torch.stack([x.mean(dim=(1, 2, 3)), torch.ones(len(x))], dim=1)


def test_views_random_in_training_first_or_mean_in_evaluation(small_digits):
    add_views(small_digits, 3)
    plain = "data.augment={image_rotation_degrees: 0, image_scale: [1, 1], image_translate: 0, image_shear_degrees: 0, " \
        "image_brightness: 0, image_contrast: 0}"
    settings = config(small_digits, "data.num_views=3", plain).data
    training = samples.load_training_samples(settings, torch.device("cpu"))
    assert training.arrays["GrayImg"].shape[:2] == (TRAIN, 3) and training.arrays["PointCloud"].shape[:2] == (TRAIN, 1)
    means = brightness(training, settings)
    counts = [int(torch.isclose(means, (torch.tensor(v * 40 / 255) - 0.485) / 0.229, atol=1e-3).sum()) for v in (1, 2)]
    assert min(counts) > 4 and sum(counts) < TRAIN - 4  # all three views occur
    assert len(brightness(training, config(small_digits, "data.num_views=3", "data.train_view=first", plain).data).unique()) > 10  # only real pictures
    heads = {"GrayImg": LinearClassifier(2, 3, 1.0)}
    averaged = config(small_digits, "data.num_views=3", "data.eval_view=mean").data
    views = [torch.nn.functional.normalize(Brightness()(picture), dim=1) for picture in KINDS["image"].prepare(training.arrays["GrayImg"], averaged)]
    for data, expected in ((settings, views[0]), (averaged, torch.nn.functional.normalize(sum(views) / 3, dim=1))):
        described = samples.describe_samples({"GrayImg": Brightness()}, heads, training, data, torch.device("cpu"))
        torch.testing.assert_close(described["GrayImg"].embeddings, expected)


def test_a_missing_view_is_named(small_digits):
    add_views(small_digits, 2)
    (small_digits / "train/gray_imgs/view_01/GrayImg_train_000003.png").unlink()
    with pytest.raises(UserError, match="row 4.*view_01.*data.num_views"):
        samples.load_training_samples(config(small_digits, "data.num_views=2").data, torch.device("cpu"))


def test_gray_images_are_the_luminance_of_colour_files(small_digits):
    given = f"data.train_lists={{GrayImg: {small_digits}/digits_RGBImgs_train_list.txt}}"
    arrays = samples.load_training_samples(config(small_digits, given).data, torch.device("cpu")).arrays
    gray = arrays["GrayImg"]
    assert torch.equal(gray[:, :, 0], gray[:, :, 1]) and torch.equal(gray[:, :, 0], gray[:, :, 2])
    colour = np.asarray(Image.open(small_digits / "train/rgb_imgs/RGBImg_train_000000.png")).astype(float)
    np.testing.assert_allclose(gray[0, 0, 0].numpy(), colour @ [0.299, 0.587, 0.114], atol=1)


def test_class_pairs_may_repeat_a_picture_and_train_both_stages(small_digits, tmp_path):
    path = small_digits / "digits_GrayImgs_train_list.txt"
    rows = path.read_text().splitlines(keepends=True)
    path.write_text("".join([rows[1], rows[1], *rows[2:]]))
    with pytest.raises(ValueError, match="already in row"):
        samples.load_training_samples(config(small_digits).data, torch.device("cpu"))
    scores = both_stages(small_digits, tmp_path, "data.pairing=class", "optim.epochs=2")
    assert all("map/GP" in entry for entry in scores)
    path.write_text("".join(rows[:-1]))
    with pytest.raises(ValueError, match="same class"):
        samples.load_training_samples(config(small_digits, "data.pairing=class").data, torch.device("cpu"))


def test_unpaired_sets_of_different_size_train_both_stages(small_digits, tmp_path):
    write_lists(small_digits, "train", [None] * TRAIN)
    for split, kept in (("train", 28), ("test", 11)):
        path = small_digits / f"digits_PointCloud_{split}_list.txt"
        path.write_text("".join(path.read_text().splitlines(keepends=True)[::-1][:kept]))
    with pytest.raises(ValueError, match="rows"):
        samples.load_training_samples(config(small_digits).data, torch.device("cpu"))
    scores = both_stages(small_digits, tmp_path, "data.pairing=none", "data.positives=views", "optim.epochs=2", "run.figures=true")
    assert all("map/GP" in entry for entry in scores)
    lines = [json.loads(line) for line in (only_run(tmp_path, 1) / "metrics.jsonl").read_text().splitlines()]
    assert "agreement" not in lines[-1] and lines[-1]["clusters_used"] >= 1


def test_labels_of_a_leaky_step_1_are_not_taken_for_others(small_digits, tmp_path):
    train_step1.main(settings(small_digits, tmp_path, 1, "data.pairing=class", "optim.epochs=2"))
    with pytest.raises(ValueError, match="data.pairing: class.*this run has instance"):
        train_step2.main(settings(small_digits, tmp_path, 2))


def test_row_names_tell_what_a_reader_must_know(small_digits):
    def name(*overrides, step=1):
        return row_name(to_dict(load_config({1: Step1Config, 2: Step2Config}[step], f"configs/smoke/step{step}.yaml", overrides)))

    assert name() == "step 1, PLA (class estimator), K 6 given" and "K found" in name("pla.num_clusters=auto") and "K found, fine" in name("pla.num_clusters=fine")
    assert name("data.pairing=class").endswith("class pairs (USES LABELS)")
    assert name("data.pairing=none", "data.positives=views").endswith("no pairs") and name("data.positives=views").endswith("views as positives")
    assert name("data.dataset=modelnet10_splat").endswith("splat pictures") and name(FOUR).endswith("R+G+P+M at once")
    assert name("pla.banks=[GrayImg]").endswith("banks of GrayImg only") and name("pla.mlm_only_epochs=all") == "step 1, MLM alone (no self matching), K 6 given" and name("pla.lambda_1=0") == "step 1, MLM alone (lambda_1 = 0), K 6 given"
    assert name("data.num_views=3", "data.eval_view=mean").endswith("mean of views")
    assert name("rdl.loss=gce", step=2) == "step 2, RDL, gce instead of RCLL" and name("rdl.unclipped_epochs=2", step=2) == "step 2, RDL"
    assert name("rdl.unclipped_epochs=0", step=2) == "step 2, RDL, clipped from the start"
    assert name("pla.renormalise=false", "mlm.self_term=true").endswith("Eq. 6 as printed, Eq. 13 as printed")
    assert name("pla.symmetric_joint=true").endswith("symmetric joint") and name("mlm.self_term=on", step=2).endswith("Eq. 13 as printed")
    before = to_dict(load_config(Step2Config, "configs/smoke/step2.yaml"))
    before["rdl"] = {"lambda_2": 0.25, "warmup_epochs": 5}  # as recorded before the setting was renamed
    del before["mlm"]
    assert row_name(before) == "step 2, RDL"
    assert name("rdl.loss_scale=0.5", "rdl.loss=aue", step=2) == "step 2, RDL, aue instead of RCLL, robust loss times 0.5"


def test_a_fifth_modality_is_one_entry(small_digits, tmp_path, monkeypatch):
    entry = Modality("Sketch", "S", "RGBImgs", "rgb_imgs", "image", "ResNet18", True)
    monkeypatch.setitem(MODALITIES, "Sketch", entry)
    scores = both_stages(small_digits, tmp_path, "data.modalities=[Sketch,PointCloud]", "model.pretrained.Sketch=none", "optim.epochs=2")
    assert all("map/SP" in one and "map/PS" in one for one in scores)
    monkeypatch.setitem(MODALITIES, "Sketch", Modality("Sketch", "S", "RGBImgs", "rgb_imgs", "image", "ResNet81", True))
    with pytest.raises(KeyError, match="ResNet81"):
        both_stages(small_digits, tmp_path / "x", "data.modalities=[Sketch,PointCloud]", "model.pretrained.Sketch=none")


def test_views_as_positives_contrast_the_views_of_each_modality(small_digits):
    settings = config(small_digits, "data.positives=views", "data.views={GrayImg: 3}")
    training = samples.load_training_samples(settings.data, torch.device("cpu"))
    torch.manual_seed(0)
    learner = train_step1.PLALearner(settings, training, torch.device("cpu"))
    plan = next(plan_epoch(learner.source.counts, [1, 1], [3, 2], 8, torch.Generator().manual_seed(0)))
    ((_, raw),) = learner.source.fetch([plan])
    embeddings = learner.embed(raw, BatchGenerator(torch.Generator().manual_seed(1)))
    assert [rows.shape[:2] for rows in embeddings] == [(3, 8), (2, 8)]
    parts = [ModalityInvarianceLoss(settings.pla.tau_2)(rows) for rows in embeddings]
    torch.testing.assert_close(learner.invariance(embeddings), (parts[0] + parts[1]) / 2)
    for overrides, words in ((["data.positives=views", "data.views={GrayImg: 1}"], "at least two views.*found data.views.GrayImg = 1"), (["data.pairing=none"], "data.positives: views")):
        with pytest.raises(UserError, match=words):
            config(small_digits, *overrides)


def test_several_views_of_all_modalities_are_positives_and_weigh_as_one(small_digits):
    settings = config(small_digits, "data.views={GrayImg: 2, PointCloud: 1}")
    training = samples.load_training_samples(settings.data, torch.device("cpu"))
    learner = train_step1.PLALearner(settings, training, torch.device("cpu"))
    views = [torch.randn(2, 6, 5, dtype=torch.float64), torch.randn(1, 6, 5, dtype=torch.float64)]
    rows = torch.nn.functional.normalize(torch.cat(views), dim=2)
    total = 0.0
    for v in range(3):
        for i in range(6):
            similar = torch.exp(rows[v, i] @ rows.flatten(0, 1).T / settings.pla.tau_2).view(3, 6)
            others = sum(similar[u, i] for u in range(3) if u != v)
            total += -torch.log(others / (similar.sum() - similar[v, i])) / 6
    torch.testing.assert_close(learner.invariance(views), total * 2 / 3)


def test_batches_of_pairs_and_of_unpaired_sets():
    plan = list(plan_epoch([10, 10], [1, 3], [1, 2], 4, torch.Generator().manual_seed(0)))
    assert [(index.shape, rows.shape) for index, rows in plan] == [((2, 4), (2, 3, 4))] * 2  # one cloud and two pictures
    for index, rows in plan:
        assert torch.equal(index[0], index[1]) and torch.equal(rows[0], index[[0, 1, 1]])
        assert (rows[1, 0] == 0).all() and (rows[1, 1] != rows[1, 2]).all()  # two different pictures
    assert len(torch.cat([index[0] for index, _ in plan]).unique()) == 8
    assert len(torch.cat([rows[1, 1] for _, rows in plan]).unique()) == 3
    more = next(iter(plan_epoch([10], [2], [3], 4, torch.Generator().manual_seed(0))))[1]
    assert torch.equal(more[1, 0], more[1, 2]) and (more[1, 0] != more[1, 1]).all()  # more views than pictures: some twice
    free = torch.cat([index for index, _ in plan_epoch([4, 12], [1, 1], [1, 1], 4, torch.Generator().manual_seed(0), paired=False)], dim=1)
    assert free.shape == (2, 12) and sorted(free[1].tolist()) == list(range(12))
    assert torch.bincount(free[0]).tolist() == [3, 3, 3, 3] and not torch.equal(free[0, :4], free[1, :4])
