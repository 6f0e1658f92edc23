"""Prints the table of methods, beside what the paper, or RONO's, reports of them: python -m baselines.

One method is trained by python -m baselines.run METHOD, features are made by python -m baselines.features.
"""

import argparse

from baselines import METHODS
from utils.evaluation.tables import align

DATASETS = ("3D MNIST", "ModelNet10", "MI3DOR", "ModelNet40")


def main(argv: list[str] | None = None) -> None:
    """Print a line per method."""
    argparse.ArgumentParser(prog="python -m baselines", description=__doc__).parse_args(argv)
    rows = [["name", "method", "kind", "learns from", "end to end", *(f"paper, {name}" for name in DATASETS)]]
    for name, entry in METHODS.items():
        scores = {key: f"{100 * value:.1f}" for key, value in entry.published().items()}
        labels = entry.labels + " (paper: 20 % wrong)" * (entry.labels == "noisy labels")
        facts = [name, entry.title, entry.kind, labels, "yes" if entry.end_to_end else "no"]
        rows.append([*facts, *(scores.get(key, "") for key in DATASETS)])
    print(align(rows))


if __name__ == "__main__":
    main()
