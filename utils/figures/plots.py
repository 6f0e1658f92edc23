"""Figures of a run, PNGs drawn without a display; matplotlib and scikit-learn are imported on first use only."""

from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_TSNE_ROWS = 1000
MAX_LEGEND = 60  # classes by name
MARKERS = "o^sDvP"
STYLE = {"font.size": 10, "axes.titlesize": 11, "axes.titleweight": "bold", "axes.spines.top": False, "axes.spines.right": False}


def new_figure(width: float, height: float) -> "Figure":
    """Return an empty figure of this size in inches, which needs no display and none of pyplot's global state."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: "Figure", path: str | Path) -> None:
    """Write the figure as a PNG, making its folder if need be."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _draw_lines(axis: Any, epochs: Sequence[Mapping[str, Any]], prefix: str, scale: float) -> None:
    """Draw one line per key that starts with `prefix`; epochs without it leave no point."""
    keys = [key for key in dict.fromkeys(chain(*epochs)) if key.startswith(prefix) and key != "map/chance"]
    for key in keys:
        points = [(entry["epoch"], scale * entry[key]) for entry in epochs if entry.get(key) is not None]
        width = 2.4 if key == prefix or key.endswith(("avg", "total")) else 1.3
        axis.plot(*zip(*points), label=key.removeprefix(prefix).lstrip("/") or key, marker="o", markersize=3, linewidth=width)
    if keys:
        axis.legend(frameon=False, fontsize=9)
    axis.grid(alpha=0.25)


def plot_curves(epochs: Sequence[Mapping[str, Any]], path: str | Path, mark: str = "") -> None:
    """Draw losses (keys that start with "loss") above mAP in percent (keys that start with "map") over the epochs of a run.

    Args:
        epochs: lines of metrics.jsonl, at least one, each with "epoch"; mAP as fractions. The "map/chance" of a random ranking in
            the last one is drawn dashed. mark: behind the title.
    """
    import matplotlib
    from matplotlib.ticker import MaxNLocator

    with matplotlib.rc_context(STYLE):
        figure = new_figure(8, 6)
        losses, maps = figure.subplots(2, 1, sharex=True)
        _draw_lines(losses, epochs, "loss", 1.0)
        if "map/chance" in epochs[-1]:
            maps.axhline(100 * epochs[-1]["map/chance"], color="0.5", linestyle="--", linewidth=1, label="chance")
        _draw_lines(maps, epochs, "map", 100.0)
        losses.set_title(f"Training losses{mark}", loc="left")
        losses.set_ylabel("loss")
        maps.set_title("Cross-modal retrieval on the test split", loc="left")
        maps.set(xlabel="epoch", ylabel="mAP@All (%)", xlim=(epochs[0]["epoch"] - 0.5, epochs[-1]["epoch"] + 0.5))
        maps.xaxis.set_major_locator(MaxNLocator(integer=True))
        save_figure(figure, path)


def _class_colors(classes: np.ndarray) -> dict[int, Any]:
    import matplotlib

    count = len(classes)
    short = matplotlib.colormaps["tab10" if count <= 10 else "tab20"].colors
    return dict(zip(classes.tolist(), short if count <= 20 else matplotlib.colormaps["turbo"](np.linspace(0, 1, count))))


def _project(rows: Sequence[np.ndarray]) -> np.ndarray:
    """t-SNE of all modalities together on unit rows, M x (n, D) -> (sum of n, 2)."""
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    rows = np.concatenate([np.asarray(values, dtype=np.float64) for values in rows])
    rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    perplexity = min(30.0, max(1.0, (len(rows) - 1) / 3))
    with threadpool_limits(limits=1):  # threads that compete for few cores make it many times slower
        return TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(rows)


def plot_tsne(embeddings: Mapping[str, np.ndarray], labels: Mapping[str, np.ndarray], path: str | Path, mark: str = "") -> None:
    """Draw a joint t-SNE of the common space, at most 1,000 objects per modality: colour is the class, marker the modality.

    Args:
        embeddings: modality -> (N, D) array, both at least 2; N may differ.
        labels: modality -> (N,) integer classes.
        mark: behind the title.
    """
    import matplotlib
    from matplotlib.lines import Line2D

    keep = {name: np.sort(np.random.default_rng(0).permutation(len(rows))[:MAX_TSNE_ROWS]) for name, rows in embeddings.items()}
    points = _project([embeddings[name][rows] for name, rows in keep.items()])
    clouds = np.split(points, np.cumsum([len(rows) for rows in keep.values()])[:-1])
    labels = {name: labels[name][rows] for name, rows in keep.items()}
    colors = _class_colors(np.unique(np.concatenate(list(labels.values()))))
    with matplotlib.rc_context(STYLE):
        figure = new_figure(8.5, 7)
        axis = figure.subplots()
        for marker, cloud, values in zip(MARKERS, clouds, labels.values()):
            shades = [colors[int(label)] for label in values]
            axis.scatter(*cloud.T, c=shades, marker=marker, s=16, alpha=0.75, linewidths=0.3, edgecolors="white")
        axis.set_axis_off()
        axis.set_title(f"t-SNE of the common space{mark}", loc="left")
        handles = [Line2D([], [], color="0.3", marker=marker, linestyle="", label=name) for marker, name in zip(MARKERS, labels)]
        shown = colors if len(colors) <= MAX_LEGEND else {f"{len(colors)} classes": "0.7"}
        handles += [Line2D([], [], color=color, marker="s", linestyle="", label=str(label)) for label, color in shown.items()]
        columns = 1 + (len(handles) - 1) // 30
        figure.legend(handles=handles, loc="outside right upper", frameon=False, ncols=columns)
        save_figure(figure, path)
