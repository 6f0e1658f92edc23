"""Figures 3, 4 and 5 from the records of clean runs; each function returns False, and draws nothing, without any."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from statistics import mean

import numpy as np

from experiments.records import Table
from experiments.summary import estimate, summarize
from utils.figures.plots import STYLE, new_figure, save_figure


@contextlib.contextmanager
def panels(path: Path, count: int, width: float, height: float, **options: object) -> Iterator[np.ndarray]:
    """Axes side by side, with grid and legend; saved at the end."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        figure = new_figure(width, height)
        axes = np.atleast_1d(figure.subplots(1, count, **options))
        yield axes
        for axis in axes:
            axis.grid(alpha=0.25)
            axis.legend(frameon=False, fontsize=9)
        save_figure(figure, path)


def draw_shapes(table: Table, path: Path) -> bool:
    """Draw loss and absolute slope against p (Figure 3), both on a logarithmic scale, since the losses' scales differ."""
    for found in (record["measured"] for record in table.trusted()[-1:]):
        with panels(path, 2, 11, 4.5) as axes:
            for axis, key, title in zip(axes, ("loss", "slope"), ("loss L(p)", "|dL / dp|")):
                for name, curve in found["curves"].items():
                    values = np.abs(curve[key])
                    shown = np.where(values > 0, values, np.nan)  # no slope at all below RCLL's clip level: a gap
                    axis.plot(found["p"], shown, label=name, linewidth=2.4 if name.startswith("RCLL") else 1.3)
                axis.axvline(1 / found["num_clusters"], color="0.5", linestyle=":", linewidth=1)
                axis.set(title=title, xlabel="p, probability of the pseudo-label (dotted: 1/K)", yscale="log", ylim=(1e-2, 1e2))
    return bool(table.trusted())


def draw_sensitivity(table: Table, path: Path) -> bool:
    """Draw mAP against the value of each grid (Figure 4), one panel per grid, bars for one standard deviation over seeds."""
    points: dict[str, dict[str, list[tuple]]] = {}  # grid -> task -> value, mean, deviation
    for entry in summarize(table):
        for task, seeds in entry.scores.items() if "grid" in entry.options else ():
            found, lines = estimate(list(seeds.values())), points.setdefault(entry.options["grid"], {})
            lines.setdefault(task, []).append((entry.options["value"], 100 * found.mean, 100 * (found.std or 0)))
    if points:
        with panels(path, len(points), 5.5 * len(points), 4.2, sharey=True) as axes:
            for axis, (grid, lines) in zip(axes, points.items()):
                for task, entries in lines.items():
                    x, y, spread = zip(*sorted(entries))
                    axis.errorbar(x, y, yerr=spread, label=task, marker="o", markersize=3, linewidth=2.4 if task == "avg" else 1.3)
                axis.set(title=grid, xlabel=grid, ylabel="mAP@All (%)", xscale="log")
    return bool(points)


def draw_curves(table: Table, path: Path) -> bool:
    """Draw mAP over the epochs of step 2 (Figure 5): the mean over seeds and pairs, a band of one deviation over seeds.

    A seed whose pairs are not all there is left out.
    """
    lines = {}
    for row in dict.fromkeys(entry.name for entry in summarize(table)):
        seeds = [[table.shown.get((row, pair, seed)) for pair in table.pairs] for seed in sorted({seed for _, _, seed in table.shown})]
        seeds = [[record["curve"] for record in found] for found in seeds if not any(map(table.fault, found))]
        if seeds:
            scores = 100 * np.array([[mean(point) for point in zip(*(curve["map/avg"] for curve in curves))] for curves in seeds])
            lines[row] = seeds[0][0]["epoch"], scores.mean(axis=0), scores.std(axis=0, ddof=1) if len(scores) > 1 else 0
    if lines:
        with panels(path, 1, 8, 4.8) as (axis,):
            for name, (epochs, center, spread) in lines.items():
                (line,) = axis.plot(epochs, center, label=name, linestyle="-" if "=" in name else "--", linewidth=1.6)
                axis.fill_between(epochs, center - spread, center + spread, color=line.get_color(), alpha=0.15, linewidth=0)
            axis.set(title=table.options["title"], xlabel="epoch of step 2", ylabel="mAP@All (%)")
    return bool(lines)
