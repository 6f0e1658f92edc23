"""The one learner of all deep methods: batches, augmentation, seeds, checkpoints and checks are those of RoMo's stages."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from baselines.extract import read_out
from baselines.method import Context, Method
from baselines.settings import BaselineConfig, method_options
from datasets.batches import BatchSource
from datasets.samples import PairedSamples
from models.build import build_encoders, load_pretrained
from utils.engine.learner import StageLearner
from utils.engine.seed import BatchGenerator, derive_seed
from utils.evaluation.features import evaluation_mode
from utils.modalities import MODALITIES


class MethodLearner(StageLearner):
    """Encoders, a method and their optimiser.

    Args:
        config: settings; the modalities of `data.features` have MLP encoders, others their networks.
        cls: the method's class.
        samples: training samples, without labels.
        labels: (N,) int64 for a method that reads them.
        shared: modality -> (N, d) frozen features of the same objects, for the targets of a method that is trained end to end.
        device: where everything lives.
    """

    def __init__(
        self, config: BaselineConfig, cls: type[Method], samples: PairedSamples, labels: Tensor | None,
        shared: Mapping[str, Tensor] | None, device: torch.device,
    ) -> None:
        self.samples, self.epoch = samples, 0
        encoders = build_encoders(config.data, config.model)
        targets = {f"features/{name}": rows for name, rows in (shared or {}).items()}
        inputs = {**samples.arrays, **targets, **({} if labels is None else {"labels": labels})}
        super().__init__("baseline", config, BatchSource(samples, config.data, device), inputs, encoders, nn.ModuleDict(), device)
        load_pretrained(self.encoders, config.model.pretrained)
        context = make_context(config, cls, samples, labels, shared or self._initial_features(), device)
        self.num_clusters = context.num_clusters
        self.method = cls(context)
        self.classifiers = nn.ModuleDict({"method": self.method}).to(device)
        optim, groups = config.optim, self._parameter_groups()
        if optim.optimizer == "sgd":
            self.optimizer = torch.optim.SGD(
                groups, optim.learning_rate, momentum=0.9, nesterov=optim.nesterov, weight_decay=optim.weight_decay
            )
        else:
            self.optimizer = torch.optim.Adam(groups, optim.learning_rate, optim.betas, weight_decay=optim.weight_decay)

    def _initial_features(self) -> dict[str, Tensor]:
        """The features themselves, or what the encoders say before training."""
        if self.config.data.features:
            return {name: rows[:, 0].to(self.device) for name, rows in self.samples.arrays.items()}
        return self.embeddings()

    def embeddings(self) -> dict[str, Tensor]:
        """Return modality -> (N, L) embeddings of all training samples as they are now, not augmented, without gradient."""
        return read_out(self.encoders, self.samples, self.config.data, self.device)

    def train_epoch(self, epoch: int) -> dict[str, float]:
        """Train one epoch (1-based), with the method's own work before it and after the last."""
        self.epoch = epoch
        torch.manual_seed(derive_seed(self.config.run.seed, self.stage, epoch, "start"))
        self.method.start_epoch(epoch, self.embeddings)
        losses = super().train_epoch(epoch)
        if epoch == self.config.optim.epochs:
            self.method.finish(self.embeddings)
        return losses

    def step(self, index: Tensor, raw: list[Tensor], generator: BatchGenerator) -> dict[str, Tensor]:
        """One step on the method's loss."""
        embeddings = {name: views[0].float() for name, views in zip(self.encoders, self.embed(raw, generator))}
        loss = self.method(index[0], embeddings, self.epoch)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if self.config.optim.clip is not None:
            parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
            nn.utils.clip_grad_norm_(parameters, self.config.optim.clip)
        self.optimizer.step()
        self.method.after_step(index[0], {name: rows.detach() for name, rows in embeddings.items()}, self.epoch)
        return {"loss/method": loss.detach()} | {f"method/{name}": value.detach() for name, value in self.method.logged.items()}

    @torch.no_grad()
    def codes(self, samples: PairedSamples) -> dict[str, Tensor]:
        """Return modality -> (N, L) continuous codes of samples, what the method ranks."""
        embeddings = read_out(self.encoders, samples, self.config.data, self.device)
        with evaluation_mode(self.method):
            return {name: self.method.represent(name, rows) for name, rows in embeddings.items()}


def make_context(
    config: BaselineConfig, cls: type, samples: PairedSamples, labels: Tensor | None, features: Mapping[str, Tensor],
    device: torch.device,
) -> Context:
    """Return what a method may read before training: no labels unless they are given."""
    return Context(
        modalities=tuple(sorted(config.data.modalities, key=lambda name: not MODALITIES[name].is_2d)), features=features,
        dim=config.model.embedding_dim,
        batch_size=min(config.optim.batch_size, *samples.counts.values()), epochs=config.optim.epochs, seed=config.run.seed, device=device,
        num_clusters=config.method.num_clusters if labels is None else int(labels.max()) + 1,
        labels=labels, settings=method_options(cls, config.method.options),
    )
