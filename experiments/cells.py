"""Expands the rows of a table into cells. A cell is one run, with an id that depends on what decides its result."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from experiments.protocol import Setup, fitting, modalities_of, rows_of
from utils.engine.run_log import REPOSITORY
from utils.errors import UserError
from utils.settings.config import load_config, to_dict
from utils.settings.options import CONFIGS

# Settings that name places or cost time, but do not change the result of a cell
NEUTRAL = {
    "run": ("seed", "output", "pseudo_labels", "device", "threads", "eval_every", "log_interval", "figures"),
    "pla": ("start",), "rdl": ("pseudo_labels", "rounds"),
}


@dataclass(frozen=True)
class Cell:
    """One run.

    Attributes:
        id: 12 hexadecimal digits of what decides its result; commit, device and threads do not count.
        stage: "step1", "step2", or another key of `experiments.jobs.SCRIPTS`.
        name: for people.
        arguments: of its command line, without seed, device and places.
        epochs: that it trains, the unit of progress; 0 if it trains none, or as many as its method has on its own.
        needs: cells that must be done first. A training starts from the run of the first one: step 2 from its pseudo-labels, a repeated
            step 1 from its encoders; one on features has them from it, as has a method that is trained end
            to end, for its targets.
    """

    id: str
    stage: str
    name: str
    arguments: tuple[str, ...]
    seed: int = 0
    epochs: int = 0
    needs: tuple["Cell", ...] = ()

    @property
    def steps(self) -> int:
        """Its part of the progress of all cells."""
        return max(1, self.epochs)

    def rests_on(self) -> Iterator["Cell"]:
        """Yield every cell that it needs, and that those need, a needed one before its users."""
        for need in self.needs:
            yield from (*need.rests_on(), need)


@dataclass(frozen=True)
class Row:
    """One row of a table.

    Attributes:
        cells: by seed and letters of the modalities.
        setup: what they start from, see `describe_setup`.
        by: what is compared, a key of `utils.evaluation.tables.score_variants`; None: as the settings say.
    """

    name: str
    cells: Mapping[int, Mapping[str, Cell]]
    setup: Mapping[str, Any]
    by: str | None = None


@functools.cache
def _load(stage: str, config: Path, overrides: tuple[str, ...]) -> Any:
    return load_config(CONFIGS[stage], str(REPOSITORY / config / f"{stage}.yaml"), overrides)


def _decisive(stage: str, config: Path, overrides: Sequence[str]) -> dict:
    """The settings that decide a run's result, without the seed, where they depart from their defaults: a new one changes no id."""
    given = to_dict(_load(stage, config, tuple(overrides)))
    defaults = {field.name: to_dict(field.default_factory()) for field in dataclasses.fields(CONFIGS[stage])}
    for tree, (section, keys) in product((given, defaults), NEUTRAL.items()):
        for key in keys:
            tree.get(section, {}).pop(key, None)
    return _departures(given, defaults)


def _departures(given: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict:
    """What differs from the defaults, section by section; an entry that only the defaults have is None."""
    departures = {}
    for key in given.keys() | defaults.keys():
        value, default = given.get(key), defaults.get(key)
        if isinstance(value, dict) and isinstance(default, dict):
            value, default = _departures(value, default), {}
        if value != default:
            departures[key] = value
    return departures


def _identify(*content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def _modalities(letters: str) -> str:
    return f"data.modalities=[{','.join(modalities_of(letters))}]"


def _named(stage: str, letters: str, seed: int, needs: tuple[Cell, ...], *own: str) -> str:
    """A name for people, with what the needed cells were given."""
    return " ".join([stage, letters, "seed", str(seed), *(word for cell in needs for word in cell.name.split()[4:]), *own])


def _training(stage: str, setup: Setup, letters: str, overrides: Sequence[str], seed: int, needs: tuple[Cell, ...] = ()) -> Cell:
    """The cell of a training stage on some modalities, with settings on top of the configuration and the setup's own."""
    names = modalities_of(letters)
    own = [text.replace("{2D}", names[0]).replace("{3D}", names[-1]) for text in overrides]
    again = bool(needs) and needs[0].stage == stage
    anew = ("pla.start=RUN", "optim.epochs=0", "pla.mlm_only_epochs=0") if again and stage == "step1" else ()
    given = (*getattr(setup, stage), *anew, _modalities(letters), *own)
    identity = _identify(stage, seed, [cell.id for cell in needs], _decisive(stage, setup.config, given))
    arguments = ("--config", str(setup.config / f"{stage}.yaml"), "--set", *given)
    epochs = _load(stage, setup.config, given).optim.epochs
    return Cell(identity, stage, _named(stage, letters, seed, needs, *["again"] * again, *own), arguments, seed, epochs, needs)


def _release(setup: Setup, pair: str, variant: str, seed: int) -> Cell:
    """The cell of one departure of the authors' code; it trains both stages itself."""
    stage, given = "release_protocol", {name: (*getattr(setup, name), _modalities(pair)) for name in CONFIGS}
    identity = _identify(stage, seed, variant, [_decisive(name, setup.config, given[name]) for name in CONFIGS])
    epochs = sum(_load(name, setup.config, given[name]).optim.epochs for name in CONFIGS)
    arguments = ("--config-dir", str(setup.config), "--variant", variant, "--set1", *given["step1"], "--set2", *given["step2"])
    return Cell(identity, stage, f"{stage} {variant} {pair} seed {seed}", arguments, seed, epochs)


def _features(setup: Setup, kind: str, seed: int) -> Cell:
    """The cell that makes features of all modalities of a data set; every row of a seed is trained on, or end to end towards, the same."""
    own, source = ((), setup.source) if setup.source else (setup.step1, setup.config)
    given = (*own, _modalities(setup.letters))
    identity = _identify("features", seed, kind, _decisive("step1", source, given))
    name = _named("features", setup.letters, seed, (), *([kind] if kind != "learned" else []))
    arguments = ("--config", str(source / "step1.yaml"), "--kind", kind, "--set", *given)
    return Cell(identity, "features", name, arguments, seed, _load("step1", source, given).optim.epochs if kind == "learned" else 0)


def _method(options: Mapping[str, Any], setup: Setup, letters: str, seed: int, needs: tuple[Cell, ...]) -> Cell:
    """The cell of a method of `baselines`; end to end it trains for as many epochs as both stages of RoMo together."""
    method, own = options["method"], (*setup.methods, *options.get("set", ()))
    if setup.source is None:
        own = (f"optim.epochs={sum(_load(stage, setup.config, getattr(setup, stage)).optim.epochs for stage in CONFIGS)}", *own)
    given = (*setup.step1, _modalities(letters))
    identity = _identify("baseline", seed, method, [cell.id for cell in needs], own, _decisive("step1", setup.config, given))
    shared = [text for text in given if not text.startswith("optim.")]  # every method keeps its own optimiser
    arguments = (method, "--config", str(setup.config / "step1.yaml"), "--set", *shared, *own)
    texts = (text.partition("=") for text in own)
    *_, epochs = 0, *(int(value) for key, _, value in texts if key == "optim.epochs" and value.isdecimal())
    return Cell(identity, "baseline", _named(method, letters, seed, needs, *own), arguments, seed, epochs, needs)


def all_cells(rows: Iterable[Row]) -> list[Cell]:
    """Return every cell of the rows and those they need, each once, a needed one before its users, seed by seed."""
    wanted = [cell for row in rows for by_pair in row.cells.values() for cell in by_pair.values()]
    ordered = (entry for cell in sorted(wanted, key=lambda cell: cell.seed) for entry in (*cell.rests_on(), cell))
    return list({cell.id: cell for cell in ordered}.values())


def describe_setup(setup: Setup) -> dict[str, Any]:
    """Return the folder of the settings that all rows start from, what the paper states too, and a hash: tables show one hash."""
    first, second = (_load(stage, setup.config, getattr(setup, stage)) for stage in CONFIGS)
    return {
        "config": str(setup.config), "batch_size": first.optim.batch_size, "learning_rate": first.optim.learning_rate,
        "lambda_1": first.pla.lambda_1, "lambda_2": second.rdl.lambda_2, "alpha": second.rdl.alpha, "num_clusters": first.pla.num_clusters,
        "hash": _identify([_decisive(stage, setup.config, getattr(setup, stage)) for stage in CONFIGS]),
    }


def expand(table: Mapping[str, Any], setup: Setup, seeds: Iterable[int]) -> list[Row]:
    """Return the rows of a table of the protocol, those of grids first.

    Args:
        setup: data set and scale.
        seeds: one run of every training cell each; measurements take none, rows that only print the paper's numbers no cells.
    Raises:
        UserError: if a row's settings do not fit the configuration.
    """
    if table.get("kind") in ("memory", "shapes"):
        return [Row(name, {0: {"": cell}}, describe_setup(setup)) for name, cell in _measured(table, setup).items()]
    seeds, rows = list(seeds), []
    for name, options in rows_of(fitting(table, setup)).items():
        without = "numbers" in options or not setup.pairs
        settings = "recipe" if "method" in options and setup.source is None else options.get("settings")  # end to end, as RoMo trains
        own = setup if without else {"as_printed": setup.as_printed, "recipe": setup.recipe or setup}.get(settings, setup)
        if own is None:
            raise UserError(f"row {name!r} needs as_printed of {setup.dataset}, {setup.scale} scale, in the protocol")
        named = options.get("modalities") or "each"
        pairs = () if without else {"each": own.pairs, "all": [own.letters]}.get(named, [named])
        cells = {seed: {pair: _cell(options, own, pair, seed) for pair in pairs} for seed in seeds}
        rows.append(Row(name, cells, describe_setup(own), options.get("by")))
    return rows


def _cell(options: Mapping[str, Any], setup: Setup, pair: str, seed: int) -> Cell:
    if "variant" in options:
        return _release(setup, pair, options["variant"], seed)
    features = (_features(setup, options.get("features", "learned"), seed),) if setup.source or "method" in options else ()
    if "method" in options:
        return _method(options, setup, pair, seed, features)
    cell = _training("step1", setup, pair, options.get("step1", ()), seed, features)
    if "again" in options:
        cell = _training("step1", setup, pair, (*options.get("step1", ()), *options["again"]), seed, (cell,))
    for _ in range(0 if options.get("stage") == "step1" else options.get("rounds", 1)):
        cell = _training("step2", setup, pair, options.get("step2", ()), seed, (cell,))
    return cell


def _measured(table: Mapping[str, Any], setup: Setup) -> dict[str, Cell]:
    """Name -> cell of the rows that are benchmarks, which train nothing and have no seed."""
    config = _load("step1", setup.config, setup.step1)
    dim, batch = config.model.embedding_dim, config.optim.batch_size
    calls = {f"{count} x {dim}": f"memory_bank --dim {dim} --batch-size {batch} --samples {count}" for count in setup.samples}
    if table["kind"] == "shapes":
        calls = {"losses": f"loss_shapes --num-clusters {config.pla.num_clusters} --alpha {' '.join(map(str, table['values']))}"}
    if not calls:
        raise UserError(f"no size of a bank of {setup.dataset}: give datasets.{setup.dataset}.samples in a --add file")
    words = {name: call.split() for name, call in calls.items()}
    return {name: Cell(_identify(stage, texts), stage, calls[name], tuple(texts)) for name, (stage, *texts) in words.items()}
