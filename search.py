"""Search in a collection of shapes or pictures with a trained run: an index of it, queries, and a page. See docs/search.md."""

import sys

from utils.engine.session import run_command


def main() -> None:
    """Run a command; what it needs is imported here, so that a missing package is one message."""
    from search import commands
    commands.main()


if __name__ == "__main__":
    sys.exit(run_command(main))
