"""Command: python -m datasets.prepare_modelnet; see `datasets.prepare.modelnet`."""

import sys

from datasets.prepare.modelnet import main
from utils.engine.session import run_command

if __name__ == "__main__":
    sys.exit(run_command(main))
