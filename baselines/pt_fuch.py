"""PT-FUCH: J. Li et al., "Prototype-guided knowledge transfer for federated unsupervised cross-modal hashing", ACM Multimedia 2023.

Federated rounds, simulated in one process. Each client has private networks and a copy of the server's (global) ones, both trained with the
loss L_U of UCCH (`baselines.ucch`) and, with phi the outputs before tanh and prototypes c_1..c_P, clusters of the client's fused outputs
s_i = hat(phi_x_i + phi_y_i):

    private:  L = L_U + Lclu + Lkd / max(Lclu, 0.01),  no gradient through the denominator
      Lclu = CE(phi_x c^T, id) + CE(phi_y c^T, id), id the cluster of s_i, 0.001 off the logit of id
      Lkd  = mse of the cosine matrices xx, yy, xy, yx of codes and those of the server's networks
    global:   L = L_U + JS(c of the client) + JS(c of the server)
      JS(c) = mean over modalities of KL(target | softmax(cos(phi_m, c) / 0.26)),  target = mean_m softmax(cos(phi_m, c) / 0.81)
    server:   mean of the clients' global weights, weighted by their rows; c = cosine k-means of all clients' prototypes

Ranked: tanh phi of the server's networks. From the release: Adam 1e-4, weight decay 1e-6, batch 256, norm clip 1, 5 + 5 epochs per round.

Ours: 20 rounds; P = K; ONE client, as the setting here is central (its prototypes are the server's); `clients: 10` splits non-IID, a
Dirichlet draw (`dirichlet` 0.1: most of a label's samples go to one or two clients) over PSEUDO-LABELS, k-means of the image features,
and clients below `smallest_client` pairs (32) take no part. A fit that is cut off starts anew. Prototypes are
found anew at each private epoch from all rows of a client, where the release clusters a queue of recent batches; private
networks start as the server's; no further epochs on 3D alone.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from baselines.hashing import cosine
from baselines.method import COUNT, POSITIVE, Context, ShallowMethod
from baselines.revgrad import check_clusters, source_labels
from baselines.ucch import DEFAULTS, LIMITS, UnifiedContrast, random_memory
from models import FeatureMLP
from utils.engine.seed import derive_seed, generator_for
from utils.errors import UserError
from utils.evaluation.clustering import kmeans
from utils.settings.options import ModelConfig

MARGIN, FLOOR, SHARP, SOFT = 0.001, 1e-2, 0.26, 0.81
WEIGHT_DECAY, CLIP = 1e-6, 1.0


class Networks:
    """Encoders of both modalities with UCCH's memory of a client's rows and an optimiser."""

    def __init__(self, encoders: nn.ModuleList, memory: Tensor, settings: Mapping[str, Any]) -> None:
        self.encoders = copy.deepcopy(encoders)
        self.contrast, self.batch_size = UnifiedContrast(memory, settings), settings["batch_size"]
        self.optimizer = torch.optim.Adam(self.encoders.parameters(), lr=settings["learning_rate"], weight_decay=WEIGHT_DECAY)
        self.warm_up = True  # in the first epoch

    def train_epoch(self, rows: list[Tensor], further: Callable[[Tensor, list[Tensor]], Tensor]) -> None:
        """Train on rows (N, d) of both modalities with L_U + further(index (B,), outputs phi, two (B, L))."""
        self.encoders.train()
        for index in batches(len(rows[0]), self.batch_size, rows[0].device):
            outputs = [encoder(part[index]) for encoder, part in zip(self.encoders, rows, strict=True)]
            codes = tuple(F.normalize(torch.tanh(phi), dim=1) for phi in outputs)
            loss = self.contrast.loss(index, codes, self.warm_up) + further(index, outputs)
            self.optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.encoders.parameters(), CLIP)
            self.optimizer.step()
            self.contrast.update(index, codes)
        self.warm_up = False


class Client:
    """Rows (N, d) of both modalities, private networks and a copy of the server's."""

    def __init__(self, server: nn.ModuleList, rows: list[Tensor], num_prototypes: int, settings: Mapping[str, Any], memories: list[Tensor]):
        self.rows, self.settings, self.num_prototypes = rows, settings, min(num_prototypes, len(rows[0]))
        self.private, self.shared = (Networks(server, memory, settings) for memory in memories)
        self.prototypes: Tensor | None = None

    def train_round(self, server: nn.ModuleList, server_prototypes: Tensor | None, seed: int) -> None:
        """Train private and shared networks for one round; the shared ones start as the server's, which teach the private ones."""
        self.teacher = [torch.tanh(phi) for phi in outputs_of(server, self.rows)]
        for _ in range(self.settings["private_epochs"]):
            self._cluster(seed)
            self.private.train_epoch(self.rows, self.private_loss)
        self.shared.encoders.load_state_dict(server.state_dict())
        known = [self.prototypes, self.prototypes if server_prototypes is None else server_prototypes]
        for _ in range(self.settings["global_epochs"]):
            self.shared.train_epoch(self.rows, lambda index, outputs: sum(prototype_loss(outputs, centres) for centres in known))

    def _cluster(self, seed: int) -> None:
        fused = sum(outputs_of(self.private.encoders, self.rows))
        if not torch.isfinite(fused).all():
            raise UserError("PT-FUCH: outputs are not finite: scale the features, or lower method.options.learning_rate")
        fused[(fused == 0).all(dim=1)] = 1  # as of zero rows before the first step: one direction for all of them
        fused = F.normalize(fused, dim=1)
        start = {"num_init": 1, "seed": seed} if self.prototypes is None else {"init": self.prototypes}
        self.prototypes, self.ids = kmeans(fused, self.num_prototypes, spherical=True, **start)

    def private_loss(self, index: Tensor, outputs: list[Tensor]) -> Tensor:
        """Return Lclu + Lkd / Lclu of a batch."""
        ids = self.ids[index]
        off = MARGIN * F.one_hot(ids, self.num_prototypes)
        clustering = sum(F.cross_entropy(phi @ self.prototypes.T - off, ids) for phi in outputs)
        taught = distillation([torch.tanh(phi) for phi in outputs], [part[index] for part in self.teacher])
        return clustering + taught / clustering.detach().clamp_min(FLOOR)


def distillation(codes: list[Tensor], teacher: list[Tensor]) -> Tensor:
    """Return Lkd of codes (B, L) of both modalities and the teacher's."""
    return sum(F.mse_loss(cosine(codes[a], codes[b]), cosine(teacher[a], teacher[b])) for a in (0, 1) for b in (0, 1))


def prototype_loss(outputs: list[Tensor], prototypes: Tensor) -> Tensor:
    """Return JS(c) of outputs (B, L) of both modalities and prototypes (P, L); the target has no gradient."""
    scores = [cosine(phi, prototypes) for phi in outputs]
    target = torch.stack([(values / SOFT).softmax(dim=1) for values in scores]).mean(dim=0).detach()
    return sum(F.kl_div((values / SHARP).log_softmax(dim=1), target, reduction="batchmean") for values in scores) / len(scores)


def batches(count: int, size: int, device: torch.device) -> Iterator[Tensor]:
    """Yield shuffled sample numbers (B,) of full batches, of one batch if there are few samples."""
    size = min(size, count)
    return (index for index in torch.randperm(count, device=device).split(size) if len(index) == size)


@torch.no_grad()
def outputs_of(encoders: nn.ModuleList, rows: list[Tensor]) -> list[Tensor]:
    """Return phi (N, L) of both modalities in eval mode."""
    return [encoder(part) for encoder, part in zip(encoders.eval(), rows, strict=True)]


def average(states: Sequence[Mapping[str, Tensor]], weights: Sequence[float]) -> dict[str, Tensor]:
    """Return the weighted mean of state dicts; counters of integers are the first one's."""
    total = sum(weights)
    mean = dict(states[0])
    for name in [name for name, value in mean.items() if value.is_floating_point()]:
        mean[name] = sum(state[name] * (weight / total) for state, weight in zip(states, weights, strict=True))
    return mean


def split(labels: np.ndarray, clients: int, concentration: float, seed: int) -> list[np.ndarray]:
    """Return the sample numbers of each client: of every label's samples, shares drawn from a Dirichlet distribution."""
    draw = np.random.default_rng(seed)
    parts: list[list[np.ndarray]] = [[] for _ in range(clients)]
    for label in np.unique(labels):
        members = draw.permutation(np.flatnonzero(labels == label))
        cuts = (draw.dirichlet([concentration] * clients).cumsum()[:-1] * len(members)).round().astype(int)
        for part, chosen in zip(parts, np.split(members, cuts), strict=True):
            part.append(chosen)
    return [np.concatenate(part) for part in parts]


class PTFUCH(ShallowMethod):
    """Prototype-guided federated hashing; fitted on features by a training of its own."""

    dim = 256
    defaults = {
        **DEFAULTS, "rounds": 20, "private_epochs": 5, "global_epochs": 5, "clients": 1, "batch_size": 256, "learning_rate": 1e-4,
        "dirichlet": 0.1, "smallest_client": 32,
    }
    limits = {
        **LIMITS, **dict.fromkeys(("rounds", "private_epochs", "global_epochs", "clients"), COUNT),
        **dict.fromkeys(("batch_size", "smallest_client"), {"min": 2}), "learning_rate": POSITIVE, "dirichlet": POSITIVE,
    }

    def fit(self, features: Mapping[str, np.ndarray], context: Context) -> None:
        settings, self.names, self.device = context.settings, context.modalities, context.device
        check_clusters(context)  # of all pairs; of fewer ones a client has fewer prototypes
        torch.manual_seed(derive_seed(context.seed, "pt_fuch"))  # of first weights, batches and negatives
        rows = [torch.as_tensor(features[name], dtype=torch.float32, device=self.device) for name in self.names]
        hidden = ModelConfig().feature_hidden  # the encoders of all other methods
        self.server = nn.ModuleList(FeatureMLP(part.shape[1], hidden, context.dim) for part in rows).to(self.device)
        clients = [self._client(index, rows, context) for index in self._split(len(rows[0]), context)]
        prototypes = None
        for number in range(settings["rounds"]):
            for client in clients:
                client.train_round(self.server, prototypes, derive_seed(context.seed, "pt_fuch", number))
            weights = [len(client.rows[0]) for client in clients]
            self.server.load_state_dict(average([client.shared.encoders.state_dict() for client in clients], weights))
            stacked = torch.cat([client.prototypes for client in clients])
            prototypes = kmeans(stacked, min(context.num_clusters, len(stacked)), seed=context.seed, num_init=1, spherical=True)[0]

    def _split(self, count: int, context: Context) -> list[np.ndarray]:
        clients, smallest = context.settings["clients"], context.settings["smallest_client"]
        if clients == 1:
            return [np.arange(count)]
        seed, labels = derive_seed(context.seed, "clients"), source_labels(context).cpu().numpy()
        found = [part for part in split(labels, clients, context.settings["dirichlet"], seed) if len(part) >= smallest]
        if not found:
            raise UserError(f"method.options.clients: none of {clients} clients has {smallest} of the {count} pairs; lower it")
        return found

    def _client(self, index: np.ndarray, rows: list[Tensor], context: Context) -> Client:
        own = [part[torch.as_tensor(index, device=self.device)] for part in rows]
        generator = generator_for(context.seed, "pt_fuch memory", len(index))
        memories = [random_memory(len(index), context.dim, generator).to(self.device) for _ in range(2)]
        return Client(self.server, own, context.num_clusters, context.settings, memories)

    def transform(self, name: str, rows: np.ndarray) -> np.ndarray:
        encoder = self.server[self.names.index(name)].eval()
        with torch.no_grad():
            return torch.tanh(encoder(torch.as_tensor(rows, dtype=torch.float32, device=self.device))).cpu().numpy()
