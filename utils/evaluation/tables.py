"""Cross-modal retrieval scores of every task, and their printed table; of RoMo the only scores that test labels enter."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import permutations

from torch import Tensor

from utils.engine import distributed
from utils.evaluation.anchors import Anchors
from utils.evaluation.features import REPRESENTATIONS, Features
from utils.evaluation.metrics import RANKINGS, chance_map, retrieval_metrics
from utils.modalities import MODALITIES, task_name

ANCHORED = "anchored"  # embeddings by way of the training objects, see `utils.evaluation.anchors`
VARIANTS = {  # name -> what is compared, and how a query's list is made of it
    name if ranking == "plain" else f"{name}, {ranking}": (name, ranking) for name in (*REPRESENTATIONS, ANCHORED) for ranking in RANKINGS
}


def retrieval_table(
    embeddings: Mapping[str, Tensor], labels: Mapping[str, Tensor], within: bool = False, ranking: str = "plain"
) -> dict[str, float]:
    """Score every ordered pair of different modalities.

    Args:
        embeddings: modality -> (N, D), rows of `Features.represent`, compared by dot products; N may differ between modalities.
        labels: modality -> (N,) int64 ground truth.
        within: also search each modality of two or more items with itself, "map/RR" ..., where no query may find itself.
        ranking: "plain" or "diffusion", see `retrieval_metrics`.
    Returns:
        "map/RP", "r@1/RP", "r@5/RP", "r@10/RP", "ndcg/RP" ... for every task, fractions; "map/avg", the mean mAP over
        the paper's tasks (one side 2D, the other 3D), and "map/chance", the expected mAP of a random ranking there; where that of
        tasks differs, also "chance/RP" ...
    """
    table = {}
    pairs = list(permutations(embeddings, 2))
    for query, gallery in pairs + [(name, name) for name in embeddings if within and len(embeddings[name]) > 1]:
        scores = retrieval_metrics(
            embeddings[query], labels[query], embeddings[gallery], labels[gallery], exclude_self=query == gallery,
            ranking=ranking, similarity="dot",
        )
        table.update({f"{metric}/{task_name(query, gallery)}": value for metric, value in scores.items()})
    chances = {task_name(query, gallery): chance_map(labels[query], labels[gallery]) for query, gallery in pairs}
    tasks = [task_name(*pair) for pair in scored_tasks(embeddings)]
    table["map/avg"] = sum(table[f"map/{task}"] for task in tasks) / len(tasks)
    table["map/chance"] = sum(chances[task] for task in tasks) / len(tasks)
    return table | ({f"chance/{task}": level for task, level in chances.items()} if len({*chances.values()}) > 1 else {})


def score_variants(
    features: Mapping[str, Features], labels: Mapping[str, Tensor], anchors: Anchors | None = None
) -> dict[str, dict[str, float]]:
    """Return name of VARIANTS -> "map/RP" ... and "map/avg"; without `anchors` of the training set none that needs them."""
    scores, rows = {}, {kind: {name: values.represent(kind) for name, values in features.items()} for kind in REPRESENTATIONS}
    if anchors:
        rows[ANCHORED] = {name: anchors.place(name, values.embeddings) for name, values in features.items()}
    for variant, (kind, ranking) in VARIANTS.items():
        if kind not in rows:
            continue
        table = retrieval_table(rows[kind], labels, ranking=ranking)
        scores[variant] = {key: value for key, value in table.items() if key.startswith("map/") and key != "map/chance"}
    return scores


class Evaluator:
    """Scores a test set; describes it once per call and keeps the last features for figures.

    Args:
        describe: gives modality -> Features with the current weights.
        labels: modality -> (N,) int64 ground truth.
        representation, ranking: what the scores of a call are of, see `Features.represent` and `retrieval_metrics`.
    """

    def __init__(
        self, describe: Callable[[], dict[str, Features]], labels: Mapping[str, Tensor], representation: str = "embedding",
        ranking: str = "plain",
    ) -> None:
        self.describe, self.labels = describe, labels
        self.representation, self.ranking = representation, ranking
        self._features: dict[str, Features] | None = None

    def __call__(self) -> dict[str, float]:
        """Describe the test set, in all processes together, and return `retrieval_table`, which the main one works out."""
        self._features = None
        rows = self.rows
        return distributed.from_main(lambda: retrieval_table(rows, self.labels, ranking=self.ranking))

    @property
    def features(self) -> dict[str, Features]:
        """What the last call described; described now if there was none, as when a finished run is resumed."""
        if self._features is None:
            self._features = self.describe()
        return self._features

    @property
    def rows(self) -> dict[str, Tensor]:
        """The compared rows of `features`."""
        return {name: values.represent(self.representation) for name, values in self.features.items()}


def scored_tasks(modalities: Iterable[str]) -> list[tuple[str, str]]:
    """Return the (query, gallery) pairs of which one is 2D and the other 3D, the paper's tasks; without any, all pairs."""
    pairs = list(permutations(modalities, 2))
    return [pair for pair in pairs if MODALITIES[pair[0]].is_2d != MODALITIES[pair[1]].is_2d] or pairs


def align(rows: Sequence[Sequence[object]]) -> str:
    """Return rows of cells as lines of text: the first column to the left, the others to the right."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in cells)


def format_matrix(scores: Mapping[str, float], modalities: Sequence[str]) -> str:
    """Return the M x M table of mAP@All in percent of one run: a line per query modality, a column per gallery modality.

    Args:
        scores: of `retrieval_table`; a task that is not there is shown as "-".
        modalities: in the order wanted.
    """
    rows = [["query \\ gallery", *modalities]]
    for query in modalities:
        tasks = [task_name(query, gallery) for gallery in modalities]
        rows.append([query, *(f"{task} {100 * scores[f'map/{task}']:.1f}" if f"map/{task}" in scores else "-" for task in tasks)])
    return align(rows)


def format_table(rows: Sequence[tuple[str, Mapping[str, float]]]) -> str:
    """Return a text table of mAP@All in percent: one line per (name, scores of `retrieval_table`), chance level first."""
    cross = lambda key: key.startswith("map/") and not (len(key) == 6 and key[4] == key[5])
    keys = dict.fromkeys(key for _, scores in rows for key in scores if cross(key))  # tasks differ between runs
    columns = [*(key for key in keys if key not in ("map/avg", "map/chance")), "map/avg"]
    chances: dict[float, dict[str, float]] = {}  # test sets differ: one line each
    for _, scores in rows:
        of_task = lambda key, scores=scores: scores.get(key.replace("map/", "chance/"), scores["map/chance"])
        chances.setdefault(scores["map/chance"], {}).update({key: of_task(key) for key in columns if key in scores})
    lines = [["mAP@All [%]", *(key.removeprefix("map/") for key in columns)]]
    for name, scores in [*(("chance", found) for found in chances.values()), *rows]:
        lines.append([name, *(f"{100 * scores[key]:.1f}" if key in scores else "-" for key in columns)])
    return align(lines)
