"""Self-matching supervision (SSM, Eq. 7-8): agreement of a prediction with the sharpened prediction of its memory."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ESTIMATORS = ("class", "instance", "hard")


class SelfMatchingLoss(nn.Module):
    """Negative mutual information between sharpened memory predictions S and current predictions I (Eq. 8).

    Eq. 7: S = softmax(g(m))^(1 / tau_1), renormalised to sum 1; it equals softmax(g(m) / tau_1) and is a constant
    target. I = softmax(g(v)). The paper leaves the joint distribution of Eq. 8 open:

    - "class": K x K, J = mean_b S_b (x) I_b, the joint of the two cluster ids of a sample;
    - "instance": B x B, J_ij = S_i . I_j / sum, the joint of two samples that fall into one cluster;
    - "hard": not a mutual information, but the self-label variant of the authors' release, the cross-entropy of I
      with argmax S.

    Args:
        temperature: tau_1, dimensionless, > 0; below 1 it sharpens.
        estimator: one of ESTIMATORS.
    Raises:
        ValueError: on a temperature <= 0 or an unknown estimator.
    """

    def __init__(self, temperature: float, estimator: str = "class") -> None:
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"temperature (tau_1) must be > 0, found {temperature}")
        if estimator not in ESTIMATORS:
            raise ValueError(f"estimator must be one of {ESTIMATORS}, found {estimator!r}")
        self.temperature = temperature
        self.estimator = estimator

    def forward(self, logits: Tensor, memory_logits: Tensor) -> Tensor:
        """Return the loss of one modality.

        Args:
            logits: (B, K) classifier outputs g(v) of the current embeddings.
            memory_logits: (B, K) classifier outputs g(m) of the memory rows of the same samples; no gradient flows here.
        Returns:
            Scalar in nats: -MI, in [-log K, 0] ("class"), [-log B, 0] ("instance"), or a cross-entropy >= 0 ("hard").
        Raises:
            ValueError: if the shapes differ, are not (B, K), or the batch is empty.
        """
        if logits.dim() != 2 or logits.shape != memory_logits.shape or len(logits) == 0:
            raise ValueError(
                f"logits and memory_logits must both be (B >= 1, K), found {tuple(logits.shape)} and "
                f"{tuple(memory_logits.shape)}"
            )
        with torch.autocast(logits.device.type, enabled=False):
            return self._compare(logits if logits.dtype == torch.float64 else logits.float(), memory_logits)

    def _compare(self, logits: Tensor, memory_logits: Tensor) -> Tensor:
        memory_logits = memory_logits.detach().to(logits.dtype)
        if self.estimator == "hard":
            return F.cross_entropy(logits, memory_logits.argmax(dim=1))
        sharpened = F.softmax(memory_logits / self.temperature, dim=1)  # (B, K)
        current = F.softmax(logits, dim=1)  # (B, K)
        if self.estimator == "class":
            return -mutual_information(sharpened.T @ current)
        return -mutual_information(sharpened @ current.T)


def mutual_information(joint: Tensor) -> Tensor:
    """Return the mutual information of a joint distribution.

    Args:
        joint: (R, S) float, non-negative weights; normalised to sum 1 here.
    Returns:
        Scalar in nats, sum_rs J log(J / (J_r J_s)), with 0 log 0 = 0.
    """
    joint = joint / joint.sum()
    independent = joint.sum(dim=1, keepdim=True) * joint.sum(dim=0, keepdim=True)  # (R, S)
    tiny = torch.finfo(joint.dtype).tiny
    return (joint * (joint.clamp_min(tiny).log() - independent.clamp_min(tiny).log())).sum()
