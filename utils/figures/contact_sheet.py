"""Draws contact sheets: blocks of rows of small pictures, e.g. one row per object and one column per modality."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from utils.figures.plots import STYLE, new_figure, save_figure

TILE_INCHES, MARGIN_INCHES = 1.0, 1.1
RIGHT, WRONG = "#1a9850", "#d73027"


@dataclass(frozen=True)
class Tile:
    """One picture: (H, W, 3) uint8, or None for an empty field; a caption below it; a red frame if `wrong`, green if `right`."""

    image: np.ndarray | None
    caption: str = ""
    wrong: bool = False
    right: bool = False


@dataclass(frozen=True)
class Block:
    """A part of the sheet: its title, and per row, at least one, the text on its left and one tile per column."""

    title: str
    rows: Sequence[tuple[str, Sequence[Tile]]]


def draw_contact_sheet(title: str, columns: Sequence[str], blocks: Sequence[Block], path: str | Path) -> None:
    """Draw at least one block, side by side, into a PNG."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        height = TILE_INCHES * max(len(block.rows) for block in blocks)
        figure = new_figure(len(blocks) * (TILE_INCHES * len(columns) + MARGIN_INCHES), height + MARGIN_INCHES)
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
        for part, block in zip(figure.subfigures(1, len(blocks), squeeze=False)[0], blocks):
            part.suptitle(block.title, fontsize=11)
            axes = part.subplots(len(block.rows), len(columns), squeeze=False)
            for axis, name in zip(axes[0], columns):
                axis.set_title(name, fontsize=9, fontweight="normal", pad=4)
            for line, (text, tiles) in zip(axes, block.rows):
                line[0].set_ylabel(text, rotation=0, ha="right", va="center", fontsize=8)
                for axis, tile in zip(line, tiles, strict=True):
                    _draw_tile(axis, tile)
        save_figure(figure, path)


def draw_retrieval(
    queries: Sequence[np.ndarray], gallery: Mapping[int, np.ndarray], ranks: np.ndarray, correct: np.ndarray, path: str | Path, title: str,
) -> None:
    """Draw one row per query: the query, then its first items, framed green where the class is right, red where not.

    Args:
        queries: Q arrays (H, W, 3) uint8.
        gallery: index -> (H, W, 3) uint8; only the indices in `ranks` are read.
        ranks: (Q, k) integer gallery indices, best first.
        correct: (Q, k) bool.
    """
    rows = [
        ("", [Tile(query), *(Tile(gallery[int(item)], wrong=not mark, right=bool(mark)) for item, mark in zip(items, marks))])
        for query, items, marks in zip(queries, ranks, correct, strict=True)
    ]
    draw_contact_sheet(title, ["query", *(f"rank {place}" for place in range(1, ranks.shape[1] + 1))], [Block("", rows)], path)


def _draw_tile(axis: Any, tile: Tile) -> None:
    frame = WRONG if tile.wrong else RIGHT if tile.right else None
    axis.imshow(np.full((1, 1, 3), 235, np.uint8) if tile.image is None else tile.image, interpolation="nearest")
    axis.set(xticks=[], yticks=[])
    axis.set_xlabel(tile.caption, fontsize=7, labelpad=2, color=WRONG if tile.wrong else "0.3")
    for spine in axis.spines.values():
        spine.set(visible=True, color=frame or "0.8", linewidth=2.5 if frame else 0.8)
