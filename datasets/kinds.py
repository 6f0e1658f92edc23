"""What each kind of file needs: how it is read, how its samples are augmented, and how they are prepared for evaluation."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from datasets.arrays import MAX_POINTS, load_images, load_points, load_vectors
from datasets.lists import SampleList
from datasets.mesh_faces import augment_faces, load_faces, prepare_faces
from datasets.transforms import augment_images, augment_points, prepare_images, prepare_points
from utils.errors import UserError
from utils.settings.options import DataConfig


@dataclass(frozen=True)
class Kind:
    """The three steps from files to the input of an encoder.

    Attributes:
        load: list file -> (N, V, ...) array, V views per object (1 but for pictures).
        augment: rows (B, ...) of one view each, settings, generator -> random training input (B, ...).
        prepare: rows (B, V, ...), settings -> deterministic evaluation inputs (B, ...), one per view or subset to average.
    """

    load: Callable[[SampleList, DataConfig], np.ndarray]
    augment: Callable[[Tensor, DataConfig, torch.Generator], Tensor]
    prepare: Callable[[Tensor, DataConfig], list[Tensor]]


def view_list(sample_list: SampleList, view: int) -> SampleList:
    """Return the list of another view of the same objects: FOLDER/NAME.png -> FOLDER/view_01/NAME.png for view 1.

    Raises:
        UserError: if a picture of that view is missing (names file, row and key).
    """
    if view == 0:
        return sample_list
    moved = lambda path: Path(path).parent / f"view_{view:02d}" / Path(path).name
    files = tuple(map(moved, sample_list.files))
    for row, file in enumerate(files, start=1):
        if not file.is_file():
            raise UserError(
                f"{sample_list.path}, row {row}: {file} does not exist; data.num_views asks for view {view}: prepare more views "
                "or lower data.num_views"
            )
    return replace(sample_list, names=tuple(str(moved(name)) for name in sample_list.names), files=files)


def _load_image_views(sample_list: SampleList, data: DataConfig) -> np.ndarray:
    views = [load_images(view_list(sample_list, view), data.image_resize) for view in range(data.num_views)]
    if len({array.shape for array in views}) != 1:
        raise UserError(f"{sample_list.path}: the views differ in size: {[array.shape for array in views]}; prepare them again")
    return np.stack(views, axis=1)


def _load_clouds(sample_list: SampleList, data: DataConfig) -> np.ndarray:
    clouds = load_points(sample_list, max(MAX_POINTS, data.num_points))
    for subsets, what in ((1, ""), (data.eval_subsets, f"data.eval_subsets = {data.eval_subsets} disjoint subsets of ")):
        if clouds.shape[1] < data.num_points * subsets:
            raise UserError(
                f"{sample_list.path}: clouds hold {clouds.shape[1]} points, fewer than {what}data.num_points = {data.num_points}; "
                "prepare more points or lower the setting"
            )
    return clouds[:, None]


KINDS: dict[str, Kind] = {
    "image": Kind(
        load=_load_image_views,
        augment=lambda rows, data, generator: augment_images(rows, data.image_size, data.image_resize, data.augment, generator),
        prepare=lambda rows, data: [
            prepare_images(rows[:, view], data.image_size, data.image_resize)
            for view in range(rows.shape[1] if data.eval_view == "mean" else 1)
        ],
    ),
    "points": Kind(
        load=_load_clouds,
        augment=lambda rows, data, generator: augment_points(rows, data.num_points, data.augment, generator),
        prepare=lambda rows, data: [prepare_points(rows[:, 0], data.num_points, subset) for subset in range(data.eval_subsets)],
    ),
    "mesh": Kind(
        load=lambda sample_list, data: load_faces(sample_list, data.max_faces)[:, None],
        augment=lambda rows, data, generator: augment_faces(rows, data.augment, generator),
        prepare=lambda rows, data: [prepare_faces(rows[:, 0])],
    ),
    "features": Kind(
        load=lambda sample_list, data: load_vectors(sample_list, data.features[sample_list.modality])[:, None],
        augment=lambda rows, data, generator: rows,
        prepare=lambda rows, data: [rows[:, 0]],
    ),
}
