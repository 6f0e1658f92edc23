"""The runs behind a table: `protocol.yaml` and the configurations expanded into rows of cells. A cell is one run with a stable id."""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from utils.config import load_config, to_dict
from utils.data_options import nearest
from utils.modalities import MODALITIES
from utils.options import Step1Config, Step2Config
from utils.run_log import REPOSITORY

HERE = Path(__file__).resolve().parent
SCALES = ("full", "small")
CONFIGS = {"step1": Step1Config, "step2": Step2Config}
KEYS = {
    "datasets": {"paper", "samples", *SCALES}, "scale": {"config", "pairs", "step1", "step2"},
    "tables": {"title", "kind", "paper", "baseline", "ranking", "notes", "rows", "grids", "values"},
    "row": {"step1", "step2", "stage", "paper", "against", "variant"},
}
# Settings that name places or cost time, but do not change the result of a cell
NEUTRAL = {"run": ("output", "pseudo_labels", "device", "threads", "eval_every", "log_interval", "figures"), "rdl": ("pseudo_labels",)}


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
    """One row of a table: its cells by seed and pair, and what stands beside them."""

    name: str
    cells: Mapping[int, Mapping[str, Cell]]
    options: Mapping[str, Any] = field(default_factory=dict)  # paper, against, grid, value


@dataclass(frozen=True)
class Setup:
    """A data set at one scale: configuration folder, pairs of modalities, settings on top, the paper's name for it."""

    dataset: str
    scale: str
    config: Path
    pairs: tuple[str, ...]
    step1: tuple[str, ...] = ()
    step2: tuple[str, ...] = ()
    paper: str | None = None
    samples: tuple[int, ...] = ()


def load_protocol(added: Path | None = None) -> dict[str, dict]:
    """Read protocol.yaml and, on top of it, a file of the same format: new data sets, new tables, or more rows of one.

    Raises:
        FileNotFoundError: if there is no such file. ValueError: on an unknown key, naming file and place.
    """
    protocol: dict[str, dict] = {"datasets": {}, "tables": {}}
    for path in filter(None, (HERE / "protocol.yaml", added)):
        if not path.is_file():
            raise FileNotFoundError(f"no protocol file {path}: give a YAML file with datasets: or tables:, see docs/reproduce.md")
        tree = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        _check_protocol(tree, path)
        protocol["datasets"] |= tree.get("datasets", {})
        for name, table in tree.get("tables", {}).items():
            known = protocol["tables"].get(name, {})
            protocol["tables"][name] = {**known, **table, "rows": {**known.get("rows", {}), **table.get("rows", {})}}
    return protocol


def _check_protocol(tree: Any, path: Path) -> None:
    _check_keys(tree, {"datasets", "tables"}, str(path))
    for kind, parts in (("datasets", {"full": "scale", "small": "scale"}), ("tables", {})):
        for name, entry in tree.get(kind, {}).items():
            _check_keys(entry, KEYS[kind], f"{path}: {kind}.{name}")
            for part in parts:
                _check_keys(entry.get(part, {}), KEYS["scale"], f"{path}: {kind}.{name}.{part}")
            for row, options in entry.get("rows", {}).items():
                _check_keys(options, KEYS["row"], f"{path}: {kind}.{name}.rows.{row}")


def _check_keys(tree: Any, known: set[str], place: str) -> None:
    if not isinstance(tree, dict):
        raise ValueError(f"{place} must hold keys of {', '.join(sorted(known))}, found {tree!r}")
    for key in tree:
        if key not in known:
            raise ValueError(f"{place}: unknown key {key!r}{nearest(key, known)}; known: {', '.join(sorted(known))}")


def find_setup(protocol: Mapping[str, dict], dataset: str, scale: str, tasks: Sequence[str] = ()) -> Setup:
    """Return a data set at a scale. One that the protocol does not name is looked up in configs/.

    Args:
        protocol: of `load_protocol`.
        dataset: name; scale: "full" or "small".
        tasks: task names (RP, PG ...) to restrict the pairs to; a pair trains both directions. Default: the protocol's.
    Raises:
        ValueError: on an unknown data set or task, or a scale that the data set does not have.
    """
    entry = protocol["datasets"].get(dataset)
    if entry is None:
        folder = Path("configs") / (f"{dataset}_cpu" if scale == "small" and (REPOSITORY / f"configs/{dataset}_cpu").is_dir() else dataset)
        if not (REPOSITORY / folder / "step1.yaml").is_file():
            known = protocol["datasets"]
            raise ValueError(f"unknown data set {dataset!r}{nearest(dataset, known)}; known: {', '.join(known)}, and folders of configs/")
        entry = {scale: {"config": str(folder)}}
    if scale not in entry:
        raise ValueError(f"{dataset} has no scale {scale!r} in the protocol, it has: {', '.join(key for key in SCALES if key in entry)}")
    options = entry[scale]
    step1, step2 = tuple(options.get("step1", ())), tuple(options.get("step2", ()))
    config = Path(options["config"])
    pairs = [pair_of(task) for task in tasks] or options.get("pairs") or [_configured_pair(config, step1)]
    return Setup(dataset, scale, config, tuple(dict.fromkeys(pairs)), step1, step2, entry.get("paper"), tuple(entry.get("samples", ())))


def _configured_pair(config: Path, overrides: Sequence[str]) -> str:
    names = load_config(Step1Config, str(REPOSITORY / config / "step1.yaml"), overrides).data.modalities
    return pair_of("".join(MODALITIES[name].letter for name in names))


def pair_of(task: str) -> str:
    """Return the pair that a task needs, the 2D letter first: "PR" -> "RP"."""
    letters = {entry.letter: entry for entry in MODALITIES.values()}
    kinds = [letters[letter].is_2d for letter in task if letter in letters]
    if len(task) != 2 or sorted(kinds) != [False, True]:
        raise ValueError(f"a task is one letter of R, G and one of P, M, like RP or MG; found {task!r}")
    return task if kinds[0] else task[::-1]


def modalities_of(pair: str) -> tuple[str, str]:
    """Return the names of a pair's modalities: "RP" -> ("RGBImg", "PointCloud")."""
    names = {entry.letter: name for name, entry in MODALITIES.items()}
    return names[pair[0]], names[pair[1]]


def settings_of(stage: str, config: Path, overrides: Sequence[str]) -> dict:
    """Return the settings of a run that decide its result and differ from the defaults, so that a new option leaves ids as they are."""
    resolved = to_dict(load_config(CONFIGS[stage], str(REPOSITORY / config / f"{stage}.yaml"), overrides))
    defaults = to_dict(CONFIGS[stage].__dict__.get("_defaults") or _defaults(stage))
    for section, keys in NEUTRAL.items():
        for key in keys:
            resolved.get(section, {}).pop(key, None)
    return _difference(resolved, defaults)


def _defaults(stage: str) -> Any:
    """The sections' own defaults; the whole configuration has checks that the defaults alone do not pass."""
    sections = {entry.name: entry.default_factory() for entry in dataclasses.fields(CONFIGS[stage])}
    return dataclasses.make_dataclass("Defaults", sections)(**sections)


def _difference(tree: Mapping, defaults: Mapping) -> dict:
    pairs = {key: (value, defaults.get(key)) for key, value in tree.items()}
    nested = {key: _difference(*pair) if all(isinstance(entry, dict) for entry in pair) else pair[0] for key, pair in pairs.items()}
    return {key: value for key, value in nested.items() if value != {} and value != defaults.get(key)}


def _identify(stage: str, seed: int, needs: Iterable[Cell], *content: Any) -> str:
    text = json.dumps([stage, seed, [cell.id for cell in needs], *content], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def training_cell(stage: str, setup: Setup, pair: str, overrides: Sequence[str], seed: int, needs: tuple[Cell, ...] = ()) -> Cell:
    """Return the cell of a training stage on one pair, with settings on top of the configuration and the setup's own."""
    first, second = modalities_of(pair)
    own = [text.replace("{2D}", first).replace("{3D}", second) for text in overrides]
    given = [*getattr(setup, stage), f"data.modalities=[{first},{second}]", *own]
    config = setup.config / f"{stage}.yaml"
    settings = settings_of(stage, setup.config, given)
    epochs = load_config(CONFIGS[stage], str(REPOSITORY / config), given).optim.epochs
    name = " ".join([stage, pair, f"seed {seed}", *own])
    return Cell(_identify(stage, seed, needs, settings), stage, name, ("--config", str(config), "--set", *given), seed, epochs, needs)


def release_cell(setup: Setup, pair: str, variant: str, seed: int) -> Cell:
    """Return the cell of one departure of the authors' code; it trains both stages itself."""
    chosen = f"data.modalities=[{','.join(modalities_of(pair))}]"
    given = {stage: [*getattr(setup, stage), chosen] for stage in CONFIGS}
    settings = [settings_of(stage, setup.config, given[stage]) for stage in CONFIGS]
    epochs = sum(load_config(CONFIGS[stage], str(REPOSITORY / setup.config / f"{stage}.yaml"), given[stage]).optim.epochs for stage in CONFIGS)
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
