"""Command: python -m datasets.prepare_photos; see `datasets.prepare.photos`."""

from datasets.prepare.photos import main
from utils.engine.session import run_command

if __name__ == "__main__":
    raise SystemExit(run_command(main))
