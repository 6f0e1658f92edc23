"""Command: python -m datasets.prepare_objects; see `datasets.prepare.objects`."""

from datasets.prepare.objects import main
from utils.engine.session import run_command

if __name__ == "__main__":
    raise SystemExit(run_command(main))
