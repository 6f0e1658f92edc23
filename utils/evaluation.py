"""Cross-modal retrieval scores of every task, and their printed table. The only place where test labels are used."""

from collections.abc import Mapping, Sequence
from itertools import permutations

from torch import Tensor

from utils.metrics import chance_map, retrieval_metrics
from utils.modalities import MODALITIES, task_name


def retrieval_table(embeddings: Mapping[str, Tensor], labels: Tensor) -> dict[str, float]:
    """Score every ordered pair of different modalities.

    Args:
        embeddings: modality -> (N, D); row i of every modality is one object.
        labels: (N,) int64 ground truth.
    Returns:
        "map/RP", "r@1/RP", "r@5/RP", "r@10/RP", "ndcg/RP" ... for every task, fractions; "map/avg", the mean mAP over
        the paper's tasks (one side 2D, the other 3D), and "map/chance", the expected mAP of a random ranking.
    """
    table, paper_tasks = {}, []
    for query, gallery in permutations(embeddings, 2):
        scores = retrieval_metrics(embeddings[query], labels, embeddings[gallery], labels)
        task = task_name(query, gallery)
        table.update({f"{metric}/{task}": value for metric, value in scores.items()})
        if MODALITIES[query].is_2d != MODALITIES[gallery].is_2d:
            paper_tasks.append(scores["map"])
    scored = paper_tasks or [value for key, value in table.items() if key.startswith("map/")]
    table["map/avg"] = sum(scored) / len(scored)
    table["map/chance"] = chance_map(labels, labels)
    return table


def format_table(rows: Sequence[tuple[str, Mapping[str, float]]]) -> str:
    """Return a text table of mAP@All in percent: one line per (name, scores of `retrieval_table`), chance level first."""
    keys = dict.fromkeys(key for _, scores in rows for key in scores if key.startswith("map/"))  # tasks differ between runs
    columns = [*(key for key in keys if key not in ("map/avg", "map/chance")), "map/avg"]
    chance = {key: next(scores["map/chance"] for _, scores in rows if key in scores) for key in columns}
    width = max(len(name) for name, _ in [*rows, ("chance", {})])
    lines = ["mAP@All [%]".ljust(width) + "".join(key.removeprefix("map/").rjust(8) for key in columns)]
    for name, scores in [("chance", chance), *rows]:
        cells = (f"{100 * scores[key]:.1f}" if key in scores else "-" for key in columns)
        lines.append(name.ljust(width) + "".join(cell.rjust(8) for cell in cells))
    return "\n".join(lines)
