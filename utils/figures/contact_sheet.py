"""Draws contact sheets: blocks of rows of small pictures, e.g. one row per object and one column per modality."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from utils.figures.plots import STYLE, new_figure, save_figure

TILE_INCHES, MARGIN_INCHES = 1.0, 1.1
SIDE = 0.86  # of a picture in its tile
LINE = 0.13  # of a caption, of which the tile has room for one
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
        captions = [tile.caption for block in blocks for _, tiles in block.rows for tile in tiles]
        pitch = 1 + LINE * max(caption.count("\n") for caption in captions)
        height = TILE_INCHES * pitch * max(len(block.rows) for block in blocks)
        figure = new_figure(len(blocks) * (TILE_INCHES * len(columns) + MARGIN_INCHES), height + MARGIN_INCHES)
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
        for axis, block in zip(figure.subplots(1, len(blocks), squeeze=False)[0], blocks):
            _draw_block(axis, columns, block, pitch)
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


def _draw_block(axis: Any, columns: Sequence[str], block: Block, pitch: float) -> None:
    """Draw all tiles into one axis, whose unit is the width of a tile with its margins: hundreds of axes would take seconds."""
    axis.set_title(block.title, fontweight="normal", pad=22)
    for place, name in enumerate(columns):
        axis.text(place + 0.5, -0.04, name, ha="center", va="bottom", fontsize=9)
    for line, (text, tiles) in enumerate(block.rows):
        middle = pitch * line + SIDE / 2
        axis.text(-0.04, middle, text, ha="right", va="center", fontsize=8)
        for place, (_, tile) in enumerate(zip(columns, tiles, strict=True)):
            _draw_tile(axis, place + 0.5, middle, tile)
    axis.set(xlim=(0, len(columns)), ylim=(pitch * len(block.rows), 0), aspect="equal", anchor="N")
    axis.set_axis_off()


def _draw_tile(axis: Any, x: float, y: float, tile: Tile) -> None:
    """Draw a tile around a centre, its longer side SIDE wide, and its caption below."""
    from matplotlib.patches import Rectangle

    image = np.full((1, 1, 3), 235, np.uint8) if tile.image is None else tile.image
    height, width = (SIDE * length / max(image.shape[:2]) for length in image.shape[:2])
    left, top = x - width / 2, y - height / 2
    axis.imshow(image, extent=(left, left + width, top + height, top), interpolation="nearest")
    frame = WRONG if tile.wrong else RIGHT if tile.right else None
    line = {"edgecolor": frame or "0.8", "linewidth": 2.5 if frame else 0.8}
    axis.add_patch(Rectangle((left, top), width, height, fill=False, clip_on=False, **line))
    size = min(7, 105 / max(1, *map(len, tile.caption.split("\n"))))  # points, no wider than the tile
    axis.text(x, top + height + 0.03, tile.caption, ha="center", va="top", fontsize=size, color=WRONG if tile.wrong else "0.3")
