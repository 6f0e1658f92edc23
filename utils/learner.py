"""The part of a stage that both stages share: encoders, classifiers, Adam, epochs of shuffled batches, and the state."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from utils.seed import generator_for
from utils.trainer import learning_rate, run_batches

Views = Callable[[Tensor, torch.Generator], list[Tensor]]


class StageLearner:
    """Base of the two learners; a subclass gives `step` and `modality_invariance`, and adds to `parts` what else changes in training.

    Args:
        stage: "step1" or "step2"; seeds the epochs and names them in messages.
        config: settings with the sections optim and run.
        inputs: name -> tensor (N, ...), all that training reads of the samples; a resumed run must find the same.
        counts: N of every modality, in the order of the encoders.
        views: maps indices (M, B), one row per modality, and a generator to one augmented input per modality.
        encoders: modality -> encoder; classifiers: modality -> classifier. Both are moved to the device.
        device: where training runs.
    """

    parts: tuple[str, ...] = ("encoders", "classifiers", "optimizer")

    def __init__(
        self, stage: str, config: Any, inputs: Mapping[str, Tensor], counts: Sequence[int], views: Views, encoders: nn.ModuleDict,
        classifiers: nn.ModuleDict, device: torch.device,
    ) -> None:
        self.stage, self.config, self.views, self.device = stage, config, views, device
        self.counts = list(counts)
        self.inputs = {name: hashlib.sha256(values.cpu().numpy()).hexdigest() for name, values in inputs.items()}
        self.encoders, self.classifiers = encoders.to(device), classifiers.to(device)
        self.optimizer = torch.optim.Adam(
            [*self.encoders.parameters(), *self.classifiers.parameters()],
            lr=config.optim.learning_rate, weight_decay=config.optim.weight_decay,
        )

    def step(self, index: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Train on one batch of sample indices (M, B); return detached scalars for the log."""
        raise NotImplementedError

    def train_epoch(self, epoch: int) -> dict[str, float]:
        """Train one epoch (1-based). Its random numbers depend on the seed and the epoch alone, not on the past."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config.optim, epoch)
        generator = generator_for(self.config.run.seed, self.stage, epoch, device=self.device)
        return run_batches(
            shuffled_batches(self.counts, self.config.optim.batch_size, generator, paired=self.config.data.pairing != "none"),
            lambda index: self.step(index, generator),
            title=f"{self.stage} epoch {epoch}", log_interval=self.config.run.log_interval,
        )

    def embed(self, index: Tensor, generator: torch.Generator) -> list[Tensor]:
        """Return the embeddings (B, D), not normalised, of one augmented view per modality."""
        views = self.views(index, generator)
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.config.run.amp):
            return [encoder(view) for encoder, view in zip(self.encoders.values(), views)]

    def invariance(self, index: Tensor, embeddings: list[Tensor], generator: torch.Generator) -> Tensor:
        """Modality-invariance loss of a batch, Eq. 14; with `data.positives: views`, its mean over the modalities, each against
        a second random view of the same samples.

        Args:
            index: (M, B) of the batch; embeddings: M x (B, D) of its first views; generator: of the second views.
        """
        if self.config.data.positives == "modalities":
            return self.modality_invariance(torch.stack(embeddings))
        pairs = zip(embeddings, self.embed(index, generator))
        return torch.stack([self.modality_invariance(torch.stack(pair)) for pair in pairs]).mean()

    def optimise(self, loss: Tensor) -> None:
        """One step of Adam."""
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()

    def state_dict(self) -> dict:
        """Return everything that changes in training, as tensors and plain containers."""
        return {"inputs": self.inputs, **{part: getattr(self, part).state_dict() for part in self.parts}}

    def load_state_dict(self, state: dict) -> None:
        """Restore what `state_dict` returned, strictly; ValueError if the run was started on other data."""
        changed = [name for name in self.inputs if state["inputs"].get(name) != self.inputs[name]]
        if changed:
            raise ValueError(f"cannot resume {self.stage}: {', '.join(changed)} changed since the run was started; start a new run")
        for part in self.parts:
            getattr(self, part).load_state_dict(state[part])


def shuffled_batches(
    counts: Sequence[int], batch_size: int, generator: torch.Generator, paired: bool = True
) -> Iterator[Tensor]:
    """Yield (M, B) index tensors of one epoch in random order, on the generator's device; row m numbers samples of modality m.

    All batches are full: the up to batch_size - 1 samples left over sit this epoch out (BatchNorm and the contrastive
    loss depend on the batch size), other ones every epoch. A set smaller than one batch is one batch.

    Args:
        counts: samples of each modality, all equal if paired.
        batch_size: B.
        generator: of the order.
        paired: all rows of a batch are equal; otherwise each modality has its own order, and a smaller one goes round again
            until the largest is through.
    """
    orders = [torch.randperm(count, generator=generator, device=generator.device) for count in (counts[:1] if paired else counts)]
    longest = max(counts)
    index = torch.stack([order[torch.arange(longest, device=order.device) % len(order)] for order in orders])
    index = index.expand(len(counts), -1)
    batch_size = min(batch_size, longest)
    for start in range(0, longest - batch_size + 1, batch_size):
        yield index[:, start : start + batch_size]
