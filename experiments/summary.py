"""Gathers what a row's runs say: scores of clean runs by task and seed, what is missing, the paper's numbers, comparisons."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import permutations
from statistics import mean
from typing import Any

from experiments.protocol import rows_of
from experiments.records import Table
from experiments.statistics import Estimate, compare
from utils.evaluation.tables import scored_tasks
from utils.modalities import MODALITIES, task_name

NOT_RUN, DIRTY = "not run", "dirty tree"
_CROSS = sorted(scored_tasks(MODALITIES), key=lambda pair: not MODALITIES[pair[0]].is_2d)
PAPER_TASKS = [task_name(*pair) for pair in _CROSS]  # one side 2D, the other 3D; 2D queries first
TASKS = [*PAPER_TASKS, *(task_name(*pair) for pair in permutations(MODALITIES, 2) if pair not in _CROSS)]


@dataclass
class Summary:
    """One row: task -> seed -> score (fraction) of clean runs, "avg" among the tasks; what is missing, and where it was run."""

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


def summarize(table: Table) -> list[Summary]:
    """Return the rows of a table: those of the protocol in its order, then others in the order of their records."""
    options, names = rows_of(table.options), dict.fromkeys(row for row, _, _ in table.shown)
    seeds = sorted({seed for _, _, seed in table.shown})
    found = []
    for name in dict.fromkeys([*options, *names]):
        own = dict.fromkeys(pair for row, pair, _ in table.shown if row == name and len(pair) > 2)
        found.append(_summarize(table, Summary(name, options.get(name, {})), list(own) or table.pairs, seeds))
    return found


def _summarize(table: Table, summary: Summary, pairs: Sequence[str], seeds: Sequence[int]) -> Summary:
    """Gather a row's clean runs; a seed counts as dirty if a run that its scores rest on was made from a dirty tree."""
    for seed in seeds:
        chains = {pair: chain_of(table, table.shown.get((summary.name, pair, seed))) for pair in pairs}
        states = {pair: NOT_RUN if None in chain else DIRTY if any(entry["dirty"] for entry in chain) else ""
                  for pair, chain in chains.items()}
        scores: dict[str, float] = {}
        for chain in (chains[pair] for pair, state in states.items() if not state):
            found = chain[0].get("scores", {})
            scores |= {task: found[f"map/{task}"] for task in TASKS if f"map/{task}" in found}
            summary.records += chain
        for task, score in scores.items():
            summary.scores.setdefault(task, {})[seed] = score
        if any(states.values()):
            summary.missing[DIRTY if DIRTY in states.values() else NOT_RUN].append(seed)
        elif scores:
            own = [score for task, score in scores.items() if task in PAPER_TASKS] or list(scores.values())
            summary.scores.setdefault("avg", {})[seed] = mean(own)
            spent = (entry.get("seconds", entry.get("train_seconds")) for chain in chains.values() for entry in chain)
            summary.seconds.append(sum(spent))
    return summary


def chain_of(table: Table, record: dict | None) -> list[dict | None]:
    """Return a record and all that it needs; None for one that was not run."""
    needs = record["needs"] if record else []
    return [record, *(entry for need in needs for entry in chain_of(table, table.records.get(need)))]


def trusted(table: Table) -> list[dict]:
    """Return the shown records whose whole chain was run from a clean tree."""
    return [record for record in table.shown.values()
            if all(entry is not None and not entry["dirty"] for entry in chain_of(table, record))]


def tasks_of(table: Table, summaries: Sequence[Summary]) -> list[str]:
    """Return the tasks of a table, the paper's first, 2D queries before 3D queries."""
    return [task for task in TASKS if {task, task[::-1]} & set(table.pairs) or any(task in entry.scores for entry in summaries)]


def paper_score(table: Table, options: Mapping[str, Any], task: str, tasks: Sequence[str]) -> float | None:
    """Return the paper's number of a row on a task; "avg" is printed, or the mean over the tasks shown."""
    row = options.get("numbers", options.get("paper"))
    find = lambda name: table.paper.get(name, {}).get(row)
    if task == "avg" and find("avg") is None:
        parts = [find(name) for name in tasks]
        return mean(parts) if parts and None not in parts else None
    return find(task)


def comparison(summary: Summary, summaries: Sequence[Summary], table: Table) -> Estimate | None:
    """Return the paired comparison of a row's averages with those of its baseline; None for the baseline itself."""
    other = summary.options.get("against", table.options.get("baseline"))
    if other in (None, summary.name):
        return None
    return compare(summary.scores.get("avg", {}), {entry.name: entry for entry in summaries}[other].scores.get("avg", {}))
