"""Published numbers: `collect` copies finished runs into results/, `tables` rewrites the tables of README.md and docs/*.md.

Tables stand between `<!-- table: NAME -->` and `<!-- end -->`; NAME is a folder of results/. `benchmark: NAME` takes
results/benchmarks/NAME-*.json, and `reproduce: NAME` the results/NAME.md that reproduce.py rendered. Nothing in them is typed by hand.
"""

import argparse
import json
import re
import sys
from collections import defaultdict
from itertools import permutations
from pathlib import Path
from statistics import mean, stdev

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from utils.engine.checkpoint import atomic_write_json, atomic_write_text  # noqa: E402
from utils.engine.run_log import RunLog  # noqa: E402
from utils.errors import UserError
from utils.evaluation.report import row_name  # noqa: E402
from utils.evaluation.tables import scored_tasks  # noqa: E402
from utils.modalities import MODALITIES, task_name  # noqa: E402

BENCHMARK_FACTS = ("speedup", "memory_ratio", "largest_relative_difference", "difference", "differences", "seconds_per_epoch",
                   "extrapolated_seconds", "mean_seconds", "modelnet40_hours_extrapolated")
PAIRS = sorted(permutations(MODALITIES, 2), key=lambda pair: (pair not in scored_tasks(MODALITIES), not MODALITIES[pair[0]].is_2d))
TASKS = [f"map/{task_name(*pair)}" for pair in PAIRS]  # the paper's first: one side 2D, the other 3D
PAPER_TASKS = [f"map/{task_name(*pair)}" for pair in scored_tasks(MODALITIES)]


def collect(folder: Path, name: str) -> Path:
    """Copy what a finished run shows into results/<name>/.

    Args:
        folder: run folder with all its epochs done.
        name: folder below results/, one per table.
    Returns:
        The JSON file written.
    Raises:
        UserError: if the run is not finished or was made from uncommitted code.
    """
    run = RunLog.open(folder)
    config, epochs = run.config(), run.read_epochs()
    environment = json.loads((folder / "env.json").read_text())
    if not epochs or epochs[-1]["epoch"] != config["optim"]["epochs"]:
        raise UserError(f"{folder} is not finished: {len(epochs)} of {config['optim']['epochs']} epochs")
    if environment["git_dirty"] is not False:
        raise UserError(f"{folder} was made from uncommitted code, its commit would not repeat it")
    metrics = json.loads((folder / "metrics.json").read_text())
    scores = {key: value for key, value in metrics.items() if isinstance(value, float)}
    logged = {key: epochs[-1][key] for key in ("agreement", "cross_nmi", "clipped") if key in epochs[-1]}
    row = row_name(config)
    result = {
        "row": row, "dataset": config["data"]["dataset"], "modalities": config["data"]["modalities"], "seed": config["run"]["seed"], "epochs": config["optim"]["epochs"],
        "scores": {**scores, **logged}, "train_seconds": round(sum(line["seconds/train"] for line in epochs), 1),
        "command": " ".join(["python", *environment["command"]]), "commit": environment["git_sha"],
        "device": environment["gpu"] or environment["cpu"], "threads": environment["threads"], "torch": environment["torch"],
    }
    slug = re.sub(r"[^a-z0-9]+", "-", row.lower()).strip("-")
    letters = "".join(MODALITIES[entry].letter for entry in config["data"]["modalities"]).lower()
    path = ROOT / "results" / name / f"{slug}-{letters}-seed{result['seed']}.json"
    before = json.loads(path.read_text())["command"] if path.is_file() else result["command"]
    if before != result["command"]:
        raise UserError(f"{path} holds the run of another command ({before}); use another table, or delete that file first")
    atomic_write_json(path, result)
    return path


def table(name: str) -> str:
    """Return a Markdown table of results/<name>/: one line per row name, mean and deviation over seeds.

    Runs of one row and seed on different pairs of modalities fill different task columns; `avg` is the mean over the row's
    2D-3D tasks, `training` the sum over its runs.
    """
    results = [json.loads(path.read_text()) for path in sorted((ROOT / "results" / name).glob("*.json"))]
    if not results:
        return "not run"
    rows: dict[str, dict[int, list[dict]]] = defaultdict(lambda: defaultdict(list))
    for result in results:
        rows[result["row"]][result["seed"]].append(result)
    found = {key for result in results for key in result["scores"]}
    tasks = [key for key in TASKS if key in found]
    others = [key for key in ("cross_nmi", "agreement", "clipped") if key in found and len(tasks) == 2]
    columns = [*tasks, "map/avg", *others]
    heads = [f"{key.removeprefix('map/')} mAP" if key.startswith("map/") else key for key in columns]
    lines = [f"| row | {' | '.join(heads)} | seeds | training | device, commit |", "| --- |" + " --- |" * (len(columns) + 3)]
    chance = 100 * mean(result["scores"]["map/chance"] for result in results)
    lines.append(f"| chance | {' | '.join(f'{chance:.1f}' if key.startswith('map/') else '' for key in columns)} | | | |")
    for row, seeds in rows.items():
        merged = [_merge(runs, tasks) for runs in seeds.values()]
        cells = [_spread([scores[key] for scores in merged if key in scores]) for key in columns]
        if len({frozenset(scores) & frozenset(TASKS) for scores in merged}) > 1:
            cells[len(tasks)] = "seeds differ in tasks"
        minutes = mean(sum(run["train_seconds"] for run in runs) for runs in seeds.values()) / 60
        origin = _origin([run for runs in seeds.values() for run in runs])
        lines.append(f"| {row} | {' | '.join(cells)} | {', '.join(map(str, sorted(seeds)))} | {minutes:.1f} min | {origin} |")
    return "\n".join(lines)


def _merge(runs: list[dict], tasks: list[str]) -> dict[str, float]:
    """Join the scores of one seed's runs on different modalities; "map/avg" becomes the mean over their 2D-3D tasks."""
    scores = {key: value for run in runs for key, value in run["scores"].items()}
    paper = [scores[key] for key in tasks if key in scores and key in PAPER_TASKS]
    return {**scores, **({"map/avg": mean(paper)} if paper else {})}


def _origin(runs: list[dict]) -> str:
    devices = defaultdict(set)
    for run in runs:
        devices[f"{run['device']}, {run['threads']} thread{'s' * (run['threads'] > 1)}"].add(f"`{run['commit'][:7]}`")
    return "; ".join(f"{device}: {', '.join(sorted(commits))}" for device, commits in devices.items())


def _spread(values: list[float]) -> str:
    if not values:
        return ""
    return f"{100 * mean(values):.1f}" + (f" ± {100 * stdev(values):.1f}" if len(values) > 1 else "")


def benchmark(name: str) -> str:
    """Return a Markdown table of every results/benchmarks/<name>-*.json, one per device: times beside their two floors."""
    parts = []
    for path in sorted((ROOT / "results" / "benchmarks").glob(f"{name}-*.json")):
        report = json.loads(path.read_text())
        threads = f"{report['threads']} thread{'s' * (report['threads'] > 1)}"
        parts.append(f"`{report['command']}`, {report['device']}, {threads}, torch {report['torch']}, `{report['commit'][:7]}`:\n")
        rows = list(_times(report))
        if rows:
            parts += ["| | seconds | FLOP floor, s | byte floor, s | of matmul rate |", "| --- | --- | --- | --- | --- |"]
            parts += [
                f"| {title} | {row['seconds']:.3g} | {row['flop_floor_seconds']:.3g} | {row['byte_floor_seconds']:.3g} | "
                f"{row['share_of_matmul_rate']:.1%} |" for title, row in rows
            ]
            parts.append("")
        facts = [f"{key.replace('_', ' ')} {_rounded(report[key])}" for key in BENCHMARK_FACTS if report.get(key) is not None]
        parts += ["; ".join(facts), ""] if facts else []
    return "\n".join(parts).rstrip() or "not run"


def reproduced(name: str) -> str:
    """Return what `reproduce.py` rendered as results/<name>.md, without pictures, whose paths hold in results/ alone."""
    path = ROOT / "results" / f"{name}.md"
    if not path.is_file():
        return "not run"
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("![")]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def _times(tree: dict, prefix: str = ""):
    """Yield (name, figures) of every measured time in a report, depth first."""
    for key, value in tree.items():
        if isinstance(value, dict):
            if "flop_floor_seconds" in value and "seconds" in value:
                yield f"{prefix}{key}", value
            yield from _times(value, f"{prefix}{key}: ")


def _rounded(value) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_rounded(entry)}" for key, entry in value.items())
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def rewrite_tables() -> None:
    """Replace every marked table of the documents."""
    for document in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        text = document.read_text(encoding="utf-8")
        for mark, render in (("table", table), ("benchmark", benchmark), ("reproduce", reproduced)):
            text = re.sub(
                rf"(<!-- {mark}: ([\w-]+) -->\n).*?(<!-- end -->)",
                lambda match: f"{match[1]}{render(match[2])}\n{match[3]}", text, flags=re.DOTALL,  # noqa: B023
            )
        atomic_write_text(document, text)


def main() -> None:
    """Run one of the two commands."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    collecting = commands.add_parser("collect", help="copy finished runs into results/NAME")
    collecting.add_argument("name")
    collecting.add_argument("runs", nargs="+", type=Path)
    commands.add_parser("tables", help="rewrite the tables of README.md and docs/*.md")
    arguments = parser.parse_args()
    if arguments.command == "collect":
        for folder in arguments.runs:
            print(collect(folder, arguments.name))
    rewrite_tables()


if __name__ == "__main__":
    main()
