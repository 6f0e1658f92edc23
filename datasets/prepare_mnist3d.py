"""Command: python -m datasets.prepare_mnist3d; see `datasets.prepare.mnist3d`."""

from datasets.prepare.mnist3d import main
from utils.engine.session import run_command

if __name__ == "__main__":
    raise SystemExit(run_command(main))
