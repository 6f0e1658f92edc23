"""Gathers what a row's cells say: scores of clean cells by task and seed, what is missing, the paper's numbers, comparisons."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import mean
from typing import Any

from experiments.statistics import Comparison, compare
from utils.errors import UserError

NOT_RUN, DIRTY = "not run", "dirty tree"


@dataclass
class Summary:
    """One row: task -> seed -> score (fraction) of clean cells, "avg" among the tasks; what is missing, and where it was run."""

    name: str
    options: Mapping[str, Any]
    scores: dict[str, dict[int, float]] = field(default_factory=dict)
    missing: dict[str, list[int]] = field(default_factory=lambda: {NOT_RUN: [], DIRTY: []})
    records: list[dict] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    @property
    def state(self) -> str:
        """What to show in place of a score that is not there."""
        return DIRTY if self.missing[DIRTY] else NOT_RUN


def summarize(row: Mapping[str, Any], records: Mapping[str, dict]) -> Summary:
    """Gather a row's clean cells; a seed counts as dirty if a run that its scores rest on was made from a dirty tree."""
    summary = Summary(row["name"], row)
    for seed, pairs in ((int(seed), pairs) for seed, pairs in row["cells"].items()):
        chains = {pair: _chain(cell, records) for pair, cell in pairs.items()}
        states = {pair: NOT_RUN if None in chain else DIRTY if any(entry["dirty"] for entry in chain) else ""
                  for pair, chain in chains.items()}
        for pair in (pair for pair, state in states.items() if not state):
            for task in dict.fromkeys((pair, pair[::-1])):
                summary.scores.setdefault(task, {})[seed] = chains[pair][0]["scores"][f"map/{task}"]
            summary.records += chains[pair]
        worst = DIRTY if DIRTY in states.values() else NOT_RUN if NOT_RUN in states.values() else ""
        if worst:
            summary.missing[worst].append(seed)
        else:
            tasks = [task for pair in pairs for task in dict.fromkeys((pair, pair[::-1]))]
            summary.scores.setdefault("avg", {})[seed] = mean(summary.scores[task][seed] for task in tasks)
            summary.seconds.append(sum(entry["seconds"] for chain in chains.values() for entry in chain))
    return summary


def _chain(cell: str, records: Mapping[str, dict]) -> list[dict | None]:
    """The record of a cell and of all it needs; None for one that was not run."""
    record = records.get(cell)
    return [record] + [entry for need in (record["needs"] if record else []) for entry in _chain(need, records)]


def clean(records: Mapping[str, dict]) -> dict[str, dict]:
    """Return the records whose whole chain was run from a clean tree."""
    return {cell: record for cell, record in records.items()
            if all(entry is not None and not entry["dirty"] for entry in _chain(cell, records))}


def paper_score(manifest: Mapping[str, Any], row: Mapping[str, Any], task: str, tasks: Sequence[str]) -> float | None:
    """Return the paper's number of a row on a task; "avg" is printed, or the mean over the tasks shown."""
    numbers = manifest["paper"]
    find = lambda name: numbers.get(name, {}).get(row.get("paper"))  # noqa: E731
    if task == "avg" and find("avg") is None:
        parts = [find(name) for name in tasks]
        return mean(parts) if parts and None not in parts else None
    return find(task)


def tasks_of(manifest: Mapping[str, Any]) -> list[str]:
    """Return the tasks of a table, 2D queries first."""
    pairs = next(iter(manifest["rows"][0]["cells"].values()))
    return [*pairs, *(pair[::-1] for pair in pairs)]


def comparison(
    summary: Summary, summaries: Sequence[Summary], manifest: Mapping[str, Any]
) -> tuple[str | None, Comparison | None]:
    """Return the row that this one is compared with, and the paired comparison of the averages; None for the baseline itself."""
    other = summary.options.get("against", manifest.get("baseline"))
    if other in (None, summary.name):
        return None, None
    found = {entry.name: entry for entry in summaries}
    if other not in found:
        raise UserError(f"row {summary.name!r} is compared with {other!r}, which the table lacks; rows: {', '.join(found)}")
    return other, compare(summary.scores.get("avg", {}), found[other].scores.get("avg", {}))
