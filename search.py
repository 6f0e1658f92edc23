"""Search in a collection of shapes or pictures with a trained run: an index of it, queries, and a page. See docs/search.md."""

import sys
from importlib import import_module

from utils.engine.session import run_command

if __name__ == "__main__":  # imported by the command, so that a missing package is one message
    sys.exit(run_command(lambda: import_module("search.commands").main()))
