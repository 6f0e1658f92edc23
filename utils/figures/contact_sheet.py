"""Draws a contact sheet: blocks of rows of small pictures, one row per object and one column per modality."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from utils.figures.plots import STYLE, WRONG, new_figure, save_figure

TILE_INCHES, MARGIN_INCHES = 1.0, 1.1


@dataclass(frozen=True)
class Tile:
    """One picture: (H, W, 3) uint8, or None for an empty field; a caption below it, red with a red frame if `wrong`."""

    image: np.ndarray | None
    caption: str = ""
    wrong: bool = False


@dataclass(frozen=True)
class Block:
    """A part of the sheet: its title, and per row the text on its left and one tile per column."""

    title: str
    rows: Sequence[tuple[str, Sequence[Tile]]]


def draw_contact_sheet(title: str, columns: Sequence[str], blocks: Sequence[Block], path: str | Path) -> None:
    """Draw at least one block, each with at least one row of `len(columns)` tiles, side by side into a PNG.

    Raises:
        ValueError: if there is nothing to draw or a row has another number of tiles.
    """
    sizes = sorted({len(tiles) for block in blocks for _, tiles in block.rows})
    if not columns or not blocks or not all(block.rows for block in blocks) or sizes != [len(columns)]:
        raise ValueError(f"a contact sheet needs blocks of rows of {len(columns)} tiles, found {len(blocks)} blocks of {sizes}")
    import matplotlib

    with matplotlib.rc_context(STYLE):
        height = TILE_INCHES * max(len(block.rows) for block in blocks)
        figure = new_figure(len(blocks) * (TILE_INCHES * len(columns) + MARGIN_INCHES), height + MARGIN_INCHES)
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
        for part, block in zip(figure.subfigures(1, len(blocks), squeeze=False)[0], blocks):
            _draw_block(part, columns, block)
        save_figure(figure, path)


def _draw_block(part: Any, columns: Sequence[str], block: Block) -> None:
    part.suptitle(block.title, fontsize=11)
    axes = part.subplots(len(block.rows), len(columns), squeeze=False)
    for axis, name in zip(axes[0], columns):
        axis.set_title(name, fontsize=9, fontweight="normal", pad=4)
    for line, (text, tiles) in zip(axes, block.rows):
        line[0].set_ylabel(text, rotation=0, ha="right", va="center", fontsize=8)
        for axis, tile in zip(line, tiles):
            _draw_tile(axis, tile)


def _draw_tile(axis: Any, tile: Tile) -> None:
    empty = tile.image is None
    axis.imshow(np.full((1, 1, 3), 235, np.uint8) if empty else tile.image)
    axis.set(xticks=[], yticks=[])
    axis.set_xlabel(tile.caption, fontsize=7, labelpad=2, color=WRONG if tile.wrong else "0.3")
    for spine in axis.spines.values():
        spine.set(visible=True, color=WRONG if tile.wrong else "0.8", linewidth=2.5 if tile.wrong else 0.8)
