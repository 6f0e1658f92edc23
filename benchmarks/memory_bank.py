"""Memory and time of one memory bank: `python -m benchmarks.memory_bank --samples 5000 [--dim 1024] [--batch-size 50]`.

Times one epoch of momentum updates (Eq. 6) in batches, and copying in the features of a whole epoch at once, which is what a
modality without a bank gets (Table VIII).
"""

import argparse
import statistics
import sys

import torch
from torch.nn import functional as F

from benchmarks.floors import seconds_of, start, write_report
from models import MemoryBank
from utils.engine.session import run_command

MOMENTUM = 0.9


def main(argv: list[str] | None = None) -> None:
    """Measure a bank of N random unit rows of width D, print medians over the repeats and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, required=True, help="N, rows of the bank")
    parser.add_argument("--dim", type=int, default=1024, help="D, width of a row")
    parser.add_argument("--batch-size", type=int, default=50, help="rows per update; the last batch may be smaller")
    parser.add_argument("--repeats", type=int, default=5, help="of each measurement")
    args, report = start("memory_bank", parser, argv)
    bank = MemoryBank(args.samples, args.dim, MOMENTUM).to(args.device)
    embeddings = F.normalize(torch.randn(args.samples, args.dim, device=args.device), dim=1)
    batches = torch.randperm(args.samples, device=args.device).split(args.batch_size)

    def update() -> None:
        for index in batches:
            bank.update(index, embeddings[index])

    size = bank.memory.numel() * bank.memory.element_size()
    report |= {
        "bytes": size, "mib": size / 2**20,
        "update_seconds": statistics.median(seconds_of(update, args.device, args.repeats)),
        "fill_seconds": statistics.median(seconds_of(lambda: bank.fill(embeddings), args.device, args.repeats)),
    }
    print(f"{args.samples} x {args.dim}: {report['mib']:.3f} MiB; one epoch of updates in batches of {args.batch_size}: "
          f"{report['update_seconds']:.2e} s, one copy: {report['fill_seconds']:.2e} s")
    write_report("memory_bank", report, args.output)


if __name__ == "__main__":
    sys.exit(run_command(main))
