"""Published numbers: `collect` copies finished runs into results/, `tables` rewrites the tables of README.md and docs/results.md.

Tables stand between `<!-- table: NAME -->` and `<!-- end -->`; NAME is a folder of results/. Nothing in them is typed by hand.
"""

import argparse
import json
import re
import sys
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from utils.checkpoint import atomic_write_json, atomic_write_text  # noqa: E402
from utils.run_log import RunLog  # noqa: E402


def row_name(config: dict) -> str:
    """Name the table row of a run from its settings."""
    if "rdl" in config:
        start = "" if config["rdl"].get("warmup_epochs") else ", clipped from the start"
        return f"step 2, RDL{start}" if config["rdl"]["lambda_2"] > 0 else "step 2, MLM alone (lambda_2 = 0)"
    if config["pla"]["lambda_1"] == 0:
        return "step 1, MLM alone (lambda_1 = 0)"
    return f"step 1, PLA ({config['pla']['estimator']} estimator)"


def collect(folder: Path, name: str) -> Path:
    """Copy what a finished run shows into results/<name>/.

    Args:
        folder: run folder with all its epochs done.
        name: folder below results/, one per table.
    Returns:
        The JSON file written.
    Raises:
        ValueError: if the run is not finished or was made from uncommitted code.
    """
    run = RunLog.open(folder)
    config, epochs = run.config(), run.read_epochs()
    environment = json.loads((folder / "env.json").read_text())
    if not epochs or epochs[-1]["epoch"] != config["optim"]["epochs"]:
        raise ValueError(f"{folder} is not finished: {len(epochs)} of {config['optim']['epochs']} epochs")
    if environment["git_dirty"] is not False:
        raise ValueError(f"{folder} was made from uncommitted code, its commit would not repeat it")
    metrics = json.loads((folder / "metrics.json").read_text())
    scores = {key: value for key, value in metrics.items() if isinstance(value, float)}
    logged = {key: epochs[-1][key] for key in ("agreement", "cross_nmi", "clipped") if key in epochs[-1]}
    row = row_name(config)
    result = {
        "row": row, "dataset": config["data"]["dataset"], "seed": config["run"]["seed"], "epochs": config["optim"]["epochs"],
        "scores": {**scores, **logged}, "train_seconds": round(sum(line["seconds/train"] for line in epochs), 1),
        "command": " ".join(["python", *environment["command"]]), "commit": environment["git_sha"],
        "device": environment["gpu"] or environment["cpu"], "threads": environment["threads"], "torch": environment["torch"],
    }
    slug = re.sub(r"[^a-z0-9]+", "-", row.lower()).strip("-")
    path = ROOT / "results" / name / f"{slug}-seed{result['seed']}.json"
    atomic_write_json(path, result)
    return path


def table(name: str) -> str:
    """Return a Markdown table of results/<name>/: one line per row name, mean and deviation over seeds."""
    results = [json.loads(path.read_text()) for path in sorted((ROOT / "results" / name).glob("*.json"))]
    if not results:
        return "not run"
    tasks = [key for key in results[0]["scores"] if key.startswith("map/") and key not in ("map/avg", "map/chance")]
    others = [key for key in ("cross_nmi", "agreement", "clipped") if any(key in result["scores"] for result in results)]
    columns = [*tasks, "map/avg", *others]
    rows = defaultdict(list)
    for result in results:
        rows[result["row"]].append(result)
    heads = [f"{key.removeprefix('map/')} mAP" if key.startswith("map/") else key for key in columns]
    lines = [f"| row | {' | '.join(heads)} | seeds | training | device, commit |", "| --- |" + " --- |" * (len(columns) + 3)]
    chance = 100 * mean(result["scores"]["map/chance"] for result in results)
    lines.append(f"| chance | {' | '.join(f'{chance:.1f}' if key.startswith('map/') else '' for key in columns)} | | | |")
    for row, runs in rows.items():
        cells = [_spread([run["scores"][key] for run in runs if key in run["scores"]]) for key in columns]
        minutes = mean(run["train_seconds"] for run in runs) / 60
        seeds = ", ".join(str(run["seed"]) for run in runs)
        devices = defaultdict(set)
        for run in runs:
            devices[f"{run['device']}, {run['threads']} thread{'s' * (run['threads'] > 1)}"].add(f"`{run['commit'][:7]}`")
        devices = [f"{device}: {', '.join(sorted(commits))}" for device, commits in devices.items()]
        lines.append(f"| {row} | {' | '.join(cells)} | {seeds} | {minutes:.1f} min | {'; '.join(devices)} |")
    return "\n".join(lines)


def _spread(values: list[float]) -> str:
    if not values:
        return ""
    return f"{100 * mean(values):.1f}" + (f" ± {100 * stdev(values):.1f}" if len(values) > 1 else "")


def rewrite_tables() -> None:
    """Replace every marked table of the documents."""
    for document in (ROOT / "README.md", ROOT / "docs" / "results.md"):
        text = document.read_text(encoding="utf-8")
        text = re.sub(
            r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end -->)",
            lambda match: f"{match[1]}{table(match[2])}\n{match[3]}", text, flags=re.DOTALL,
        )
        atomic_write_text(document, text)


def main() -> None:
    """Run one of the two commands."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    collecting = commands.add_parser("collect", help="copy finished runs into results/NAME")
    collecting.add_argument("name")
    collecting.add_argument("runs", nargs="+", type=Path)
    commands.add_parser("tables", help="rewrite the tables of README.md and docs/results.md")
    arguments = parser.parse_args()
    if arguments.command == "collect":
        for folder in arguments.runs:
            print(collect(folder, arguments.name))
    rewrite_tables()


if __name__ == "__main__":
    main()
