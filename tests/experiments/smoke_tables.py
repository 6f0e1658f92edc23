"""What the tests of experiments/ share: the protocol, a small data set at smoke settings, and its rows."""

from pathlib import Path

from experiments.cells import expand
from experiments.protocol import Setup, load_protocol

PROTOCOL = load_protocol()
SMOKE = Setup("digits", "small", Path("configs/smoke"), ("GP",), step2=("rdl.unclipped_epochs=1",), paper="3D MNIST", samples=(40,))
CLEAN = {"commit": "a" * 40, "dirty": False, "device": "a CPU", "threads": 1, "torch": "2"}


def rows_of(table, setup=SMOKE, seeds=(0,)):
    return expand(PROTOCOL["tables"][table], setup, seeds)
