"""Step 1, pseudo-label annotation (PLA): trains with self matching and modality invariance, writes pseudo-label files."""

import sys
from itertools import combinations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from datasets.batches import BatchSource
from datasets.label_runs import exported_folder
from datasets.pseudo_labels import pseudo_label_path, read_origin, write_pseudo_labels
from datasets.samples import PairedSamples, embed_samples
from losses import ModalityInvarianceLoss, SelfMatchingLoss
from models import LinearClassifier, MemoryBank
from models.build import build_encoders
from training import run_stage
from utils.engine import distributed
from utils.engine.learner import StageLearner
from utils.engine.run_log import environment
from utils.engine.seed import BatchGenerator, derive_seed
from utils.engine.session import Session, open_session, run_command, stage_parser
from utils.errors import UserError
from utils.evaluation.clustering import joint_then_per_modality, nmi
from utils.settings.config import config_hash
from utils.settings.options import Step1Config

DEFAULT_CONFIG = "configs/mnist3d/step1.yaml"


class PLALearner(StageLearner):
    """Encoders, classifiers g, memory banks and optimiser of step 1 (Algorithm 1, first half).

    Args:
        config: settings of step 1.
        samples: training samples, without labels.
        device: where everything lives.
    Raises:
        UserError: if there are more clusters than samples.
    """

    parts = (*StageLearner.parts, "banks")

    def __init__(self, config: Step1Config, samples: PairedSamples, device: torch.device) -> None:
        self.samples = samples
        dim, pla = config.model.embedding_dim, config.pla
        if pla.num_clusters > min(samples.counts.values()):
            raise UserError(f"pla.num_clusters (K = {pla.num_clusters}) exceeds the training samples: {samples.counts}")
        encoders = build_encoders(config.data.modalities, config.model, config.run.sync_batchnorm)
        classifiers = nn.ModuleDict({name: LinearClassifier(dim, pla.num_clusters, pla.logit_scale) for name in encoders})
        source = BatchSource(samples, config.data, device)
        super().__init__("step1", config, source, samples.arrays, encoders, classifiers, device)
        banks = {name: MemoryBank(count, dim, pla.momentum, pla.renormalise) for name, count in samples.counts.items()}
        self.banks = nn.ModuleDict(banks).to(device)
        self.bankless = [name for name in encoders if pla.banks is not None and name not in pla.banks]
        self.self_matching = SelfMatchingLoss(pla.tau_1, pla.estimator, pla.symmetric_joint)
        self.modality_invariance = ModalityInvarianceLoss(pla.tau_2, config.mlm.self_term)

    def train_epoch(self, epoch: int) -> dict[str, float]:
        """Train one epoch (1-based); the banks are filled and clustered after `pla.mlm_only_epochs` of them."""
        annotated = epoch - self.config.pla.mlm_only_epochs
        interval = self.config.pla.recluster_every
        if annotated == 1 or (annotated > 1 and interval and (annotated - 1) % interval == 0):
            self.cluster(epoch)
        elif annotated > 1 and self.bankless:
            self.refresh()
        self.annotating = annotated >= 1
        losses = super().train_epoch(epoch)
        return {**losses, **self.agreement()} if self.annotating else losses

    def refresh(self) -> None:
        """Give modalities without a momentum bank the features of the encoders as the last epoch left them (Table VIII)."""
        encoders = {name: self.encoders[name] for name in self.bankless}
        for name, rows in embed_samples(encoders, self.samples, self.config.data, self.device).items():
            self.banks[name].fill(rows)

    def cluster(self, epoch: int) -> None:
        """Fill the banks with the current embeddings and start the classifiers at their k-means centres (Sec. III-C)."""
        seed = derive_seed(self.config.run.seed, "k-means", epoch) % 2**32
        for name, rows in embed_samples(self.encoders, self.samples, self.config.data, self.device).items():
            self.banks[name].fill(rows)
        memories = [bank.memory for bank in self.banks.values()]
        cluster = lambda: joint_then_per_modality(memories, self.config.pla.num_clusters, seed)[1]
        centroids = distributed.from_main(lambda: [start.cpu() for start in cluster()])
        for classifier, start in zip(self.classifiers.values(), centroids):
            classifier.start_from(start.to(self.device))

    @torch.no_grad()
    def pseudo_labels(self) -> dict[str, Tensor]:
        """Return z = argmax g(f(x)) (Sec. III-D) of every training sample: modality -> (N,) int64 on the CPU."""
        embeddings = embed_samples(self.encoders, self.samples, self.config.data, self.device)
        return {name: self.classifiers[name](rows).argmax(dim=1).cpu() for name, rows in embeddings.items()}

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
        mlm = self.invariance(raw, embeddings, generator)
        if not self.annotating:
            self.optimise(mlm)
            return {"loss/mlm": mlm.detach()}
        ssm = sum(self._match(*part, generator.generator) for part in zip(self.encoders, index, embeddings))
        weight = self.config.pla.lambda_1
        self.optimise(weight * ssm + (1 - weight) * mlm)
        for name, chosen, rows in zip(self.encoders, index, embeddings):
            if name not in self.bankless:
                self.banks[name].update(chosen, rows.detach())
        return {"loss/ssm": ssm.detach(), "loss/mlm": mlm.detach()}

    def _match(self, name: str, index: Tensor, embeddings: Tensor, generator: torch.Generator) -> Tensor:
        """Self-matching loss of one modality: a batch against its own memory rows and N' sampled ones (Eq. 7-8)."""
        bank, classifier = self.banks[name], self.classifiers[name]
        size = (self.config.pla.memory_samples,)
        sampled = torch.randint(len(bank), size, generator=generator, device=index.device)  # (N',)
        memory = classifier(bank(torch.cat([index, sampled])))  # (B + N', K)
        return self.self_matching(classifier(F.normalize(embeddings.float(), dim=1)), memory)


def export(session: Session, learner: PLALearner) -> None:
    """Write one pseudo-label file per modality: the hand-over to step 2. All processes must call it, the main one writes."""
    config, run = session.config, session.run
    folder = exported_folder(run, config.run.pseudo_labels)
    provenance = {
        "run_id": run.run_id, "epoch": config.optim.epochs, "config_hash": config_hash(config),
        "git_sha": environment(config.run.seed)["git_sha"], "seed": config.run.seed,
        "pairing": config.data.pairing,
    }
    for name, labels in learner.pseudo_labels().items():
        if not run.writes:
            continue
        path = pseudo_label_path(folder, config.data.dataset, name)
        replaced = read_origin(path).get("run_id", "an unknown run") if path.exists() else run.run_id
        write_pseudo_labels(
            path, learner.samples.lists[name], labels.numpy(), dataset=config.data.dataset,
            num_clusters=config.pla.num_clusters, provenance=provenance,
        )
        run.log(f"wrote {path}" + (f", replacing that of {replaced}" if replaced != run.run_id else ""))


def main(argv: list[str] | None = None) -> None:
    """Train step 1, write the pseudo-labels, and report the test scores of the last epoch."""
    session = open_session(Step1Config, "step1", stage_parser(__doc__).parse_args(argv), DEFAULT_CONFIG)
    run_stage(session, lambda samples: PLALearner(session.config, samples, session.device), export)


if __name__ == "__main__":
    sys.exit(run_command(main))
