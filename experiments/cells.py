"""Expands the rows of a table into cells. A cell is one run, with an id that depends on what decides its result."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from experiments.protocol import Setup, modalities_of
from utils.engine.run_log import REPOSITORY
from utils.errors import UserError
from utils.settings.config import load_config, to_dict
from utils.settings.options import Step1Config, Step2Config

CONFIGS = {"step1": Step1Config, "step2": Step2Config}
# Settings that name places or cost time, but do not change the result of a cell
NEUTRAL = {
    "run": ("output", "pseudo_labels", "device", "threads", "eval_every", "log_interval", "figures"), "rdl": ("pseudo_labels",),
}


@dataclass(frozen=True)
class Cell:
    """One run.

    Attributes:
        id: 12 hexadecimal digits of what decides its result; commit, device and threads do not count.
        stage: "step1", "step2", or the module that is run: "release_protocol", "memory_bank", "loss_shapes".
        name: for people.
        arguments: of its command line, without seed, device and places.
        seed: of all its random draws.
        epochs: that it trains, the unit of progress; 1 if it trains none.
        needs: cells that must be done first; step 2 reads the pseudo-labels of the first one.
    """

    id: str
    stage: str
    name: str
    arguments: tuple[str, ...]
    seed: int
    epochs: int = 1
    needs: tuple["Cell", ...] = ()


@dataclass(frozen=True)
class Row:
    """One row of a table: its cells by seed and letters of the modalities, and the settings they start from."""

    name: str
    cells: Mapping[int, Mapping[str, Cell]]
    setup: Mapping[str, Any] = field(default_factory=dict)  # of `describe_setup`


def settings_of(stage: str, config: Path, overrides: Sequence[str]) -> dict:
    """Return the settings of a run that decide its result.

    Those at their default are left out, so that a new option leaves the ids of finished cells as they are.
    """
    resolved, defaults = to_dict(_load(stage, config, tuple(overrides))), to_dict(_defaults(stage))
    for section, keys in NEUTRAL.items():
        for key in keys if section in resolved else ():
            resolved[section][key] = defaults[section][key]
    return _difference(resolved, defaults)


@functools.cache
def _load(stage: str, config: Path, overrides: tuple[str, ...]) -> Any:
    return load_config(CONFIGS[stage], str(REPOSITORY / config / f"{stage}.yaml"), overrides)


def _epochs(stage: str, config: Path, overrides: Sequence[str]) -> int:
    return _load(stage, config, tuple(overrides)).optim.epochs


def _defaults(stage: str) -> Any:
    """The sections' own defaults; the whole configuration has checks that the defaults alone do not pass."""
    sections = {entry.name: entry.default_factory() for entry in dataclasses.fields(CONFIGS[stage])}
    return dataclasses.make_dataclass("Defaults", sections)(**sections)


def _difference(tree: Mapping, defaults: Mapping) -> dict:
    """The part of a nested dictionary that differs from another one."""
    changed = {key: value for key, value in tree.items() if value != defaults.get(key)}
    both = {key: isinstance(value, dict) and isinstance(defaults.get(key), dict) for key, value in changed.items()}
    return {key: _difference(value, defaults[key]) if both[key] else value for key, value in changed.items()}


def _identify(stage: str, seed: int, needs: Iterable[Cell], *content: Any) -> str:
    text = json.dumps([stage, seed, [cell.id for cell in needs], *content], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def training_cell(
    stage: str, setup: Setup, pair: str, overrides: Sequence[str], seed: int, needs: tuple[Cell, ...] = ()
) -> Cell:
    """Return the cell of a training stage on some modalities, with settings on top of the configuration and the setup's own."""
    names = modalities_of(pair)
    own = [text.replace("{2D}", names[0]).replace("{3D}", names[-1]) for text in overrides]
    given = [*getattr(setup, stage), f"data.modalities=[{','.join(names)}]", *own]
    identity = _identify(stage, seed, needs, settings_of(stage, setup.config, given))
    arguments = ("--config", str(setup.config / f"{stage}.yaml"), "--set", *given)
    inherited = [word for cell in needs for word in cell.name.split()[4:]]  # what the needed cells were given
    name = " ".join([stage, pair, "seed", str(seed), *inherited, *own])
    return Cell(identity, stage, name, arguments, seed, _epochs(stage, setup.config, given), needs)


def release_cell(setup: Setup, pair: str, variant: str, seed: int) -> Cell:
    """Return the cell of one departure of the authors' code; it trains both stages itself."""
    chosen = f"data.modalities=[{','.join(modalities_of(pair))}]"
    given = {stage: [*getattr(setup, stage), chosen] for stage in CONFIGS}
    settings = [settings_of(stage, setup.config, given[stage]) for stage in CONFIGS]
    epochs = sum(_epochs(stage, setup.config, given[stage]) for stage in CONFIGS)
    arguments = ("--config-dir", str(setup.config), "--variant", variant, "--set1", *given["step1"], "--set2", *given["step2"])
    identity = _identify("release_protocol", seed, (), variant, settings)
    return Cell(identity, "release_protocol", f"release_protocol {variant} {pair} seed {seed}", arguments, seed, epochs)


def measuring_cell(stage: str, arguments: Sequence[object]) -> Cell:
    """Return the cell of a benchmark, which trains nothing and has no seed."""
    texts = tuple(map(str, arguments))
    return Cell(_identify(stage, 0, (), texts), stage, " ".join([stage, *texts]), texts, 0)


def all_cells(rows: Iterable[Row]) -> list[Cell]:
    """Return every cell of the rows and those they need, each once, a needed one before its users, seed by seed."""
    wanted = [cell for row in rows for by_pair in row.cells.values() for cell in by_pair.values()]
    ordered: dict[str, Cell] = {}
    for cell in sorted(wanted, key=lambda cell: cell.seed):
        for entry in (*cell.needs, cell):
            ordered.setdefault(entry.id, entry)
    return list(ordered.values())


def describe_setup(setup: Setup) -> dict[str, Any]:
    """Return what a reader must know of the settings that all rows start from, for their records.

    Returns:
        The configuration folder, the settings that the paper states too, and a hash of all of them: tables show records of
        one hash only.
    """
    first, second = (_load(stage, setup.config, getattr(setup, stage)) for stage in CONFIGS)
    return {
        "config": str(setup.config), "batch_size": first.optim.batch_size, "learning_rate": first.optim.learning_rate,
        "lambda_1": first.pla.lambda_1, "lambda_2": second.rdl.lambda_2, "alpha": second.rdl.alpha,
        "hash": _identify("setup", 0, (), [settings_of(stage, setup.config, getattr(setup, stage)) for stage in CONFIGS]),
    }


def expand(table: Mapping[str, Any], setup: Setup, seeds: Iterable[int]) -> list[Row]:
    """Return the rows of a table on a data set.

    Args:
        table: entry of the protocol.
        setup: data set and scale.
        seeds: one run of every training cell each; figures and measurements without training take none.
    Returns:
        The rows in the order of the protocol, those of grids first; a row that only prints the paper's numbers has no cells.
    Raises:
        UserError: if a row's settings do not fit the configuration.
    """
    if table.get("kind", "scores") in ("memory", "shapes"):
        return _measured_rows(table, setup)
    seeds, options_of = list(seeds), rows_of(table)
    for other in {table.get("baseline"), *(options.get("against") for options in options_of.values())} - {None}:
        if other not in options_of:
            raise UserError(f"rows are to be compared with {other!r}, which the table lacks; its rows: {', '.join(options_of)}")
    rows = []
    for name, options in options_of.items():
        own = setup.as_printed if options.get("settings") == "as_printed" else setup
        if own is None:
            raise UserError(f"row {name!r}: no as_printed settings of {setup.dataset}, {setup.scale} scale; see experiments/protocol.yaml")
        pairs = [options["modalities"]] if "modalities" in options else () if "numbers" in options else own.pairs
        cells = {seed: {pair: _row_cell(options, own, pair, seed) for pair in pairs} for seed in seeds}
        rows.append(Row(name, cells, describe_setup(own)))
    return rows


def rows_of(table: Mapping[str, Any]) -> dict[str, dict]:
    """Return name -> options of every row: one per grid and value, which also carries both for the figure, and the others."""
    grids = {
        f"{grid} = {value:g}": {stage: [f"{key}={value}"], "grid": grid, "value": value}
        for grid, keys in table.get("grids", {}).items() for stage, key in keys.items() for value in table["values"]
    }
    return {**grids, **table.get("rows", {})}


def _row_cell(options: Mapping[str, Any], setup: Setup, pair: str, seed: int) -> Cell:
    if "variant" in options:
        return release_cell(setup, pair, options["variant"], seed)
    first = training_cell("step1", setup, pair, options.get("step1", ()), seed)
    if options.get("stage") == "step1":
        return first
    return training_cell("step2", setup, pair, options.get("step2", ()), seed, (first,))


def _measured_rows(table: Mapping[str, Any], setup: Setup) -> list[Row]:
    config = _load("step1", setup.config, setup.step1)
    if table["kind"] == "shapes":
        arguments = ("--num-clusters", config.pla.num_clusters, "--alpha", *table["values"])
        return [Row("losses", {0: {"": measuring_cell("loss_shapes", arguments)}}, describe_setup(setup))]
    dim, batch = config.model.embedding_dim, config.optim.batch_size
    if not setup.samples:
        raise UserError(f"no size of a bank of {setup.dataset}: give datasets.{setup.dataset}.samples in a --add file")
    arguments = ("--dim", dim, "--batch-size", batch, "--samples")
    return [
        Row(f"{count} x {dim}", {0: {"": measuring_cell("memory_bank", (*arguments, count))}}, describe_setup(setup))
        for count in setup.samples
    ]
