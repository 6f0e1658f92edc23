"""SCL: Y. Liu et al., "Self-supervised correlation learning for cross-modal retrieval", IEEE Trans. Multimedia 25, 2022.

Unit codes a, b (B, L) of both modalities, from layers of their own and one shared layer W_s, each with ReLU and dropout:

    a = hat(dropout(relu(W_s dropout(relu(W_x u)))))                                            b alike with W_y
    Lcon = mean over 2B anchors p with partner q of  -log[exp(s(p, q) / t) / sum_{n not in {p, q}} exp(s(p, n) / t)],  s cosine
    Lmi  = (1/B) mean_i -log softmax_j(D(x_j, z_i))[i],  summed over (u, a), (u, b), (w, a), (w, b), D a critic per input
    Linv = (1/B) sum_i |a_i - b_i|;   L = alpha Lcon + beta Lmi + gamma Linv

The denominator leaves the positive out: Lcon may be negative and is not NT-Xent. From the release: alpha 10, beta 0.01, gamma 1, t 0.5,
512 dimensions, dropout 0.5, batch 256, Adam 1e-4 with betas (0.5, 0.999) for all of it, 200 epochs, one more 1/B in Lmi.

Ours: W_x is the MLP encoder that every method here trains, of width L; the critic's layers that read x and z have `critic_width` 64 in
place of 512, as they compare B^2 pairs four times per step; x is the frozen feature, columns standardised.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from baselines.dccae import standardised
from baselines.method import COUNT, POSITIVE, Context, Method, Training

CRITIC_INPUT = 1024
BLOCK = 16  # rows of pairs at a time


class PairLoss(torch.autograd.Function):
    """Sum over i of -log softmax_j(s_ij) at j = i mod B, s_ij = v . relu(W relu(c_i + x_j) + b), of codes c (n, h) and inputs x (B, h).

    Arrays of all pairs, (n, B, h), would leave the processor's cache several times: `BLOCK` codes at a time pass both directions.
    """

    @staticmethod
    def forward(ctx: Any, codes: Tensor, inputs: Tensor, weight: Tensor, bias: Tensor, score: Tensor) -> Tensor:
        count, hidden = inputs.shape
        buffers, ones = codes.new_empty(3, BLOCK * count, hidden), codes.new_ones(BLOCK * count)
        total, back = codes.new_zeros(()), score[:, None] * weight
        to_codes, to_inputs, to_weight, to_bias, to_score = (torch.zeros_like(values) for values in (codes, inputs, weight, bias, score))
        for start in range(0, len(codes), BLOCK):
            part = codes[start : start + BLOCK]
            own = torch.arange(start, start + len(part), device=codes.device)[:, None] % count
            first, second, slopes = buffers[:, : len(part) * count]  # (pairs, h): both layers, and the slope before the first
            by_pair = slopes.view(len(part), count, hidden)
            torch.add(part[:, None], inputs, out=first.view_as(by_pair)).relu_()
            torch.addmm(bias, first, weight.T, out=second).relu_()
            scores = (second @ score).view(len(part), count).log_softmax(1)
            total -= scores.gather(1, own).sum()
            slope = scores.exp_().scatter_add_(1, own, -torch.ones_like(scores[:, :1])).flatten()  # of the loss by a score
            to_score.addmv_(second.T, slope)
            second.sign_().mul_(slope[:, None])  # the slope before the second layer, but for the factor v
            to_weight.addmm_(second.T, first)
            to_bias.addmv_(second.T, ones[: len(second)])
            torch.mm(second, back, out=slopes).mul_(first.sign_())
            to_codes[start : start + BLOCK] = by_pair.sum(1)
            to_inputs += by_pair.sum(0)
        ctx.save_for_backward(to_codes, to_inputs, to_weight * score[:, None], to_bias * score, to_score)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        return tuple(gradient * saved for saved in ctx.saved_tensors)


class Critic(nn.Module):
    """D(x, z), a score of each pair of an input (d,) and a code (L,): relu and linear on relu(inputs(x) + codes(z))."""

    def __init__(self, width: int, dim: int, hidden: int) -> None:
        super().__init__()
        self.inputs = nn.Sequential(nn.Linear(width, CRITIC_INPUT), nn.ReLU(), nn.Linear(CRITIC_INPUT, hidden), nn.Linear(hidden, hidden))
        self.codes = nn.Linear(dim, hidden, bias=False)  # a layer on the two joined is the sum of a layer on each
        self.score = nn.Sequential(nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 1))

    def forward(self, inputs: Tensor, codes: Tensor) -> Tensor:
        """Return Lmi of inputs (B, d) with several codes of each, (n B, L), summed over the n; 1/B once more, as in the release."""
        _, hidden, _, last = self.score  # the last bias is the same in all scores, and so without effect
        loss = PairLoss.apply(self.codes(codes), self.inputs(inputs), hidden.weight, hidden.bias, last.weight[0])
        return loss / len(inputs) ** 2


class SCL(Method):
    """Self-supervised correlation learning."""

    training_defaults = Training(dim=512, batch_size=256, epochs=200, learning_rate=1e-4, betas=(0.5, 0.999))
    defaults = {"alpha": 10.0, "beta": 0.01, "gamma": 1.0, "temperature": 0.5, "dropout": 0.5, "critic_width": 64}
    limits = {"temperature": POSITIVE, "dropout": {"min": 0, "below": 1}, "critic_width": COUNT}

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.shared = nn.Linear(context.dim, context.dim)
        self.dropout = nn.Dropout(context.settings["dropout"])
        self.inputs = standardised(context)
        hidden = context.settings["critic_width"]
        self.critics = nn.ModuleDict({name: Critic(rows.shape[1], context.dim, hidden) for name, rows in self.inputs.items()})
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)

    def represent(self, name: str, embeddings: Tensor) -> Tensor:
        hidden = self.dropout(F.relu(embeddings))
        return F.normalize(self.dropout(F.relu(self.shared(hidden))), dim=1)  # a row of zeros stays one

    def forward(self, index: Tensor, embeddings: Mapping[str, Tensor], epoch: int) -> Tensor:
        options = self.context.settings
        first, second = (self.represent(name, embeddings[name]) for name in self.context.modalities)
        contrast = contrastive(first, second, options["temperature"])
        information = sum(self.critics[name](rows[index], torch.cat([first, second])) for name, rows in self.inputs.items())
        invariance = (first - second).square().sum(dim=1).clamp_min(1e-12).sqrt().mean()  # the root's slope at 0 is infinite
        return options["alpha"] * contrast + options["beta"] * information + options["gamma"] * invariance


def contrastive(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """Return Lcon of unit codes (B >= 2, L), the positive being left out of the denominator."""
    rows = torch.cat([first, second])  # (2B, L)
    similarity = rows @ rows.T / temperature
    anchors = torch.arange(len(rows), device=rows.device)
    partners = anchors.roll(len(first))
    positive = similarity[anchors, partners]
    excluded = torch.zeros_like(similarity, dtype=torch.bool)
    excluded[anchors, anchors] = excluded[anchors, partners] = True
    return (torch.logsumexp(similarity.masked_fill(excluded, -torch.inf), dim=1) - positive).mean()
