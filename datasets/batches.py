"""The training batches of a stage: fetched from the device or from the host, then augmented on the device.

Both routes, and any number of processes, give the same batches: which samples and views make up a batch is drawn before
anything is fetched, and augmentation runs on the device from one generator.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from datasets.kinds import KINDS
from datasets.samples import PairedSamples
from utils.engine import distributed
from utils.engine.seed import BatchGenerator
from utils.errors import UserError
from utils.settings.options import DataConfig


class BatchSource:
    """What a learner draws its batches of the training set from, on the device.

    Attributes:
        counts: number of samples per modality.
        stored_views: pictures per sample to draw from, 1 if training sees the first only.
        views: augmented views per sample and step, `data.views`.
    """

    def __init__(self, samples: PairedSamples, data: DataConfig, device: torch.device) -> None:
        self.data, self.device = data, device
        self.arrays = list(samples.arrays.values())
        self.kinds = [KINDS[data.kind_of(name)] for name in samples.arrays]
        self.counts = list(samples.counts.values())
        self.stored_views = [array.shape[1] if data.train_view == "random" else 1 for array in self.arrays]
        self.views = [_views(name, array, data) for name, array in samples.arrays.items()]
        self.of_view = [place for place, views in enumerate(self.views) for _ in range(views)]  # modality of every view

    @property
    def on_host(self) -> bool:
        """Whether batches come through a DataLoader."""
        return self.data.placement == "host" or self.arrays[0].device.type != self.device.type

    def fetch(self, plan: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, list[Tensor]]]:
        """Yield every batch of `utils.engine.learner.plan_epoch`, not yet augmented.

        Yields:
            The sample numbers (M, B) of the whole batch, and this process's rows (b, ...) of every view, on the device.
        """
        arrays = [self.arrays[place] for place in self.of_view]
        if not self.on_host:
            for index, views in plan:
                yield index, _rows(arrays, views[:, :, distributed.own_share(views.shape[2])])
            return
        rows = _HostBatches(arrays, [(index.cpu(), views.cpu()) for index, views in plan])
        own = torch.Generator()  # the loader draws a seed that nothing uses; from torch's own it would shift MeshNet's masks
        loader = DataLoader(
            rows, batch_size=None, generator=own, num_workers=self.data.workers, pin_memory=self.device.type == "cuda",
            prefetch_factor=4 if self.data.workers else None,
        )
        for index, raw in loader:
            yield index.to(self.device, non_blocking=True), [part.to(self.device, non_blocking=True) for part in raw]

    def augment(self, raw: list[Tensor], generator: BatchGenerator) -> list[Tensor]:
        """Return one randomly transformed input per view of `fetch`: (b, 3, H, W), (b, P, 3) or (b, F, 18) float32.

        The generator, on the same device, is the only source of randomness.
        """
        return [self.kinds[place].augment(rows, self.data, generator) for place, rows in zip(self.of_view, raw)]


def _views(name: str, array: Tensor, data: DataConfig) -> int:
    """How many views of a sample a step sees: as `data.views` says, but of features, which nothing augments, those stored at most."""
    if name not in data.features:
        return data.views_of(name)
    if data.positives == "views" and array.shape[1] < 2:
        raise UserError(f"data.positives: views contrasts two views of a sample, but data.features of {name} hold one vector each")
    return min(data.views_of(name), array.shape[1])


def _rows(arrays: list[Tensor], index: Tensor) -> list[Tensor]:
    return [array[numbers, views] for array, numbers, views in zip(arrays, *index)]


class _HostBatches(Dataset):
    """Batch k of a plan, cut out of arrays in host memory, which the workers share."""

    def __init__(self, arrays: list[Tensor], plan: list[tuple[Tensor, Tensor]]) -> None:
        self.arrays, self.plan = arrays, plan
        self.share = distributed.own_share(plan[0][1].shape[2]) if plan else slice(None)  # workers know no process group

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, batch: int) -> tuple[Tensor, list[Tensor]]:
        index, views = self.plan[batch]
        return index, _rows(self.arrays, views[:, :, self.share])
