"""Renders a table's records as Markdown. Nothing in it is typed by hand."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from scipy import stats

from experiments import plots
from experiments.records import DIRTY, NOT_RUN, Table, load_table
from experiments.summary import Estimate, Summary, comparison, estimate, paper_score, summarize, tasks_of
from utils.evaluation.report import clusters_of
from utils.files import atomic_write_text

FACTS = ("batch_size", "learning_rate", "lambda_1", "lambda_2", "alpha")
NO_DATA = "not run: data"  # a task of the paper whose samples cannot be had
PLACES = {"head scale": "features", "full scale": "end to end"}  # of a comparison's averages
DRAWN = {"sensitivity": plots.draw_sensitivity, "curves": plots.draw_curves, "shapes": plots.draw_shapes}


def render(path: Path, protocol: Mapping[str, dict]) -> list[Path]:
    """Write the Markdown and, for a figure, the PNG beside a table's records; return the files written."""
    table, picture = load_table(path, protocol), path.with_suffix(".png")
    lines, written = table_lines(table), [path.with_suffix(".md")]
    if draw := DRAWN.get(table.options.get("kind")):
        drawn = draw(table, picture)
        lines += ["", f"![{table.options['title']}]({picture.name})" if drawn else f"figure: {DIRTY if table.shown else NOT_RUN}"]
        written += [picture] if drawn else []
    atomic_write_text(written[0], "\n".join(lines) + "\n")
    return written


def table_lines(table: Table) -> list[str]:
    """Return a table as lines of Markdown: title, settings, rows, notes and the command that fills it."""
    options = table.options
    places = lambda table: ["", *(f"{record['device']}, {_commits([record])}" for record in table.trusted())]
    body = {"memory": memory_lines, "shapes": places}.get(options.get("kind"), score_lines)(table)
    title = f"**{options.get('title', table.name)}**" + (f": {table.place}" if table.place else "")
    calls = [f"`{record['call']}`" for record in table.shown.values() if "call" in record][-1:]
    parts = [[title], [*_settings_lines(table), *body], [f"- {note}" for note in options.get("notes", [])], calls]
    return "\n\n".join("\n".join(part).strip("\n") for part in parts if part).split("\n")


def average_lines(tables: Sequence[Table]) -> list[str]:
    """Return the averages of several tables' rows side by side, the paper's in front of the first table on a data set of the paper."""
    columns: dict[str, dict[str, str]] = {}
    for table in tables:
        summaries = summarize(table)
        tasks = tasks_of(table, summaries)
        printed = {entry.title: _printed(table, entry, "avg", tasks) for entry in summaries if "paper" in entry.options}
        if printed:
            columns.setdefault(f"paper, {table.paper_dataset}", printed)
        words = (table.place or table.name).split(", ")[:2]
        ours = {entry.title: _score(entry, "avg").partition(" [")[0] for entry in summaries}
        head = ", ".join(PLACES.get(word, word) for word in words)
        columns[f"{head} ({table.name})" if head in columns else head] = ours
    rows = dict.fromkeys(row for column in columns.values() for row in column)
    return markdown([["row", *columns], *([row, *(column.get(row, "") for column in columns.values())] for row in rows)])


def markdown(rows: Sequence[Sequence[object]]) -> list[str]:
    """Return a table, its head first, as lines of Markdown."""
    lines = [f"| {' | '.join(map(str, row))} |" for row in rows]
    return [lines[0], "| --- |" + " --- |" * (len(rows[0]) - 1), *lines[1:]]


def _settings_lines(table: Table) -> list[str]:
    """Say which settings the rows start from, one line per configuration."""
    used = [entry for shown in table.shown.values() for entry in table.chain(shown) if entry]
    head = "Settings of RoMo" if any(entry["stage"] == "baseline" for entry in used) else "Settings"  # compared methods have their own
    lines = []
    for config, setup in {record["setup"]["config"]: record["setup"] for record in used}.items():
        lengths = [sorted({record["epochs"] for record in used if record["stage"] == stage and record["setup"] == setup})
                   for stage in ("step1", "step2")]
        if epochs := " + ".join("/".join(map(str, found)) for found in lengths if found):
            whose = "the paper's as printed" if config.removesuffix("_cpu").endswith("_paper") else "ours, not the paper's"
            size = ", inputs and encoders in CPU size" if config.endswith("_cpu") else ""
            clusters = [clusters_of(setup["num_clusters"])] if "num_clusters" in setup else []  # older records do not say
            facts = [f"{key.replace('_size', '').replace('_rate', ' rate')} {setup[key]:g}" for key in FACTS]
            lines.append(f"- {head}: {whose}{size} (`{config}`): {', '.join([f'{epochs} epochs', *facts, *clusters])}")
    return lines


def score_lines(table: Table) -> list[str]:
    """Return a table of mAP: the paper's number beside mean ± std, of the average also [95 % interval], in percent.

    One device of all rows is said once above the table, several in a column.
    """
    summaries = summarize(table)
    tasks = tasks_of(table, summaries)
    columns = [*tasks, "avg"]
    known = {task for task in columns if any("paper" in entry.options and _printed(table, entry, task, tasks) for entry in summaries)}
    wanted = [key for key in table.options.get("logged", ()) if len(table.pairs) == 1 or "/" in key]
    logged = [key for key in wanted if any(_logged(key, entry) for entry in summaries)]
    compared = ["avg, difference"] if "baseline" in table.options or any("against" in entry.options for entry in summaries) else []
    heads = [head for task in columns for head in [f"{task}, paper ({table.paper_dataset})"] * (task in known) + [task]]
    places = {entry.name: _devices(entry) for entry in summaries}
    several = len({place for place in places.values() if place}) > 1
    rows = [["row", *heads, *compared, *logged, "seeds", "wall time", *["device"] * several, "commit"]]
    found = [record["scores"] for entry in summaries for record in entry.records]
    if chances := [scores["map/chance"] for scores in found if "map/chance" in scores]:
        level = [f"{100 * mean(chances):.1f}" if head in columns else "" for head in heads]
        rows.append(["chance", *level, *[""] * (len(rows[0]) - 1 - len(heads))])
    for entry in summaries:
        cells = [entry.title]
        for task in columns:
            printed = _printed(table, entry, task, tasks)
            cells += [printed * ("paper" in entry.options)] * (task in known)
            cells.append(printed if "numbers" in entry.options else NO_DATA if _no_data(table, task) else _score(entry, task))
        cells += [_difference(comparison(entry, summaries, table))] if compared else []
        seeds, time, commits = _origin(entry)
        rows.append([*cells, *(_percent(_logged(key, entry)) for key in logged), seeds, time, *[places[entry.name]] * several, commits])
    above = [f"- Device: {place}" for place in {*places.values()} if place and not several]
    return [*above, "", *markdown(rows), *(["", *_ranking(table, summaries, tasks)] if table.options.get("ranking") else [])]


def _printed(table: Table, entry: Summary, task: str, tasks: Sequence[str]) -> str:
    """The paper's number of a row; its average is over the tasks that can be run, as ours is, or over all where none can."""
    number = paper_score(table, entry.options, task, _with_data(table, tasks) or tasks)
    return "" if number is None else f"{100 * number:.1f}"


def _no_data(table: Table, task: str) -> bool:
    """Whether a task's samples cannot be had; of the average, whether those of all tasks cannot."""
    return bool({task, task[::-1]} & set(table.absent)) or (task == "avg" and bool(table.absent) and not table.pairs)


def _with_data(table: Table, tasks: Sequence[str]) -> list[str]:
    """The tasks whose samples can be had."""
    return [task for task in tasks if not _no_data(table, task)]


def _score(entry: Summary, task: str) -> str:
    """A cell of a table; empty where a row's modalities have no such task."""
    absent = DIRTY if entry.missing[DIRTY] else "" if entry.scores and not entry.missing[NOT_RUN] else NOT_RUN
    return _percent(list(entry.scores.get(task, {}).values()), interval=task == "avg") or absent


def _logged(key: str, entry: Summary) -> list[float]:
    """The values that a row's own runs (not those they rest on) logged beside mAP, e.g. agreement: one per seed, mean over the pairs."""
    by_seed: dict[int, list[float]] = {}
    for record in entry.records:
        if record["stage"] == entry.records[0]["stage"] and key in record["scores"]:
            by_seed.setdefault(record["seed"], []).append(record["scores"][key])
    return [mean(values) for values in by_seed.values()]


def memory_lines(table: Table) -> list[str]:
    """Return Table IX: exact bytes of every bank, seconds with and without it, and the paper's."""
    beside = f"paper ({table.paper_dataset})"
    columns = [  # title, key of what was measured or of the paper's number, format
        ("bytes", "bytes", ","), ("MiB", "mib", ".3f"), (f"MiB, {beside}", "paper mib", ""),
        ("seconds per epoch, with", "update_seconds", ".2e"), (f"with, {beside}", "paper time_with_bank_s", ".1e"),
        ("without", "fill_seconds", ".2e"), (f"without, {beside}", "paper time_without_bank_s", ".1e"),
    ]
    lines = [["bank", *(title for title, _, _ in columns), "device", "commit"]]
    for (name, _, _), record in table.shown.items():
        clean = not table.fault(record)
        found = {f"paper {key}": number for key, number in table.paper.items()} | (record["measured"] if clean else {})
        cells = [format(found[key], style) if key in found else "" if "paper" in key else DIRTY for _, key, style in columns]
        lines.append([name, *cells, *((record["device"], _commits([record])) if clean else ("", ""))])
    return ["", *markdown(lines)]


def _ranking(table: Table, summaries: Sequence[Summary], tasks: Sequence[str]) -> list[str]:
    """Our order of the rows beside the paper's, and what of it is more than noise."""
    ours = {entry.title: mean(entry.scores["avg"].values()) for entry in summaries if entry.scores.get("avg")}
    first = {entry.options.get("paper"): entry for entry in reversed(summaries)}  # several rows may stand for one of the paper's
    tasks = _with_data(table, tasks)  # the paper's order, too, is that on what can be run
    printed = {entry.title: paper_score(table, entry.options, "avg", tasks) for entry in summaries if entry in first.values()}
    paper = {name: score for name, score in printed.items() if score is not None}
    order = lambda scores: " > ".join(sorted(scores, key=lambda name: -scores[name])) or NOT_RUN
    verdicts: dict[str, list[str]] = {}
    for entry in summaries:
        found = comparison(entry, summaries, table)
        if found and entry.title in ours:
            verdicts.setdefault(found.verdict, []).append(entry.title)
    fewer = verdicts.pop("n/a", [])
    parts = [*verdicts.items(), *[("fewer than 3 seeds", fewer if verdicts else ["every row"])] * bool(fewer)]
    said = "; ".join(f"{verdict}: {', '.join(names)}" for verdict, names in parts)
    both = [name for name in paper if name in ours]
    tau = stats.kendalltau([ours[name] for name in both], [paper[name] for name in both]).statistic if len(both) > 2 else None
    return [f"- Order of the means, ours: {order(ours)}", *([f"- Order of the means, paper: {order(paper)}"] if paper else []),
            *([] if tau is None else [f"- Kendall's tau between both orders, {len(both)} rows: {tau:.2f}"]),
            f"- Against {table.options['baseline']}, paired over seeds: {said or NOT_RUN}"]


def _percent(values: Sequence[float], interval: bool = False) -> str:
    if len(values) < 2:
        return "".join(f"{100 * value:.1f}" for value in values)
    found = estimate(values)
    return f"{100 * found.mean:.1f} ± {100 * found.std:.1f}" + f" [{100 * found.low:.1f}, {100 * found.high:.1f}]" * interval


def _difference(found: Estimate | None) -> str:
    """The mean paired difference in points with its interval; the verdict alone would hide how wide the noise is."""
    if found is None or found.mean is None:
        return found.verdict if found and found.n else ""
    text = f"{100 * found.mean:+.1f} [{100 * found.low:+.1f}, {100 * found.high:+.1f}]"
    return f"within noise ({text})" if found.verdict == "within noise" else text


def _origin(entry: Summary) -> list[str]:
    """Seeds, wall time and commits of a row's runs; seeds that do not count are named with the reason."""
    if "numbers" in entry.options:
        return [""] * 3
    groups = {"": entry.scores.get("avg", {}), **{f"{fault}: ": seeds for fault, seeds in entry.missing.items()}}
    seeds = [f"{head}{', '.join(map(str, sorted(found)))}" for head, found in groups.items() if found]
    time = f"{mean(entry.seconds) / 60:.1f} min" if entry.seconds else ""
    return ["; ".join(seeds), time, _commits(entry.records)]


def _devices(entry: Summary) -> str:
    """Devices of a row's runs."""
    threads = lambda count: "" if count is None else f", {count} thread{'s' * (count > 1)}"
    return "; ".join(sorted({record["device"] + threads(record["threads"]) for record in entry.records}))


def _commits(records: Sequence[Mapping[str, Any]]) -> str:
    found = {commit[:7] for record in records for commit in record["commit"].split(", ")}
    return ", ".join(f"`{commit}`" for commit in sorted(found))
