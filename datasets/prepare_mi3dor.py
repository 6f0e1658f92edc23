"""Command: python -m datasets.prepare_mi3dor; see `datasets.prepare.mi3dor`."""

from datasets.prepare.mi3dor import main
from utils.engine.session import run_command

if __name__ == "__main__":
    raise SystemExit(run_command(main))
