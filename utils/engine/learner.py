"""The part of a stage that both stages share: encoders, classifiers, Adam, epochs of shuffled batches, and the state."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from utils.engine import distributed
from utils.engine.checkpoint import load_checkpoint
from utils.engine.epoch import learning_rate, run_batches
from utils.engine.seed import BatchGenerator, derive_seed, generator_for
from utils.errors import UserError


class StageLearner:
    """Base of the learners of both stages, of features and of compared methods.

    A subclass gives `step`, `modality_invariance`, `relation`, and to `parts` what else changes in training.

    With several processes, each one augments and embeds its share of a batch; embeddings are then gathered, so that losses,
    memory banks and classifiers see the whole batch everywhere.

    Args:
        stage: "step1", "step2", "features" or "baseline"; seeds the epochs and names them in messages.
        config: settings with the sections data, optim and run.
        source: training batches, a `datasets.batches.BatchSource`.
        inputs: name -> tensor (N, ...) or its sha256, all that training reads of the samples; a resumed run must find the same.
        encoders: modality -> encoder; classifiers: modality -> classifier. Both are moved to the device.
        device: where training runs.
    Raises:
        UserError: if the batch cannot be shared evenly among the processes.
    """

    parts: tuple[str, ...] = ("encoders", "classifiers", "optimizer")
    num_clusters: int  # K of the classifiers

    def __init__(
        self, stage: str, config: Any, source: Any, inputs: Mapping[str, Tensor | str], encoders: nn.ModuleDict,
        classifiers: nn.ModuleDict, device: torch.device,
    ) -> None:
        self.stage, self.config, self.source, self.device = stage, config, source, device
        self.batch_size = min(config.optim.batch_size, *source.counts)  # no sample twice in a batch
        if self.batch_size % distributed.world():
            raise UserError(
                f"a batch of {self.batch_size} cannot be shared evenly among {distributed.world()} processes: change optim.batch_size"
            )
        hashed = lambda values: values if isinstance(values, str) else hashlib.sha256(values.cpu().numpy()).hexdigest()
        self.inputs = {name: hashed(values) for name, values in inputs.items()}
        self.encoders, self.classifiers = encoders.to(device), classifiers.to(device)
        self.optimizer = torch.optim.Adam(
            self._parameter_groups(), lr=config.optim.learning_rate, weight_decay=config.optim.weight_decay, fused=config.optim.fused
        )
        self.frozen = [name for name in encoders if name in config.model.freeze]
        self.forwards = [_fast_forward(encoder, config.run.compile, device) for encoder in self.encoders.values()]

    def _parameter_groups(self) -> list[dict[str, Any]]:
        """Return what Adam trains: encoders, classifiers, and trunks that have a rate of their own, `optim.trunk_rate`."""
        factor, pretrained = self.config.optim.trunk_rate, self.config.model.pretrained
        named = [(name, key, values) for name, encoder in self.encoders.items() for key, values in encoder.named_parameters()]
        slow = lambda name, key: factor != 1 and pretrained[name] != "none" and not key.startswith("head.")
        trunks = [values for name, key, values in named if slow(name, key)]
        others = [values for name, key, values in named if not slow(name, key)]
        groups = [{"params": others, "factor": 1.0}, {"params": list(self.classifiers.parameters()), "factor": 1.0}]
        return [*groups, {"params": trunks, "factor": factor}] if trunks else groups

    def load_initial_weights(self) -> str | None:
        """Load weights of another run in place of `model.pretrained`, if the settings say so; return where they came from."""
        return None

    def load_encoders(self, path: Path, setting: str) -> str:
        """Start the encoders where another run ended; return its checkpoint.

        Args:
            path: of the checkpoint; setting: what asks for it, for the message.
        Raises:
            UserError: if it is not there or holds encoders of another size.
        """
        if not path.is_file():
            raise UserError(f"{setting} needs the checkpoint of a finished run, found no {path}; use --from RUN, or other initial weights")
        try:
            self.encoders.load_state_dict(load_checkpoint(path, self.device)["learner"]["encoders"])
        except RuntimeError as error:
            raise UserError(f"{setting} needs encoders of one size in both runs; {path} differs: {error}") from error
        return str(path)

    def replace_classifiers(self, classifiers: nn.ModuleDict) -> None:
        """Train other classifiers from here on; Adam forgets the old ones."""
        group = self.optimizer.param_groups[1]
        for parameter in group["params"]:
            self.optimizer.state.pop(parameter, None)
        self.classifiers = classifiers.to(self.device)
        group["params"] = list(self.classifiers.parameters())

    def step(self, index: Tensor, raw: list[Tensor], generator: BatchGenerator) -> dict[str, Tensor]:
        """Train on one batch; return detached scalars for the log.

        Args:
            index: (M, B) sample numbers of the whole batch; raw: one (b, ...) per view of every modality, this process's rows;
            generator: of the batch.
        """
        raise NotImplementedError

    def train_epoch(self, epoch: int) -> dict[str, float]:
        """Train one epoch (1-based). Its random numbers depend on the seed and the epoch alone, not on the past."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["factor"] * learning_rate(self.config.optim, epoch)
        torch.manual_seed(derive_seed(self.config.run.seed, self.stage, epoch, "global"))  # of MeshNet's mask, alike in all processes
        numbers = generator_for(self.config.run.seed, self.stage, epoch, device=self.device)
        own = None if distributed.world() == 1 else distributed.own_share(self.batch_size)
        generator = BatchGenerator(numbers, own, self.batch_size)
        source, paired = self.source, self.config.data.pairing != "none"
        plan = plan_epoch(source.counts, source.stored_views, source.views, self.batch_size, numbers, paired)
        means = run_batches(
            source.fetch(plan), lambda batch: self.step(*batch, generator),
            title=f"{self.stage} epoch {epoch}", log_interval=self.config.run.log_interval,
        )
        distributed.copy_from_main([*self.encoders.buffers(), *self.classifiers.parameters(), *self.classifiers.buffers()])
        self._check_finite(f"{self.stage} epoch {epoch}")
        return means

    def _check_finite(self, title: str) -> None:
        """Refuse weights and running statistics that the last step of an epoch has made infinite: no loss has shown it yet."""
        tensors = [values for module in (self.encoders, self.classifiers) for values in module.state_dict().values()]
        if not torch.stack([values.isfinite().all() for values in tensors]).all():
            raise UserError(
                f"{title}: weights or running statistics are not finite after the last step; the last checkpoint is from the "
                "epoch before. Lower optim.learning_rate or check the data"
            )

    def embed(self, raw: list[Tensor], generator: BatchGenerator) -> list[Tensor]:
        """Return M x (V, B, D): the embeddings of the whole batch, not normalised, of V augmented views per modality.

        The views of one modality pass the encoder as one batch, so BatchNorm takes its statistics over all of them.
        """
        inputs = iter(self.source.augment(raw, generator))
        embeddings = []
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.config.run.amp):
            for forward, views in zip(self.forwards, self.source.views):
                rows = forward(torch.cat([next(inputs) for _ in range(views)]))
                embeddings.append(torch.stack([distributed.gather_batch(view) for view in rows.chunk(views)]))
        return embeddings

    def invariance(self, embeddings: list[Tensor]) -> Tensor:
        """Modality-invariance loss of a batch, Eq. 13-14, from M x (V, B, D).

        All views of all modalities of an object are positives, and the sum over the anchors' views is scaled to M terms, so
        that several views weigh as much as one. With `data.positives: views`, the mean over the modalities of the loss among
        their own views. With `mlm.relations`, part of it is the mean relational loss of the other modalities towards the frozen ones.
        """
        if self.config.data.positives == "views":
            return torch.stack([self.modality_invariance(views) for views in embeddings]).mean()
        views = torch.cat(embeddings)
        loss, weight = self.modality_invariance(views) * (len(embeddings) / len(views)), self.config.mlm.relations
        if not weight:
            return loss
        parts = dict(zip(self.encoders, embeddings))
        targets = [parts.pop(name) for name in self.frozen]
        relations = torch.stack([self.relation(learning, target) for learning in parts.values() for target in targets]).mean()
        return (1 - weight) * loss + weight * relations

    def optimise(self, loss: Tensor) -> None:
        """One step of Adam."""
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()

    def state_dict(self) -> dict:
        """Return everything that changes in training, as tensors and plain containers."""
        return {"inputs": self.inputs, "num_clusters": self.num_clusters, **{part: getattr(self, part).state_dict() for part in self.parts}}

    def load_state_dict(self, state: dict) -> None:
        """Restore what `state_dict` returned, strictly; UserError if the run was started on other data or with another model."""
        changed = [name for name in self.inputs if state.get("inputs", {}).get(name) != self.inputs[name]]
        if changed:
            raise UserError(f"cannot resume {self.stage}: {', '.join(changed)} changed since the run was started; start a new run")
        try:
            for part in self.parts:
                getattr(self, part).load_state_dict(state[part])
        except (KeyError, RuntimeError, ValueError) as error:
            raise UserError(f"cannot resume {self.stage}: the checkpoint does not fit the run's settings: {error}") from error


def _fast_forward(encoder: nn.Module, mode: str, device: torch.device) -> nn.Module:
    """Wrap an encoder as the settings say; the wrapper shares its parameters and buffers."""
    if distributed.world() > 1 and any(parameter.requires_grad for parameter in encoder.parameters()):
        # Statistics are synchronised once per epoch, and within a step by models.sync_batchnorm.
        encoder = DistributedDataParallel(
            encoder, device_ids=[device.index] if device.type == "cuda" else None, broadcast_buffers=False
        )
    if mode == "off":
        return encoder
    return torch.compile(encoder, dynamic=False, mode="reduce-overhead" if mode == "cuda-graphs" else None)


def plan_epoch(
    counts: Sequence[int], stored_views: Sequence[int], views: Sequence[int], batch_size: int, generator: torch.Generator,
    paired: bool = True,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the batches of one epoch in random order, on the generator's device.

    All batches are full: the up to batch_size - 1 samples left over sit this epoch out (BatchNorm and the contrastive
    loss depend on the batch size, compiled encoders on its shape), other ones every epoch.

    Args:
        counts: samples of each modality, all equal if paired.
        stored_views: pictures per sample of each modality, to draw from; views: how many a step sees, different ones where
            there are enough.
        batch_size: B, at most the smallest count.
        generator: of order and views.
        paired: the sample numbers of all modalities are equal; otherwise each modality has its own order, and a smaller one
            goes round again until the largest is through.
    Yields:
        Sample numbers (M, B), and per view of every modality, in order, sample and picture numbers (2, sum of views, B).
    """
    device = generator.device
    orders = [torch.randperm(count, generator=generator, device=device) for count in (counts[:1] if paired else counts)]
    longest = max(counts)
    numbers = torch.stack([order[torch.arange(longest, device=device) % len(order)] for order in orders]).expand(len(counts), -1)
    pictures = torch.cat([_draw_views(stored, shown, longest, generator) for stored, shown in zip(stored_views, views)])
    of_view = torch.arange(len(counts), device=device).repeat_interleave(torch.tensor(views, device=device))
    rows = torch.stack([numbers[of_view], pictures])  # (2, sum of views, longest)
    for start in range(0, longest - batch_size + 1, batch_size):
        yield numbers[:, start : start + batch_size], rows[:, :, start : start + batch_size]


def _draw_views(stored: int, shown: int, count: int, generator: torch.Generator) -> Tensor:
    """Return (shown, count) picture numbers below `stored`, all different per sample where shown <= stored."""
    if stored == 1:
        return torch.zeros(shown, count, dtype=torch.long, device=generator.device)
    order = torch.rand(count, stored, generator=generator, device=generator.device).argsort(dim=1)
    return order[:, torch.arange(shown, device=generator.device) % stored].T
