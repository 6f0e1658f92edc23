"""Loss curves of fast paths over the plain one: `python -m benchmarks.loss_curves [--config-dir configs/digits] [--epochs 5]`.

Trains both stages once per variant, with the same seed and, in step 2, the same pseudo-labels; draws the curves over each other
and prints the largest relative difference from the plain variant. Variants differ in engine switches only.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from types import ModuleType

import train_step1
import train_step2
from benchmarks.floors import start, write_report
from experiments.plots import panels
from utils.engine.session import run_command

PLAIN = "plain: explicit EdgeConv, per-parameter Adam"
VARIANTS = {
    PLAIN: ["model.edge_conv=reference", "optim.fused=false"],
    "fused EdgeConv": ["optim.fused=false"],
    "fused EdgeConv and Adam (default)": [],
    "samples behind a DataLoader": ["data.placement=host"],
    "torch.compile": ["run.compile=default"],
    "bfloat16 autocast": ["run.amp=true"],
}
DRAWN = {"step1": "loss/mlm", "step2": "loss/rcll"}
Curves = dict[str, dict[str, list[dict]]]


def compare(config_dir: Path, variants: dict[str, list[str]], common: list[str]) -> Curves:
    """Return stage -> variant -> epochs; step 2 of every variant reads the plain one's pseudo-labels."""
    found: Curves = {stage: {} for stage in DRAWN}
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, settings) in enumerate(variants.items()):
            out = Path(folder) / str(number)
            first = [*common, f"run.pseudo_labels={out}/labels", "pla.mlm_only_epochs=1", *settings]
            found["step1"][name] = train(train_step1, config_dir, out, first)
            second = [*common, f"rdl.pseudo_labels={folder}/0/labels", "rdl.start=fresh", *settings]
            found["step2"][name] = train(train_step2, config_dir, out, second)
    return found


def train(script: ModuleType, config_dir: Path, out: Path, settings: list[str]) -> list[dict]:
    """Train a stage; return its epochs."""
    stage = script.__name__.removeprefix("train_")
    script.main(["--config", str(config_dir / f"{stage}.yaml"), "--set", f"run.output={out}", "run.figures=false", *settings])
    (metrics,) = out.glob(f"*/{stage}/*/metrics.jsonl")
    return [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]


def largest_difference(epochs: list[dict], plain: list[dict]) -> float:
    """Largest relative difference of a loss in any epoch."""
    keys = [key for key in plain[-1] if key.startswith("loss/")]
    pairs = [(one[key], two[key]) for one, two in zip(epochs, plain) for key in keys if key in one and key in two]
    return max(abs(value - reference) / abs(reference) for value, reference in pairs)


def draw(found: Curves, path: Path) -> None:
    """Draw one panel per stage, one line per variant."""
    with panels(path, 2, 11, 4.5) as axes:
        for axis, (stage, variants) in zip(axes, found.items()):
            for width, (name, epochs) in zip(range(3 * len(variants), 0, -2), variants.items()):
                numbers, values = [row["epoch"] for row in epochs], [row[DRAWN[stage]] for row in epochs]
                axis.plot(numbers, values, linewidth=max(1, width / 2), alpha=0.7, label=name)
            axis.set(title=f"{stage}: {DRAWN[stage]}", xlabel="epoch")


def main(argv: list[str] | None = None) -> None:
    """Train all variants, print the differences, write the JSON and the picture beside it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config-dir", type=Path, default=Path("configs/digits"), help="folder with step1.yaml and step2.yaml")
    parser.add_argument("--epochs", type=int, default=5, help="of each stage")
    names = ", ".join(f"{number} {name}" for number, name in enumerate(VARIANTS) if number)
    parser.add_argument("--variants", type=int, nargs="+", choices=range(1, len(VARIANTS)), default=list(range(1, len(VARIANTS))),
                        help=f"which to run beside the plain one: {names}")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", dest="settings", help="settings of all variants")
    args, report = start("loss_curves", parser, argv)
    chosen = {name: settings for number, (name, settings) in enumerate(VARIANTS.items()) if number in {0, *args.variants}}
    common = [f"optim.epochs={args.epochs}", f"run.device={args.device}", "run.eval_every=0", *args.settings]
    common += [f"run.threads={args.threads}"] if args.threads else []
    found = compare(args.config_dir, chosen, common)
    report |= {key: {stage: {} for stage in found} for key in ("differences", "seconds_per_epoch")} | {"epochs": found}
    for stage, variants in found.items():
        for name, epochs in variants.items():
            difference = report["differences"][stage][name] = largest_difference(epochs, variants[PLAIN])
            seconds = report["seconds_per_epoch"][stage][name] = min(row["seconds/train"] for row in epochs)
            print(f"{stage}  {name:48s} {seconds:8.2f} s per epoch, largest relative difference of a loss {difference:.1e}")
    path = write_report(f"loss_curves-{args.config_dir.name}", report, args.output)
    draw(found, path.with_suffix(".png"))
    print(f"curves in {path.with_suffix('.png')}")


if __name__ == "__main__":
    sys.exit(run_command(main))
