"""Command: python -m datasets.prepare_modelnet; see `datasets.prepare.modelnet`."""

from datasets.prepare.modelnet import main
from utils.engine.session import run_command

if __name__ == "__main__":
    raise SystemExit(run_command(main))
