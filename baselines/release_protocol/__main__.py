"""Trains both stages of RoMo with one departure of the authors' published code, none, or all; see docs/fidelity.md."""

import argparse
import shlex
import sys
from pathlib import Path

from baselines.release_protocol.protocol import Request, run_variant
from baselines.release_protocol.variants import VARIANTS
from utils.engine.session import run_command


def main(argv: list[str] | None = None) -> None:
    """Parse the command line; list the variants or run one."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="python -m baselines.release_protocol", description=__doc__)
    parser.add_argument("--list", action="store_true", help="print the variants and stop")
    parser.add_argument("--config-dir", metavar="DIR", help="folder with step1.yaml and step2.yaml, e.g. configs/digits")
    parser.add_argument("--variant", choices=VARIANTS, help="what to train, see --list")
    parser.add_argument("--output", metavar="DIR", type=Path, help="folder of this run alone; a repeated call continues it")
    parser.add_argument("--seed", type=int, default=0)
    for step in ("1", "2"):
        words = {"metavar": "KEY=VALUE", "nargs": "+", "action": "extend", "default": []}
        parser.add_argument(f"--set{step}", help=f"override settings of step {step}", **words)
    parser.add_argument("--device", default="auto", help="auto | cpu | cuda | cuda:N")
    parser.add_argument("--threads", type=int, help="CPU threads; default: as configured")
    arguments = parser.parse_args(argv)
    if arguments.list:
        width = max(map(len, VARIANTS)) + 2
        print("\n".join(f"{name.ljust(width)}{text}" for name, text in VARIANTS.items()))
        return
    missing = [f"--{name.replace('_', '-')}" for name in ("config_dir", "variant", "output") if getattr(arguments, name) is None]
    if missing:
        parser.error(f"the following arguments are required: {', '.join(missing)}")
    request = Request(
        arguments.variant, arguments.config_dir, arguments.seed, tuple(arguments.set1), tuple(arguments.set2),
        arguments.device, arguments.threads,
    )
    run_variant(request, arguments.output, shlex.join(["python", "-m", "baselines.release_protocol", *argv]))
    print(f"wrote {arguments.output / 'metrics.json'}")


if __name__ == "__main__":
    sys.exit(run_command(main))
