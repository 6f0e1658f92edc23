"""Reads protocol.yaml: which data sets, pairs of modalities and table rows there are."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from utils.engine.run_log import REPOSITORY
from utils.errors import UserError
from utils.evaluation.tables import ANCHORED, VARIANTS
from utils.modalities import MODALITIES
from utils.settings.config import load_config
from utils.settings.data_options import nearest
from utils.settings.options import Step1Config

HERE = Path(__file__).resolve().parent
SCALES = ("full", "small", "head", "e2e")
TRAINED = [name for name, (kind, _) in VARIANTS.items() if kind != ANCHORED]  # what a training scores at its end
_SCALE = dict.fromkeys(("config", "pairs", "step1", "step2", "as_printed", "recipe", "source", "absent", "mark"))
_TABLE = dict.fromkeys(("title", "kind", "paper", "baseline", "ranking", "logged", "notes", "grids", "values", "mode"))
_ROW = dict.fromkeys((
    "step1", "again", "step2", "rounds", "stage", "settings", "by", "modalities", "paper", "numbers", "against", "variant", "method", "set",
    "features", "head_only",
))
KEYS = {  # key -> the keys below it, None: anything; ANY stands for names
    "datasets": {"ANY": {"paper": None, "samples": None, "methods": None, **dict.fromkeys(SCALES, _SCALE)}},
    "tables": {"ANY": {**_TABLE, "rows": {"ANY": _ROW}}},
}


@dataclass(frozen=True)
class Setup:
    """A data set at one scale.

    Attributes:
        config: folder with step1.yaml and step2.yaml; step1, step2: settings on top.
        pairs: letters of the modalities that are trained together, one training each.
        paper: the paper's name for the data set; samples: training rows per memory bank; methods: settings of compared methods.
        as_printed, recipe: the same with the paper's settings, and with ours where they are others.
        absent: pairs of the paper whose data cannot be had.
        source: at scale head, the folder with the configuration of the samples, of which all trainings get features.
        mark: what titles say of the data, e.g. that the pictures are not the paper's.
    """

    dataset: str
    scale: str
    config: Path
    pairs: tuple[str, ...]
    step1: tuple[str, ...] = ()
    step2: tuple[str, ...] = ()
    paper: str | None = None
    samples: tuple[int, ...] = ()
    methods: tuple[str, ...] = ()
    as_printed: "Setup | None" = None
    recipe: "Setup | None" = None
    source: Path | None = None
    absent: tuple[str, ...] = ()
    mark: str | None = None

    @property
    def letters(self) -> str:
        """Letters of all modalities that are trained on."""
        return "".join(entry.letter for entry in MODALITIES.values() if any(entry.letter in pair for pair in self.pairs))


def load_protocol(added: Path | None = None) -> dict[str, dict]:
    """Read protocol.yaml and, on top of it, a file of the same format: new data sets, new tables, or more rows of one.

    Raises:
        UserError: without such a file, on an unknown key or a row that is compared with none of its table, naming the place.
    """
    protocol: dict[str, dict] = {"datasets": {}, "tables": {}}
    for path in filter(None, (HERE / "protocol.yaml", added)):
        if not path.is_file():
            raise UserError(f"no file {path}: give a YAML file with datasets: or tables:, see docs/reproduce.md")
        tree = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        _check_keys(tree, KEYS, path)
        protocol["datasets"] |= tree.get("datasets", {})
        for name, table in tree.get("tables", {}).items():
            known = protocol["tables"].get(name, {})
            protocol["tables"][name] = {**known, **table, "rows": {**known.get("rows", {}), **table.get("rows", {})}}
    for name, table in protocol["tables"].items():
        rows = rows_of(table)
        for other in {table.get("baseline"), *(options.get("against") for options in rows.values())} - {None, *rows}:
            raise UserError(f"rows of {name} are compared with {other!r}, which the table lacks; its rows: {', '.join(rows)}")
        for by in {options.get("by") for options in rows.values()} - {None, *TRAINED}:
            raise UserError(f"a row of {name} is ranked by {by!r}; known: {'; '.join(TRAINED)}")
    return protocol


def _check_keys(tree: Any, known: Mapping[str, Any], path: Path, *keys: str) -> None:
    place = f"{path}: {'.'.join(keys) or 'top level'}"
    if not isinstance(tree, dict):
        raise UserError(f"{place} must hold keys of {', '.join(known)}, found {tree!r}")
    for key, below in tree.items():
        if key not in known and "ANY" not in known:
            raise UserError(f"{place}: unknown key {key!r}{nearest(key, known)}; known: {', '.join(known)}")
        if known_below := known.get("ANY", known.get(key)):
            _check_keys(below, known_below, path, *keys, str(key))


def rows_of(table: Mapping[str, Any]) -> dict[str, dict]:
    """Return name -> options of every row: one per grid and value, which also carries both for the figure, and the others."""
    grids = {
        f"{grid} = {value:g}": {stage: [f"{key}={value}"], "grid": grid, "value": value}
        for grid, keys in table.get("grids", {}).items() for stage, key in keys.items() for value in table["values"]
    }
    return {**grids, **table.get("rows", {})}


def fitting(table: Mapping[str, Any], setup: Setup) -> dict[str, Any]:
    """Return a table without the rows that only frozen features allow, where the encoders are trained."""
    return {**table, "rows": {name: row for name, row in table.get("rows", {}).items() if setup.source or not row.get("head_only")}}


def find_setup(protocol: Mapping[str, dict], dataset: str, scale: str, tasks: Sequence[str] = ()) -> Setup:
    """Return a data set at a scale, one of SCALES. One that the protocol does not name is looked up in configs/.

    Args:
        tasks: names (RP, PG ...) to restrict the pairs to; a pair trains both directions. Default: the protocol's.
    Raises:
        UserError: on an unknown data set or task, a task without data, or a scale that the data set does not have.
    """
    known, folders = protocol["datasets"], [f"configs/{dataset}_cpu"] * (scale == "small") + [f"configs/{dataset}"]
    found = [folder for folder in folders if (REPOSITORY / folder / "step1.yaml").is_file()]
    if dataset not in known and not found:
        raise UserError(f"unknown data set {dataset!r}{nearest(dataset, known)}; known: {', '.join(known)}, and folders of configs/")
    entry = known[dataset] if dataset in known else {scale: {"config": found[0]}}
    if scale not in entry:
        raise UserError(f"{dataset} has no scale {scale!r} in the protocol, it has: {', '.join(key for key in SCALES if key in entry)}")
    options = entry[scale]
    pairs = [pair_of(task) for task in tasks] or options.get("pairs")
    without = {task for task in tasks if pair_of(task) in options.get("absent", ()) or options.get("pairs") == []}
    if without:
        raise UserError(f"--tasks {' '.join(sorted(without))}: the data of {dataset} for it cannot be had; leave it out, tables say so")
    if not pairs and "pairs" not in options:  # those of its configuration
        data = load_config(Step1Config, str(REPOSITORY / options["config"] / "step1.yaml"), options.get("step1", ())).data
        pairs = [pair_of("".join(MODALITIES[name].letter for name in data.modalities))]

    def setup(places: Mapping[str, Any], **others: Setup) -> Setup:
        given = (tuple(places.get(stage, ())) for stage in ("step1", "step2"))
        source = Path(options["source"]) if "source" in options else None
        own = {key: tuple(entry.get(key, ())) for key in ("samples", "methods")}
        return Setup(dataset, scale, Path(places["config"]), tuple(dict.fromkeys(pairs)), *given, entry.get("paper"), **own,
                     source=source, absent=tuple(options.get("absent", ())), mark=options.get("mark"), **others)

    return setup(options, **{name: setup(options[name]) for name in ("as_printed", "recipe") if name in options})


def pair_of(task: str) -> str:
    """Return the pair that a task needs, the 2D letter first: "PR" -> "RP"."""
    letters = {entry.letter: entry for entry in MODALITIES.values()}
    kinds = [letters[letter].is_2d for letter in task if letter in letters]
    if len(task) != 2 or sorted(kinds) != [False, True]:
        raise UserError(f"a task is one letter of R, G and one of P, M, like RP or MG; found {task!r}")
    return task if kinds[0] else task[::-1]


def modalities_of(letters: str) -> list[str]:
    """Return the names of modalities by their letters: "RP" -> ["RGBImg", "PointCloud"]."""
    names = {entry.letter: name for name, entry in MODALITIES.items()}
    return [names[letter] for letter in letters]
