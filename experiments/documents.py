"""Tables of README.md and docs/*.md: what stands between `<!-- table: NAME -->` and `<!-- end -->` is made of results/.

`table: NAME` takes results/NAME.jsonl, `averages: NAME NAME ...` the averages of several of these, `benchmark: NAME` every
results/benchmarks/NAME-*.json.
"""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from experiments.records import load_table
from experiments.tables import average_lines, markdown, table_lines
from utils.files import atomic_write_text

TIMES = ("seconds", "flop_floor_seconds", "byte_floor_seconds")
MARKED = re.compile(r"(<!-- (table|averages|benchmark): ([\w -]+) -->\n).*?(<!-- end -->)", re.DOTALL)
FACTS = ("speedup", "old_over_new", "first start", "later start", "items", "memory_ratio", "largest_relative_difference", "difference",
         "differences", "seconds_per_epoch", "seconds_of_both", "mean_seconds", "modelnet40_hours_extrapolated")


def rewrite(root: Path, results: Path, protocol: Mapping[str, dict]) -> list[Path]:
    """Replace every marked table of the documents below a folder; return the documents."""
    load = lambda name: load_table(results / f"{name}.jsonl", protocol)
    makers = {
        "table": lambda name: "\n".join(table_lines(load(name))),
        "averages": lambda names: "\n".join(average_lines([load(name) for name in names.split()])),
        "benchmark": lambda name: benchmark(results / "benchmarks", name),
    }
    documents = [root / "README.md", *sorted((root / "docs").glob("*.md"))]
    for document in documents:
        made = lambda match: f"{match[1]}{makers[match[2]](match[3])}\n{match[4]}"
        atomic_write_text(document, MARKED.sub(made, document.read_text(encoding="utf-8")))
    return documents


def benchmark(folder: Path, name: str) -> str:
    """Return a Markdown table of every NAME-*.json of a folder, one per device: times beside their two floors."""
    parts = []
    for path in sorted(folder.glob(f"{name}-*.json")):
        report = json.loads(path.read_text(encoding="utf-8"))
        threads = f"{report['threads']} thread{'s' * (report['threads'] > 1)}"
        parts.append(f"`{report['command']}`, {report['device']}, {threads}, torch {report['torch']}, `{report['commit'][:7]}`:\n")
        rows = [[title, *(f"{row[key]:.3g}" for key in TIMES), f"{row['share_of_matmul_rate']:.1%}"] for title, row in _times(report)]
        parts += [*markdown([["measured", "seconds", "FLOP floor, s", "byte floor, s", "of matmul rate"], *rows]), ""] if rows else []
        facts = [f"{key.replace('_', ' ')} {_rounded(report[key])}" for key in FACTS if report.get(key) is not None]
        parts += ["; ".join(facts), ""] if facts else []
    return "\n".join(parts).rstrip() or "not run"


def _times(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, dict]]:
    """Yield (name, figures) of every measured time in a report, depth first."""
    for key, value in tree.items():
        if isinstance(value, dict):
            if "flop_floor_seconds" in value and "seconds" in value:
                yield f"{prefix}{key}", value
            yield from _times(value, f"{prefix}{key}: ")


def _rounded(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_rounded(entry)}" for key, entry in value.items())
    return f"{value:.3g}" if isinstance(value, float) else str(value)
