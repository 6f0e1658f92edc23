"""Gathers what a row's runs say: scores of clean runs by task and seed, what is missing, the paper's numbers, comparisons."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import permutations
from statistics import mean, stdev
from typing import Any

from scipy import stats

from experiments.protocol import rows_of
from experiments.records import DIRTY, NOT_RUN, Table
from utils.evaluation.tables import scored_tasks
from utils.modalities import MODALITIES, task_name

_CROSS = sorted(scored_tasks(MODALITIES), key=lambda pair: not MODALITIES[pair[0]].is_2d)
PAPER_TASKS = [task_name(*pair) for pair in _CROSS]  # one side 2D, the other 3D; 2D queries first
TASKS = [*PAPER_TASKS, *(task_name(*pair) for pair in permutations(MODALITIES, 2) if pair not in _CROSS)]
LEVEL, MIN_PAIRS = 0.95, 3


@dataclass(frozen=True)
class Estimate:
    """A mean over n values, their standard deviation (n - 1), and the confidence interval of the mean; None where n is too small."""

    n: int
    mean: float | None = None
    std: float | None = None
    low: float | None = None
    high: float | None = None

    @property
    def verdict(self) -> str:
        """Of differences: "n/a", "better", "worse", or "within noise" if the interval holds 0, whatever the sign of the mean."""
        if self.low is None:
            return "n/a"
        return "within noise" if self.low <= 0 <= self.high else "better" if self.mean > 0 else "worse"


def estimate(values: Sequence[float]) -> Estimate:
    """Return mean, standard deviation and the 95 % interval of Student's t of independent values, at least one."""
    if len(values) == 1:
        return Estimate(1, values[0])
    center, spread = mean(values), stdev(values)
    half = float(stats.t.ppf((1 + LEVEL) / 2, len(values) - 1)) * spread / math.sqrt(len(values))
    return Estimate(len(values), center, spread, center - half, center + half)


def compare(ours: Mapping[int, float], others: Mapping[int, float]) -> Estimate:
    """Estimate ours - others, seed by seed, on the seeds that both rows (seed -> score) have; fewer than 3 give n alone."""
    shared = sorted(ours.keys() & others.keys())
    return estimate([ours[seed] - others[seed] for seed in shared]) if len(shared) >= MIN_PAIRS else Estimate(len(shared))


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
    def title(self) -> str:
        """The row's name, marked if one of its runs, or one that they rest on, has read labels and the name does not say so."""
        silent = "reads labels" not in self.name.lower()
        return self.name + ", READS LABELS" * (silent and any(map(reads_labels, self.records)))


def reads_labels(record: Mapping[str, Any]) -> bool:
    """Whether a run, its start or its features read labels; older records of compared methods say what they read in "details" alone."""
    details = record.get("details") or {}
    said = record.get("reads_labels") or details.get("reads_labels")
    return bool(said) or str(details.get("reads", "")).startswith(("labels", "source labels", "noisy labels"))


def summarize(table: Table) -> list[Summary]:
    """Return the rows of a table: those of the protocol in its order, then others in the order of their records."""
    options, seeds = rows_of(table.options), sorted({seed for _, _, seed in table.shown})
    summaries = []
    for name in dict.fromkeys([*options, *(row for row, _, _ in table.shown)]):
        own = dict.fromkeys(pair for row, pair, _ in table.shown if row == name and len(pair) > 2)
        summaries.append(Summary(name, options.get(name, {})))
        for seed in seeds:
            _add_seed(summaries[-1], table, [table.shown.get((name, pair, seed)) for pair in own or table.pairs], seed)
    return summaries


def _add_seed(summary: Summary, table: Table, records: Sequence[dict | None], seed: int) -> None:
    """Gather a row's clean runs of a seed, one per pair; it has an average if all of them are clean."""
    faults, scores, seconds = [table.fault(record) for record in records], {}, []
    for record, fault in zip(records, faults):
        if not fault:
            found, chain = record.get("scores", {}), table.chain(record)
            scores |= {task: found[f"map/{task}"] for task in TASKS if f"map/{task}" in found}
            summary.records += chain
            seconds += [entry.get("seconds", entry.get("train_seconds")) for entry in chain if entry["stage"] != "features"]
    if any(faults):
        summary.missing[DIRTY if DIRTY in faults else NOT_RUN].append(seed)
    elif scores:
        scores["avg"] = mean([score for task, score in scores.items() if task in PAPER_TASKS] or scores.values())
        summary.seconds.append(sum(seconds))
    for task, score in scores.items():
        summary.scores.setdefault(task, {})[seed] = score


def tasks_of(table: Table, summaries: Sequence[Summary]) -> list[str]:
    """Return the tasks of a table, the paper's first, 2D queries before 3D queries."""
    pairs = [*table.pairs, *table.absent]
    return [task for task in TASKS if {task, task[::-1]} & set(pairs) or any(task in entry.scores for entry in summaries)]


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
