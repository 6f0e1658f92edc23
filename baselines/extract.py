"""What encoders say of a whole set of samples, in sample order."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from datasets.kinds import KINDS
from datasets.samples import PairedSamples
from utils.evaluation.features import EXTRACTION_BATCH, evaluation_mode
from utils.settings.data_options import DataConfig


@torch.no_grad()
def read_out(
    encoders: Mapping[str, nn.Module], samples: PairedSamples, data: DataConfig, device: torch.device, average: bool = True
) -> dict[str, Tensor]:
    """Return modality -> (N, D) float32 outputs of the encoders in eval mode, without augmentation, on the device, not normalised.

    Means over the views that `data.eval_view` and `data.eval_subsets` ask for; without `average`, (N, V, D), those views themselves.
    """
    found = {}
    for name, encoder in encoders.items():
        kind, rows = KINDS[data.kind_of(name)], samples.arrays[name]
        with evaluation_mode(encoder):
            parts = [
                torch.stack([encoder(view).float() for view in kind.prepare(batch.to(device), data)], dim=1)
                for batch in rows.split(EXTRACTION_BATCH)
            ]
        found[name] = torch.cat(parts).mean(dim=1) if average else torch.cat(parts)
    return found
