"""Files results/TABLE-DATASET-SCALE.jsonl: one record per line and run, each with its row, seed, command, commit and device."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from experiments.cells import Row, describe_setup
from experiments.jobs import training_scores
from experiments.protocol import HERE, SCALES, Setup, find_setup, fitting
from utils.engine.run_log import RunLog, origin
from utils.errors import UserError
from utils.evaluation.report import row_name
from utils.files import atomic_write_text, read_json
from utils.modalities import MODALITIES

NOT_RUN, DIRTY = "not run", "dirty tree"


@dataclass(frozen=True)
class Table:
    """What rendering needs; for a table that the protocol does not know, the records alone.

    Attributes:
        place: data set and scale, for people.
        paper_dataset, paper: the paper's name of the data set, and task -> row -> its printed number.
        records: id -> record of every run, also those that others rest on.
        shown: (row, letters of the modalities, seed) -> the record that counts.
        pairs: of modalities, that every row is run on unless it names its own; absent: those without data, shown as such.
    """

    name: str
    records: Mapping[str, dict]
    shown: Mapping[tuple[str, str, int], dict]
    pairs: tuple[str, ...]
    place: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    paper_dataset: str | None = None
    paper: Mapping[str, Any] = field(default_factory=dict)
    absent: tuple[str, ...] = ()

    def chain(self, record: dict | None) -> list[dict | None]:
        """Return a record and all that it needs; None for one that was not run."""
        needs = record["needs"] if record else []
        return [record, *(entry for need in needs for entry in self.chain(self.records.get(need)))]

    def fault(self, record: dict | None) -> str:
        """Return why a record does not count: a run that it rests on is missing, or was made from a dirty tree; "" if it does."""
        chain = self.chain(record)
        return NOT_RUN if None in chain else DIRTY if any(entry["dirty"] for entry in chain) else ""

    def trusted(self) -> list[dict]:
        """Return the shown records that count."""
        return [record for record in self.shown.values() if not self.fault(record)]


def read_records(path: Path) -> list[dict]:
    """Return the records of a table's file; none if it does not exist."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def add_records(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Add records at the end of a table's file, in place of older ones of the same run and row; nothing else is dropped."""
    key = lambda record: (record["id"], record["row"], record["pair"])
    added = {key(record): record for record in records}
    lines = [*(record for record in read_records(path) if key(record) not in added), *added.values()]
    if lines:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_text(path, "".join(json.dumps(record) + "\n" for record in lines))


def publish(path: Path, rows: Iterable[Row], done: Mapping[str, dict], command: str) -> None:
    """Add the records of a table's finished cells (id -> record), and of those they need, to its file."""
    shown, needed = [], {}
    for row in rows:
        for cell, pair in ((cell, pair) for pairs in row.cells.values() for pair, cell in pairs.items()):
            place = {"pair": pair, "setup": row.setup, "call": command}
            needed |= {need.id: {"row": None, **place, **_scored(done[need.id])} for need in cell.rests_on() if need.id in done}
            shown += [{"row": row.name, **place, **_scored(done[cell.id], row.by)}] if cell.id in done else []
    add_records(path, [*needed.values(), *shown])


def _scored(record: Mapping[str, Any], by: str | None = None) -> dict[str, Any]:
    """A finished cell's record with the scores of one variant, or those that its settings ask for."""
    kept = {key: value for key, value in record.items() if key != "variants"}
    return {**kept, "scores": {"map/chance": record["scores"]["map/chance"], **record["variants"][by]}} if by else kept


def made_with(environment: Mapping[str, Any], what: object) -> dict[str, Any]:
    """Return what a record says of a run's environment; a UserError refuses uncommitted code."""
    if environment["git_dirty"] is not False:
        raise UserError(f"{what} was made from uncommitted code, its commit would not repeat it: commit, and run it again")
    return origin(environment)


def record_run(path: Path, folder: Path, row: str | None = None, variant: str | None = None) -> None:
    """Add a run folder to a table's file, under a row's name or as what was trained.

    `variant` is what is compared, a key of "variants" in the metrics.json that evaluate.py writes; default: as the run's settings say.

    Raises:
        UserError: if the run is not finished, was made or scored from uncommitted code, or its place holds the run of another command.
    """
    run = RunLog.open(folder)
    config, environment = run.config(), read_json(folder / "env.json")
    made, found = made_with(environment, folder), training_scores(folder, variant)
    scored = read_json(folder / "metrics.json").get("scored", {})  # by evaluate.py, maybe of another commit
    later = made_with({**environment, **scored}, f"the evaluation of {folder}")
    made["commit"] = ", ".join(dict.fromkeys([made["commit"], later["commit"]]))
    command = ["python", *environment["command"]]
    if "--config" not in command:
        raise UserError(f"{folder} was started without --config, so its record could not name its settings: start it with one")
    setup = Setup(config["data"]["dataset"], "full", Path(command[command.index("--config") + 1]).parent, ())
    letters = "".join(MODALITIES[name].letter for name in config["data"]["modalities"])
    record = {
        "row": row or row_name(config), "pair": letters, "setup": describe_setup(setup), "id": run.run_id,
        "stage": "step2" if "rdl" in config else "step1", "seed": config["run"]["seed"], "needs": [], **found,
        **made, "command": " ".join(command),
    }
    place = lambda entry: (entry["row"], entry["pair"], entry["seed"], entry["setup"])  # those of older settings are not shown
    for other in read_records(path):
        if place(other) == place(record) and other["command"] != record["command"]:
            raise UserError(f"{path} holds a run of another command in its place ({other['command']}): give another table, or --row NAME")
    add_records(path, [record])


def load_table(path: Path, protocol: Mapping[str, dict]) -> Table:
    """Read a table's file and what the protocol says of it.

    Of every configuration only records of the newest line's settings are shown, and of those the last one per row, modalities
    and seed: a table never joins runs of different settings. Older lines stay in the file.
    """
    records = read_records(path)
    newest = {record["setup"]["config"]: record["setup"] for record in records}
    shown = {(record["row"], record["pair"], record["seed"]): record for record in records
             if record["row"] is not None and record["setup"] == newest[record["setup"]["config"]]}
    by_id = {record["id"]: record for record in records}
    pairs = tuple(dict.fromkeys(pair for _, pair, _ in shown if len(pair) == 2))
    name, dataset, scale = [*path.stem.rsplit("-", 2), "", ""][:3]
    if name not in protocol["tables"] or scale not in SCALES:
        return Table(path.stem, by_id, shown, pairs)
    setup = find_setup(protocol, dataset, scale)
    options = fitting(protocol["tables"][name], setup)
    numbers = yaml.safe_load((HERE / "paper.yaml").read_text(encoding="utf-8"))
    paper = numbers.get(options.get("paper"), {}).get(setup.paper, {})
    place = ", ".join(filter(None, (dataset, f"{scale} scale", setup.mark)))
    return Table(name, by_id, shown, pairs or setup.pairs, place, options, setup.paper, paper, setup.absent)
