"""Command: python -m datasets.prepare_digits; see `datasets.prepare.digits`."""

import sys

from datasets.prepare.digits import main
from utils.engine.session import run_command

if __name__ == "__main__":
    sys.exit(run_command(main))
