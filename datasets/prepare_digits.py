"""Command: python -m datasets.prepare_digits; see `datasets.prepare.digits`."""

from datasets.prepare.digits import main
from utils.engine.session import run_command

if __name__ == "__main__":
    raise SystemExit(run_command(main))
