"""End of a run: the score table on screen and in metrics.json, and the figures."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from utils.engine.checkpoint import LAST
from utils.engine.run_log import STARTS, RunLog
from utils.evaluation.tables import Evaluator, format_table, score_variants, scored_tasks
from utils.figures.contact_sheet import draw_retrieval
from utils.figures.plots import plot_curves, plot_tsne
from utils.figures.thumbnails import thumbnail
from utils.files import atomic_write_json, read_json
from utils.modalities import MODALITIES, task_name

PANEL_QUERIES, PANEL_RANKS = 8, 5
LABEL_NOTE = "pseudo_labels.json"  # in a run folder of step 2: whose labels it learned from


def report_pretrained(run: RunLog, reports: Mapping[str, Any]) -> None:
    """Log which initial weights each modality got; every key goes to RUN/initial_weights.json.

    Args:
        reports: modality -> models.pretrained.LoadReport, for the modalities that do not start random.
    """
    if not reports:
        run.log("initial weights: random for every modality (model.pretrained: none)")
    for name, report in reports.items():
        run.log(f"initial weights of {name}: {report.summary()}; keys in initial_weights.json")
    if run.writes:
        atomic_write_json(run.folder / "initial_weights.json", {name: vars(report) for name, report in reports.items()})


def row_name(config: Mapping[str, Any]) -> str:
    """Name a table row by what was trained, with whatever a reader must know; runs on different pairs of modalities share it.

    Args:
        config: settings as nested dictionaries (`utils.settings.config.to_dict`); keys that an older run lacks count as their defaults.
    """
    if "rdl" in config:
        name = "step 2, RDL" if config["rdl"]["lambda_2"] > 0 else "step 2, MLM alone (lambda_2 = 0)"
    else:
        pla, epochs = config["pla"], config["optim"]["epochs"]
        unmatched = pla.get("mlm_only_epochs") in ("all", epochs)
        alone = "lambda_1 = 0" if pla["lambda_1"] == 0 else "no self matching" if unmatched else ""
        name = f"step 1, MLM alone ({alone})" if alone else f"step 1, PLA ({pla['estimator']} estimator)"
    return ", ".join([name, *(text for told, text in _remarks(config) if told)])


def _remarks(config: Mapping[str, Any]) -> Iterator[tuple[Any, str]]:
    """Yield what a reader must know of a run, with whether it holds; settings that an older run lacks have their old meaning."""
    data, model, pla, rdl, scores = (config.get(section, {}) for section in ("data", "model", "pla", "rdl", "eval"))
    if rdl.get("lambda_2"):
        loss, unclipped = rdl.get("loss", "rcll"), rdl.get("unclipped_epochs", rdl.get("warmup_epochs"))  # its earlier name
        yield loss != "rcll", f"{loss} instead of RCLL"
        yield loss == "rcll" and not unclipped, "clipped from the start"
        yield rdl.get("loss_scale", 1) != 1, f"robust loss times {rdl.get('loss_scale', 1):g}"
    yield pla.get("start") or rdl.get("start") == "inherited", "from the encoders of the run before"
    yield pla, clusters_of(pla.get("num_clusters"))
    yield pla.get("symmetric_joint"), "symmetric joint"
    yield not pla.get("renormalise", True), "Eq. 6 as printed"
    yield pla.get("banks") is not None, f"banks of {'+'.join(pla.get('banks') or []) or 'no modality'} only"
    yield config.get("mlm", {}).get("self_term"), "Eq. 13 as printed"
    frozen = "+".join(MODALITIES[entry].letter for entry in model.get("freeze", ()))
    given = [(name, model.get("pretrained", {}).get(name, "none")) for name in data["modalities"] if rdl.get("start") != "inherited"]
    starts = [f"{MODALITIES[name].letter} from {_start_name(source)}" for name, source in given if source != "none"]
    yield starts, ", ".join(starts)
    yield model.get("reads_labels"), f"READS LABELS ({model.get('reads_labels')})"
    yield frozen, f"{frozen} frozen" + (", relations" if config.get("mlm", {}).get("relations") else "")
    yield len(data["modalities"]) > 2, "+".join(MODALITIES[entry].letter for entry in data["modalities"]) + " at once"
    yield "_splat" in data["dataset"], "splat pictures"
    pairing = data.get("pairing", "instance")
    yield pairing != "instance", {"class": "class pairs (USES LABELS)", "none": "no pairs"}.get(pairing, "")
    yield pairing == "instance" and data.get("positives", "modalities") != "modalities", "views as positives"
    yield data.get("num_views", 1) > 1 and data.get("eval_view", "first") != "first", "mean of views"
    yield scores.get("representation", "embedding") != "embedding", f"by {scores.get('representation')}"
    yield scores.get("ranking", "plain") != "plain", f"by {scores.get('ranking')}"


def clusters_of(number: int | str) -> str:
    """Say how `pla.num_clusters` came about."""
    return {"auto": "K found", "fine": "K found, fine"}.get(number, f"K {number} given")


def _start_name(source: str) -> str:
    """Name a weight file, or of a run (or its last.pt) data set and stage, so that seeds with starts of their own share a row."""
    parts = Path(source).parts
    parts = parts[:-1] if parts[-1] == LAST else parts
    return "/".join(parts[-3:-1]) if len(parts) > 2 and parts[-2] in STARTS else parts[-1]


def finish(run: RunLog, evaluator: Evaluator | None, arrays: Mapping[str, Tensor], figures: bool) -> None:
    """Print the scores and draw the figures of a finished run, in the main process; all processes must call it.

    Args:
        evaluator: of the test set, None without one; arrays: its samples, for thumbnails.
    """
    features = evaluator.features if evaluator else {}
    epochs = run.read_epochs()
    if not run.writes:
        return
    if not epochs:
        run.log(f"metrics.jsonl of {run.folder} is gone; scores: python evaluate.py --run {run.folder}")
        return
    write_scores(run, epochs, score_variants(features, evaluator.labels) if evaluator else {})
    if figures:
        plot_curves(epochs, run.folder / "figures" / "curves.png", _mark(run))
        if evaluator:
            draw_figures(run, evaluator.rows, evaluator.labels, arrays)
        run.log(f"figures in {run.folder / 'figures'}")


def write_scores(run: RunLog, epochs: list[dict[str, Any]], variants: Mapping[str, Mapping[str, float]]) -> None:
    """Print the last epoch's table, if it has scores, and write metrics.json. The best epoch by test score is `oracle` only.

    Args:
        epochs: lines of metrics.jsonl; variants: of `score_variants`, empty without a test set.
    """
    last = epochs[-1]
    name, oracle = row_name(run.config()), {}
    if "map/avg" in last:
        best = max((row for row in epochs if "map/avg" in row), key=lambda row: row["map/avg"])
        run.log(format_table([(name, last)]))
        run.log(
            f"oracle, not a result (best epoch chosen with test labels, as in the authors' release): "
            f"{100 * best['map/avg']:.1f} at epoch {best['epoch']}"
        )
        oracle = {"oracle": {"map/avg": best["map/avg"], "epoch": best["epoch"]}}
    scores = {key: value for key, value in last.items() if not key.startswith(("loss/", "seconds/", "memory/"))}
    facts = {"row": name, "selection": "last epoch", "peak_mib": last.get("memory/peak_mib"), **oracle, **label_note(run)}
    atomic_write_json(run.folder / "metrics.json", {**scores, **facts, **({"variants": variants} if variants else {})})


def label_note(run: RunLog) -> dict[str, Any]:
    """Return, for metrics.json, what a run says of ground truth that its start has read, and of the pseudo-labels it learned from."""
    path, read = run.folder / LABEL_NOTE, run.config().get("model", {}).get("reads_labels")
    return ({"reads_labels": read} if read else {}) | ({"pseudo_labels": read_json(path)} if path.is_file() else {})


def draw_figures(run: RunLog, embeddings: Mapping[str, Tensor], labels: Mapping[str, Tensor], arrays: Mapping[str, Tensor]) -> None:
    """Write tsne.png and one retrieval_<task>.png per task of `scored_tasks` into RUN/figures.

    Args:
        embeddings: modality -> (N, D) of the test set.
        labels: modality -> (N,) ground truth, for colours and frames.
        arrays: modality -> (N, V, ...), as in `datasets.samples`, for thumbnails; modalities of features get no panel.
    """
    folder = run.folder / "figures"
    labels = {name: values.numpy() for name, values in labels.items()}
    if min(map(len, labels.values())) > 1:
        plot_tsne({name: rows.cpu().numpy() for name, rows in embeddings.items()}, labels, folder / "tsne.png", _mark(run))
    for query, gallery in scored_tasks(embeddings):
        if arrays[query].dim() == 3 or arrays[gallery].dim() == 3:  # features show nothing
            continue
        title = f"{task_name(query, gallery)}: {query} query, {gallery} gallery{_mark(run)}"
        _draw_panel(query, gallery, embeddings, labels, arrays, folder / f"retrieval_{task_name(query, gallery)}.png", title)


def _mark(run: RunLog) -> str:
    """What the titles of a run's figures end with."""
    return ", READS LABELS" * bool(run.config().get("model", {}).get("reads_labels"))


def _draw_panel(query: str, gallery: str, embeddings, labels: Mapping[str, np.ndarray], arrays, path, title: str) -> None:
    """Top-5 panel for queries spread evenly over the test set."""
    chosen = np.linspace(0, len(labels[query]) - 1, min(PANEL_QUERIES, len(labels[query]))).astype(int)
    scores = (embeddings[query][chosen] @ embeddings[gallery].T).cpu().numpy()
    ranks = np.argsort(-scores, axis=1, kind="stable")[:, :PANEL_RANKS]
    show = lambda name, row: thumbnail(name, arrays[name][row, 0].cpu().numpy())
    draw_retrieval(
        [show(query, row) for row in chosen],
        {int(row): show(gallery, row) for row in np.unique(ranks)},
        ranks, labels[gallery][ranks] == labels[query][chosen][:, None], path, title=title,
    )
