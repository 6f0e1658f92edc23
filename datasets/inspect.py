"""Command: python -m datasets.inspect CONFIG; see `datasets.prepare.inspect`."""

from datasets.prepare.inspect import main
from utils.engine.session import run_command

if __name__ == "__main__":
    raise SystemExit(run_command(main))
