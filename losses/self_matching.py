"""Self-matching supervision (SSM, Eq. 7-8): agreement of a prediction with the sharpened prediction of its memory."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ESTIMATORS = ("class", "instance", "hard")


class SelfMatchingLoss(nn.Module):
    """Negative mutual information (Eq. 7) between sharpened memory predictions S and current predictions I (Eq. 8).

    S = softmax(g(m))^(1 / tau_1), renormalised to sum 1; it equals softmax(g(m) / tau_1) and is a constant target.
    I = softmax(g(v)). Eq. 7-8 print sums over samples i, j = 1..N' and do not define the joint probability:

    - "class", our choice: K x K, J = mean_b S_b (x) I_b, the joint of the two cluster ids of a sample. The marginals in
      - sum J log(J / (J_S J_I)) are those of the batch and N' sampled memory rows together, J_I as the memory's own plus what
      changed since on the batch, so that it does not lag. N' steadies the weight log(J / (J_S J_I)) and leaves its size;
    - "instance", the literal reading: (B + N') x B, J_ji = S_j . I_i / sum, the joint of a memory row and a current sample that
      fall into one cluster;
    - "hard": not a mutual information, but the self-label variant of the authors' release, the cross-entropy of I with
      argmax S. It has no sum over pairs, so sampled rows do not count.

    Args:
        temperature: tau_1, dimensionless, > 0; below 1 it sharpens.
        estimator: one of ESTIMATORS.
        symmetric: "class" alone: (J + J^T) / 2 in place of J. Other arguments are a ValueError.
    """

    def __init__(self, temperature: float, estimator: str = "class", symmetric: bool = False) -> None:
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"temperature (tau_1) must be > 0, found {temperature}")
        if estimator not in ESTIMATORS:
            raise ValueError(f"estimator must be one of {ESTIMATORS}, found {estimator!r}")
        if symmetric and estimator != "class":
            raise ValueError(f"only the joint of estimator 'class' can be symmetric, found {estimator!r}")
        self.temperature = temperature
        self.estimator = estimator
        self.symmetric = symmetric

    def forward(self, logits: Tensor, memory_logits: Tensor) -> Tensor:
        """Return the loss of one modality.

        Args:
            logits: (B, K) classifier outputs g(v) of the current embeddings.
            memory_logits: (B + N', K) classifier outputs g(m): of the memory rows of the same samples, then of N' >= 0 sampled
                rows; no gradient flows here.
        Returns:
            Scalar in nats: -MI <= 0, at least -log K ("class", N' = 0) or -log B ("instance"), or a cross-entropy >= 0 ("hard").
        """
        fits = logits.dim() == memory_logits.dim() == 2 and logits.shape[1] == memory_logits.shape[1]
        if not fits or not 0 < len(logits) <= len(memory_logits):
            found = f"{tuple(logits.shape)} and {tuple(memory_logits.shape)}"
            raise ValueError(f"logits must be (B >= 1, K) and memory_logits (B + N', K), found {found}")
        with torch.autocast(logits.device.type, enabled=False):
            return self._compare(logits if logits.dtype == torch.float64 else logits.float(), memory_logits)

    def _compare(self, logits: Tensor, memory_logits: Tensor) -> Tensor:
        memory_logits = memory_logits.detach().to(logits.dtype)
        batch = len(logits)
        if self.estimator == "hard":
            return F.cross_entropy(logits, memory_logits[:batch].argmax(dim=1))
        sharpened = F.softmax(memory_logits / self.temperature, dim=1)  # (B + N', K)
        current = F.softmax(logits, dim=1)  # (B, K)
        if self.estimator == "instance":
            return -mutual_information(sharpened @ current.T)
        joint = sharpened[:batch].T @ current / batch  # (K, K)
        of_memory = sharpened.mean(dim=0)  # (K,)
        of_current = _marginal(current.detach(), F.softmax(memory_logits, dim=1))  # (K,)
        if self.symmetric:
            joint = (joint + joint.T) / 2
            of_memory = of_current = (of_memory + of_current) / 2
        return -mutual_information(joint, of_memory, of_current)


def _marginal(current: Tensor, remembered: Tensor) -> Tensor:
    """Mean current prediction (K,) of all samples: that of the memory, (B + N', K), moved by the batch's change, (B, K).

    At N' = 0 it is the mean of the batch. No cluster gets less than the batch's share in it, so the result is positive.
    """
    batch = len(current)
    moved = remembered.mean(dim=0) + (current - remembered[:batch]).mean(dim=0)
    floor = current.mean(dim=0) * batch / len(remembered)
    marginal = torch.maximum(moved, floor)
    return marginal / marginal.sum()


def mutual_information(joint: Tensor, rows: Tensor | None = None, columns: Tensor | None = None) -> Tensor:
    """Return the mutual information (Eq. 7) sum_rs J log(J / (J_r J_s)), a scalar in nats, with 0 log 0 = 0.

    Args:
        joint: (R, S) float, non-negative weights; normalised to sum 1 here.
        rows: (R,) and columns: (S,) marginals that were estimated on more samples; default: the joint's own.
    """
    joint = joint / joint.sum()
    rows = joint.sum(dim=1) if rows is None else rows
    columns = joint.sum(dim=0) if columns is None else columns
    independent = rows[:, None] * columns  # (R, S)
    tiny = torch.finfo(joint.dtype).tiny
    return (joint * (joint.clamp_min(tiny).log() - independent.clamp_min(tiny).log())).sum()
