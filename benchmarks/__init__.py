"""Benchmarks, one command each: `python -m benchmarks.<name>` prints a table and writes a JSON named by device."""
