"""Scores of a method's codes: mAP@All by cosine of the continuous code, and of hash methods by their signs as well."""

from collections.abc import Mapping

from torch import Tensor
from torch.nn import functional as F

from utils.evaluation.metrics import mean_average_precision
from utils.evaluation.tables import retrieval_table, scored_tasks
from utils.modalities import task_name

SHUFFLES = 10  # of the gallery, whose order decides between equal similarities: L-bit codes have L + 1 of them


def score_codes(codes: Mapping[str, Tensor], labels: Mapping[str, Tensor], signs: bool) -> dict[str, float]:
    """Return `retrieval_table` of the codes and, if asked, "sign/RP" ..., "sign/avg": mAP of the sign codes, mean over the shuffles.

    Args:
        codes: modality -> (N, L) continuous codes of any norm; labels: modality -> (N,) int64.
        signs: rank by sign codes too; a zero counts as -1.
    """
    table = retrieval_table({name: F.normalize(rows.double(), dim=1) for name, rows in codes.items()}, labels)
    if not signs:
        return table
    binary = {name: (rows > 0).double() * 2 - 1 for name, rows in codes.items()}
    pairs = scored_tasks(codes)
    for query, gallery in pairs:
        found = [
            mean_average_precision(binary[query], labels[query], binary[gallery], labels[gallery], seed=seed) for seed in range(SHUFFLES)
        ]
        table[f"sign/{task_name(query, gallery)}"] = sum(found) / SHUFFLES
    table["sign/avg"] = sum(table[f"sign/{task_name(*pair)}"] for pair in pairs) / len(pairs)
    return table
