"""Step 1, pseudo-label annotation (PLA): trains with self matching and modality invariance, writes pseudo-label files."""

import sys
from itertools import combinations
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from datasets.annotation import Annotation, annotate
from datasets.batches import BatchSource
from datasets.samples import PairedSamples, describe_samples
from losses import ModalityInvarianceLoss, RelationLoss, SelfMatchingLoss
from models import MemoryBank
from models.build import build_classifiers, build_encoders
from training import mark_labels, run_stage, write_annotation
from utils.engine import distributed
from utils.engine.checkpoint import LAST
from utils.engine.learner import StageLearner
from utils.engine.seed import BatchGenerator, derive_seed
from utils.engine.session import Session, go_on_from, open_session, run_command, stage_parser
from utils.errors import UserError
from utils.evaluation.clustering import nmi
from utils.evaluation.consensus import NEIGHBOURS, cluster_objects
from utils.evaluation.features import Features
from utils.settings.options import Step1Config

DEFAULT_CONFIG = "configs/mnist3d/step1.yaml"


class PLALearner(StageLearner):
    """Encoders, classifiers g, memory banks and optimiser of step 1 (Algorithm 1, first half); the samples carry no labels.

    Raises:
        UserError: if there are more clusters than samples.
    """

    parts = (*StageLearner.parts, "banks")

    def __init__(self, config: Step1Config, samples: PairedSamples, device: torch.device) -> None:
        self.samples = samples
        dim, pla = config.model.embedding_dim, config.pla
        searched = isinstance(pla.num_clusters, str)
        needed = NEIGHBOURS + 1 if searched else pla.num_clusters
        if needed > min(samples.counts.values()):
            hint = "; set pla.num_clusters to a number" if searched else ""
            raise UserError(f"pla.num_clusters: {pla.num_clusters} needs at least {needed} training samples, found {samples.counts}{hint}")
        encoders = build_encoders(config.data, config.model, config.run.sync_batchnorm)
        source = BatchSource(samples, config.data, device)
        super().__init__("step1", config, source, samples.arrays | samples.fingerprints, encoders, nn.ModuleDict(), device)
        self.clusters: dict = {}
        self._make_classifiers(2 if searched else pla.num_clusters)
        banks = {name: MemoryBank(count, dim, pla.momentum, pla.renormalise) for name, count in samples.counts.items()}
        self.banks = nn.ModuleDict(banks).to(device)
        self.bankless = [name for name in encoders if pla.banks is not None and name not in pla.banks]
        self.self_matching = SelfMatchingLoss(pla.tau_1, pla.estimator, pla.symmetric_joint)
        self.modality_invariance = ModalityInvarianceLoss(pla.tau_2, config.mlm.self_term)
        self.relation = RelationLoss()

    def _make_classifiers(self, num_clusters: int) -> None:
        """Build g of every modality anew, with K rows, in place of the ones that are there."""
        self.num_clusters = num_clusters
        self.replace_classifiers(build_classifiers(self.encoders, self.config.model, num_clusters, self.config.pla.logit_scale))

    def load_initial_weights(self) -> str | None:
        """Start the encoders where the run `pla.start` ended, if it is given; return its checkpoint."""
        start = self.config.pla.start
        return self.load_encoders(Path(start) / LAST, "pla.start") if start else None

    def train_epoch(self, epoch: int) -> dict[str, float]:
        """Train one epoch (1-based); the banks are filled and clustered after `pla.mlm_only_epochs` of them. Epoch 0 only clusters."""
        annotated = epoch - self.config.mlm_only_epochs
        interval = self.config.pla.recluster_every
        if annotated == 1 or (annotated > 1 and interval and (annotated - 1) % interval == 0):
            self.cluster(epoch)
        elif annotated > 1 and self.bankless:
            self.refresh()
        self.annotating = annotated >= 1
        losses = super().train_epoch(epoch) if epoch else {}
        if annotated == 0 and epoch == self.config.optim.epochs:  # the clusters themselves are the pseudo-labels
            self.cluster(epoch)
        return {**losses, **self.agreement()} if self.clusters else losses

    def describe(self) -> dict[str, Features]:
        """Return modality -> features of the training samples."""
        return describe_samples(self.encoders, self.classifiers, self.samples, self.config.data, self.device)

    def refresh(self) -> None:
        """Give modalities without a momentum bank the features of the encoders as the last epoch left them (Table VIII)."""
        features = self.describe()
        for name in self.bankless:
            self.banks[name].fill(features[name].embeddings)

    def cluster(self, epoch: int) -> None:
        """Fill the banks with the current embeddings and start the classifiers at their clusters' centres (Sec. III-C)."""
        seed, pla = derive_seed(self.config.run.seed, "k-means", epoch) % 2**32, self.config.pla
        for name, features in self.describe().items():
            self.banks[name].fill(features.embeddings)
        rows = {name: bank.memory for name, bank in self.banks.items()}
        found = distributed.from_main(lambda: cluster_objects(rows, pla.num_clusters, pla.fuse == "trusted", seed))
        if found.record["num_clusters"] != self.num_clusters:
            self._make_classifiers(found.record["num_clusters"])
        for name, start in found.centroids.items():
            self.classifiers[name].start_from(start.to(self.device))
        self.clusters = {"record": found.record, "ids": found.ids, "epoch": epoch}

    def annotate(self) -> Annotation:
        """Return the pseudo-labels z of every training sample (Sec. III-D).

        z = argmax g(f(x)), fused as `pla.fuse` says; communities that no epoch of self matching followed are taken as they are,
        but for `pla.fuse: none`, where each modality has the z of its own classifier, which starts at their centres.
        """
        config = self.config
        found = annotate(self.encoders, self.classifiers, self.samples, config.data, self.device, config.pla.fuse, config.run.seed)
        own = self.clusters["ids"] is None or self.annotating or config.pla.fuse == "none"
        return found if own else found.with_ids(self.clusters["ids"])

    def state_dict(self) -> dict:
        """As `StageLearner.state_dict`, with the clusters found."""
        return {**super().state_dict(), "clusters": self.clusters}

    def load_state_dict(self, state: dict) -> None:
        """As `StageLearner.load_state_dict`."""
        if state["num_clusters"] != self.num_clusters:
            self._make_classifiers(state["num_clusters"])
        self.clusters = state["clusters"]
        self.annotating = bool(self.clusters) and self.clusters["epoch"] > self.config.mlm_only_epochs
        super().load_state_dict(state)

    @torch.no_grad()
    def agreement(self) -> dict[str, float]:
        """Return label-free diagnostics of the banks' cluster ids; the first two need pairs.

        agreement: share of objects whose modalities all fall into one cluster; 1 for a collapsed clustering too.
        cross_nmi: normalised mutual information of two modalities' ids, mean over the pairs; 0 for a collapsed one.
        """
        ids = [self.classifiers[name](bank.memory).argmax(dim=1).cpu() for name, bank in self.banks.items()]
        if self.config.data.pairing == "none":
            return {"clusters_used": len(torch.cat(ids).unique())}
        ids = torch.stack(ids)
        pairs = [nmi(one, other) for one, other in combinations(ids, 2)]
        return {
            "agreement": float((ids == ids[0]).all(dim=0).float().mean()),
            "cross_nmi": sum(pairs) / len(pairs),
            "clusters_used": len(ids.unique()),
        }

    def step(self, index: Tensor, raw: list[Tensor], generator: BatchGenerator) -> dict[str, Tensor]:
        """One step on Eq. 3 and 9, then the memory update of Eq. 6; on Eq. 14 alone in the first `pla.mlm_only_epochs`."""
        embeddings = self.embed(raw, generator)
        mlm = self.invariance(embeddings)
        if not self.annotating:
            self.optimise(mlm)
            return {"loss/mlm": mlm.detach()}
        ssm = sum(
            torch.stack([self._match(name, chosen, rows, generator.generator) for rows in views]).mean()
            for name, chosen, views in zip(self.encoders, index, embeddings)
        )
        weight = self.config.pla.lambda_1
        self.optimise(weight * ssm + (1 - weight) * mlm)
        for name, chosen, views in zip(self.encoders, index, embeddings):
            if name not in self.bankless:
                self.banks[name].update(chosen, F.normalize(views.detach(), dim=2).mean(dim=0))
        return {"loss/ssm": ssm.detach(), "loss/mlm": mlm.detach()}

    def _match(self, name: str, index: Tensor, embeddings: Tensor, generator: torch.Generator) -> Tensor:
        """Self-matching loss of one modality: a batch against its own memory rows and N' sampled ones (Eq. 7-8)."""
        bank, classifier = self.banks[name], self.classifiers[name]
        size = (self.config.pla.memory_samples,)
        sampled = torch.randint(len(bank), size, generator=generator, device=index.device)  # (N',)
        memory = classifier(bank(torch.cat([index, sampled])))  # (B + N', K)
        return self.self_matching(classifier(F.normalize(embeddings.float(), dim=1)), memory)


def export(session: Session, learner: PLALearner) -> None:
    """Write the pseudo-labels: the hand-over to step 2. All processes must call it, the main one writes."""
    start = session.config.pla.start
    clusters = {**learner.clusters["record"], **({"encoders": Path(start).resolve().name} if start else {})}
    write_annotation(session, learner, session.config.run.pseudo_labels, learner.annotate(), clusters)


def main(argv: list[str] | None = None) -> None:
    """Train step 1, write the pseudo-labels, and report the test scores of the last epoch."""
    arguments = stage_parser(
        __doc__, "finished run of step 1 whose encoders to cluster anew without training, e.g. --set pla.num_clusters=10"
    ).parse_args(argv)
    if arguments.source:
        go_on_from(arguments, "pla", "optim.epochs=0", "pla.mlm_only_epochs=0")
    session = open_session(Step1Config, "step1", arguments, DEFAULT_CONFIG, lambda config: mark_labels(config, config.pla.start))
    run_stage(session, lambda samples: PLALearner(session.config, samples, session.device), export)


if __name__ == "__main__":
    sys.exit(run_command(main))
