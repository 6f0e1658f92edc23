"""Robust losses and their slopes against p, for Figure 3: `python -m benchmarks.loss_shapes --num-clusters 10 --alpha 0.35`.

p is the probability of the pseudo-label; the other classes share 1 - p evenly.
"""

import argparse
import sys

import torch
from torch import Tensor, nn

from benchmarks.floors import start, write_report
from losses import build_robust_loss
from losses.robust import ROBUST_LOSSES
from utils.engine.session import run_command

TITLES = {"ce": "CE", "mae": "MAE", "gce": "GCE", "aue": "AUE", "nce_agce": "NCE+AGCE"}
DIGITS = 6


def evaluate_loss(loss: nn.Module, p: Tensor, num_clusters: int) -> tuple[Tensor, Tensor]:
    """Return L(p) and dL/dp, two (P,) float64 tensors, of single samples with p (P,) in (0, 1) among K classes."""
    p = p.detach().clone().requires_grad_()
    others = ((1 - p) / (num_clusters - 1)).log()
    logits = torch.cat([p.log()[:, None], others[:, None].expand(-1, num_clusters - 1)], dim=1)  # (P, K), label 0
    label = torch.zeros(1, dtype=torch.int64)
    values = torch.stack([loss(row[None], label) for row in logits])
    (slopes,) = torch.autograd.grad(values.sum(), p)
    return values.detach(), slopes


def curves(num_clusters: int, alpha: float, points: int) -> dict:
    """Return p and, per loss, its values and slopes; rounded for the JSON."""
    p = torch.linspace(0, 1, points + 2, dtype=torch.float64)[1:-1]
    rounded = lambda values: [round(value, DIGITS) for value in values.tolist()]
    found = {}
    for name in ROBUST_LOSSES:
        values, slopes = evaluate_loss(build_robust_loss(name, num_clusters, alpha), p, num_clusters)
        found[TITLES.get(name, f"RCLL, alpha = {alpha:g}")] = {"loss": rounded(values), "slope": rounded(slopes)}
    return {"p": rounded(p), "curves": found}


def main(argv: list[str] | None = None) -> None:
    """Compute the curves and write the JSON; `reproduce.py fig3` draws them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-clusters", type=int, default=10, help="K: clip level of RCLL, and the classes besides the label")
    parser.add_argument("--alpha", type=float, default=0.35, help="of RCLL (paper, Figure 3: 0.35)")
    parser.add_argument("--points", type=int, default=99, help="values of p inside (0, 1)")
    args, report = start("loss_shapes", parser, argv)
    found = curves(args.num_clusters, args.alpha, args.points)
    write_report("loss_shapes", report | {"alpha": args.alpha, **found}, args.output)


if __name__ == "__main__":
    sys.exit(run_command(main))
