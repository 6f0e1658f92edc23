"""Renders a table's manifest and the records of its cells as Markdown and CSV. Nothing in them is typed by hand."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from experiments import plots
from experiments.results import read_cells
from experiments.statistics import Comparison, Estimate, estimate
from experiments.summary import DIRTY, NOT_RUN, Summary, clean, comparison, paper_score, summarize, tasks_of
from utils.engine.checkpoint import atomic_write_text

CSV_HEADS = (
    "row task paper mean std ci95_low ci95_high n seeds against difference difference_low difference_high verdict wall_seconds "
    "device commit"
).split()
DRAWN = {"sensitivity": plots.draw_sensitivity, "curves": plots.draw_curves, "shapes": plots.draw_shapes}


def render(path: Path, manifest: Mapping[str, Any]) -> list[Path]:
    """Write the Markdown, the CSV and, for a figure, the PNG beside a manifest.

    Args:
        path: of the manifest; the records lie in cells/ beside it.
        manifest: its content.
    Returns:
        The files written.
    """
    records, kind = read_cells(path.parent, manifest), manifest.get("kind", "scores")
    trusted = clean(records)
    written, lines, rows = [path.with_suffix(".md")], [], []
    if kind == "memory":
        rows = memory_rows(manifest, trusted, records)
        lines = _markdown(rows)
    elif kind == "shapes":
        rows = shape_rows(manifest, trusted)
    else:
        summaries = [summarize(row, records) for row in manifest["rows"]]
        lines, rows = score_table(manifest, summaries), long_rows(manifest, summaries)
    if kind in DRAWN:
        picture = path.with_suffix(".png")
        drawn = DRAWN[kind](manifest, trusted, picture)
        lines += ["", f"![{manifest['title']}]({picture.name})" if drawn else f"figure: {DIRTY if records else NOT_RUN}"]
        written += [picture] if drawn else []
        lines += ["", _run_on(trusted.values())] if drawn and kind == "shapes" else []
    title = f"**{manifest['title']}**: {manifest['dataset']}, {manifest['scale']} scale (`{manifest['config']}`)"
    notes = [f"- {note}" for note in manifest.get("notes", [])]
    parts = [title, *([""] if lines[0] else []), *lines, "", *notes, *([""] if notes else []), f"`{manifest['command']}`"]
    atomic_write_text(written[0], "\n".join(parts) + "\n")
    if rows:
        stream = io.StringIO()
        csv.writer(stream, lineterminator="\n").writerows(rows)
        atomic_write_text(path.with_suffix(".csv"), stream.getvalue())
        written.append(path.with_suffix(".csv"))
    return written


def memory_rows(manifest: Mapping[str, Any], trusted: Mapping[str, dict], records: Mapping[str, dict]) -> list[list[str]]:
    """Return the lines of Table IX: exact bytes of every bank, seconds with and without it, and the paper's."""
    paper = manifest["paper"]
    beside = f"paper ({manifest['paper_dataset']})"
    heads = ["bytes", "MiB", f"MiB, {beside}", "seconds per epoch, with", f"with, {beside}", "without", f"without, {beside}"]
    lines = [["bank", *heads, "device", "commit"]]
    for row in manifest["rows"]:
        cell = row["cells"]["0"][""]
        found = trusted.get(cell)
        state = DIRTY if cell in records else NOT_RUN
        ours = found["measured"] if found else {}
        show = lambda key, style: format(ours[key], style) if found else state  # noqa: B023, E731
        lines.append([
            row["name"], show("bytes", ","), show("mib", ".3f"), str(paper.get("mib", "")), show("update_seconds", ".2e"),
            _seconds(paper.get("time_with_bank_s")), show("fill_seconds", ".2e"), _seconds(paper.get("time_without_bank_s")),
            *((found["device"], _commits([found])) if found else ("", "")),
        ])
    return lines


def shape_rows(manifest: Mapping[str, Any], trusted: Mapping[str, dict]) -> list[list]:
    """Return the lines of Figure 3's CSV: every loss and its slope at every p; none if its cell was not run."""
    record = trusted.get(manifest["rows"][0]["cells"]["0"][""])
    if record is None:
        return []
    found = record["measured"]
    points = [(name, *point) for name, curve in found["curves"].items() for point in zip(found["p"], curve["loss"], curve["slope"])]
    return [["name", "p", "loss", "slope"], *points]


def score_table(manifest: Mapping[str, Any], summaries: Sequence[Summary]) -> list[str]:
    """Return the lines of a Markdown table: the paper's number beside mean ± std [95 % interval], in percent."""
    tasks = tasks_of(manifest)
    columns = [*tasks, "avg"]
    known = [task for task in columns if any(paper_score(manifest, row, task, tasks) is not None for row in manifest["rows"])]
    heads = ["row"]
    for task in columns:
        heads += [f"{task}, paper ({manifest['paper_dataset']})"] * (task in known) + [task]
    compared = "baseline" in manifest
    rows = [[*heads, *(["avg, difference"] if compared else []), "seeds", "wall time", "device", "commit"]]
    for summary in summaries:
        cells = [summary.name]
        for task in columns:
            printed = paper_score(manifest, summary.options, task, tasks)
            cells += ["" if printed is None else f"{100 * printed:.1f}"] * (task in known)
            values = list(summary.scores.get(task, {}).values())
            cells.append(_percent(estimate(values)) if values else summary.state)
        cells += [_difference(*comparison(summary, summaries, manifest))] if compared else []
        rows.append([*cells, *_origin(summary)])
    return [*_markdown(rows), *(_ranking(manifest, summaries, tasks) if manifest.get("ranking") else [])]


def long_rows(manifest: Mapping[str, Any], summaries: Sequence[Summary]) -> list[list]:
    """Return the lines of the CSV, one per row and task; scores as fractions, an empty field for what is not there."""
    tasks, lines = tasks_of(manifest), [CSV_HEADS]
    for summary in summaries:
        other, found = comparison(summary, summaries, manifest)
        seeds, _, device, commit = _origin(summary)
        for task in [*tasks, "avg"]:
            values = list(summary.scores.get(task, {}).values())
            ours = estimate(values) if values else Estimate(0, None, None, None, None)
            paired = found if task == "avg" else None
            bounds = paired.difference if paired and paired.difference else Estimate(0, None, None, None, None)
            verdict = (paired.verdict if paired else None) if values else summary.state
            seconds = round(mean(summary.seconds), 1) if summary.seconds else None
            lines.append([
                summary.name, task, paper_score(manifest, summary.options, task, tasks), ours.mean, ours.std, ours.low,
                ours.high, ours.n, seeds, other if task == "avg" else None, bounds.mean, bounds.low, bounds.high, verdict,
                seconds, device, commit,
            ])
    return lines


def _ranking(manifest: Mapping[str, Any], summaries: Sequence[Summary], tasks: Sequence[str]) -> list[str]:
    """Our order of the rows beside the paper's, and what of it is more than noise."""
    ours = {entry.name: mean(entry.scores["avg"].values()) for entry in summaries if entry.scores.get("avg")}
    printed = {entry.options.get("paper"): paper_score(manifest, entry.options, "avg", tasks) for entry in summaries}
    names = {entry.options.get("paper"): entry.name for entry in reversed(summaries)}
    paper = {names[key]: score for key, score in printed.items() if score is not None}
    order = lambda scores: " > ".join(sorted(scores, key=lambda name: -scores[name])) or NOT_RUN  # noqa: E731
    verdicts: dict[str, list[str]] = {}
    for entry in summaries:
        found = comparison(entry, summaries, manifest)[1]
        if found and entry.name in ours:
            verdicts.setdefault("n/a, fewer than 3 seeds" if found.verdict == "n/a" else found.verdict, []).append(entry.name)
    said = "; ".join(f"{verdict}: {', '.join(names)}" for verdict, names in verdicts.items())
    return ["", f"- Order of the means, ours: {order(ours)}", *([f"- Order of the means, paper: {order(paper)}"] if paper else []),
            f"- Against {manifest['baseline']}, paired over seeds: {said or NOT_RUN}"]


def _markdown(rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(map(str, row))} |" for row in rows]
    return [lines[0], "| --- |" + " --- |" * (len(rows[0]) - 1), *lines[1:]]


def _percent(found: Estimate) -> str:
    if found.n == 1:
        return f"{100 * found.mean:.1f}"
    return f"{100 * found.mean:.1f} ± {100 * found.std:.1f} [{100 * found.low:.1f}, {100 * found.high:.1f}]"


def _difference(other: str | None, found: Comparison | None) -> str:
    """The mean paired difference in points with its interval; the verdict alone would hide how wide the noise is."""
    if found is None or found.difference is None:
        return found.verdict if found and found.n else ""
    bounds = found.difference
    text = f"{100 * bounds.mean:+.1f} [{100 * bounds.low:+.1f}, {100 * bounds.high:+.1f}]"
    return f"within noise ({text})" if found.verdict == "within noise" else text


def _origin(summary: Summary) -> list[str]:
    """Seeds, wall time, devices and commits of a row's runs; seeds that do not count are named with the reason."""
    seeds = [", ".join(map(str, sorted(summary.scores.get("avg", {}))))]
    seeds += [f"{state}: {', '.join(map(str, sorted(found)))}" for state, found in summary.missing.items() if found]
    time = f"{mean(summary.seconds) / 60:.1f} min" if summary.seconds else ""
    devices = sorted({f"{entry['device']}{', 1 thread' if entry['threads'] == 1 else ''}" for entry in summary.records})
    return ["; ".join(filter(None, seeds)), time, "; ".join(devices), _commits(summary.records)]


def _run_on(records: Iterable[Mapping[str, Any]]) -> str:
    records = list(records)
    return f"{', '.join(sorted({entry['device'] for entry in records}))}, {_commits(records)}"


def _commits(records: Sequence[Mapping[str, Any]]) -> str:
    found = {commit[:7] for entry in records for commit in entry["commit"].split(", ")}
    return ", ".join(f"`{commit}`" for commit in sorted(found))


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"
