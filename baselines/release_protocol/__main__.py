"""Trains both stages of RoMo with one departure of the authors' published code, none, or all; see docs/fidelity.md."""

import argparse
import shlex
import sys

from baselines.release_protocol.protocol import VARIANTS, run_variant
from datasets.prepare.parallel import user_path
from utils.engine.session import run_command


def main(argv: list[str] | None = None) -> None:
    """Parse the command line; list the variants or run one."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog="python -m baselines.release_protocol", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    option, listing = parser.add_argument, "\n".join(f"{name:17}{text}" for name, text in VARIANTS.items())
    option("--list", action="version", version=listing, help="print the variants and stop")
    option("--config-dir", metavar="DIR", required=True, help="folder with step1.yaml and step2.yaml, e.g. configs/digits")
    option("--variant", choices=VARIANTS, required=True, help="what to train, see --list")
    option("--output", metavar="DIR", type=user_path, required=True, help="folder of this run alone; a repeated call continues it")
    option("--seed", type=int, default=0)
    for step in ("1", "2"):
        option(f"--set{step}", help=f"override settings of step {step}", metavar="KEY=VALUE", nargs="+", action="extend", default=[])
    option("--device", default="auto", help="auto | cpu | cuda | cuda:N")
    option("--threads", type=int, help="CPU threads; default: as configured")
    arguments = parser.parse_args(argv)
    run_variant(arguments, shlex.join(["python", "-m", "baselines.release_protocol", *argv]))
    print(f"wrote {arguments.output / 'metrics.json'}")


if __name__ == "__main__":
    sys.exit(run_command(main))
