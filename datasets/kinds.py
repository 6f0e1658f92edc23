"""What each kind of file needs: how it is read, how its samples are augmented, and how they are prepared for evaluation."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from datasets.arrays import MAX_POINTS, Allocate, load_images, load_points, load_vectors
from datasets.lists import SampleList
from datasets.mesh_faces import load_faces
from datasets.mesh_transforms import augment_faces, prepare_faces
from datasets.transforms import augment_images, augment_points, prepare_images, prepare_points
from utils.errors import UserError
from utils.settings.options import DataConfig


@dataclass(frozen=True)
class Kind:
    """The steps from files to the input of an encoder.

    Attributes:
        load: list file -> (N, V, ...) array, V views per object (1 but for pictures); a third argument makes it, default `np.empty`.
        sources: list file -> the settings (JSON values) and the files that decide this array.
        check: array, list file -> nothing; a UserError if it is too small for the other settings.
        augment: rows (B, ...) of one view each, settings, generator -> random training input (B, ...).
        prepare: rows (B, V, ...), settings -> deterministic evaluation inputs (B, ...), one per view or subset to average.
    """

    load: Callable[..., np.ndarray]
    sources: Callable[[SampleList, DataConfig], tuple[list, Sequence[str]]]
    augment: Callable[[Tensor, DataConfig, torch.Generator], Tensor]
    prepare: Callable[[Tensor, DataConfig], list[Tensor]]
    check: Callable[[np.ndarray, SampleList, DataConfig], None] = lambda array, sample_list, data: None


def view_list(sample_list: SampleList, view: int) -> SampleList:
    """Return the list of another view of the same objects: FOLDER/NAME.png -> FOLDER/view_01/NAME.png for view 1.

    Raises:
        UserError: if a picture of that view is missing (names file, row and key).
    """
    if view == 0:
        return sample_list
    moved = lambda path: os.path.join(os.path.dirname(path), f"view_{view:02d}", os.path.basename(path))
    files = tuple(map(moved, sample_list.files))
    for row, file in enumerate(files, start=1):
        if not os.path.isfile(file):
            raise UserError(
                f"{sample_list.path}, row {row}: {file} does not exist; data.num_views asks for view {view}: prepare more views "
                "or lower data.num_views"
            )
    return replace(sample_list, names=tuple(map(moved, sample_list.names)), files=files)


def _load_image_views(sample_list: SampleList, data: DataConfig, allocate: Allocate = np.empty) -> np.ndarray:
    whole = None
    for view in range(data.num_views):
        def part(shape: tuple[int, ...], dtype: type) -> np.ndarray:
            nonlocal whole
            whole = allocate((shape[0], data.num_views, *shape[1:]), dtype) if whole is None else whole
            if whole[:, 0].shape != shape:
                found = f"{whole.shape[-1]} and {shape[-1]} pixels"
                raise UserError(f"{sample_list.path}: the views differ in size: {found}; prepare them again")
            return whole[:, view]  # noqa: B023

        load_images(view_list(sample_list, view), data.image_resize, part)
    return whole


def _shown(rows: Tensor, data: DataConfig) -> Tensor:
    """Return the views (B, V, ...) that evaluation sees."""
    return rows if data.eval_view == "mean" else rows[:, :1]


def _one_view(allocate: Allocate) -> Allocate:
    """Return what makes (N, ...) as the only view of (N, 1, ...)."""
    return lambda shape, dtype: allocate((shape[0], 1, *shape[1:]), dtype)[:, 0]


def _load_clouds(sample_list: SampleList, data: DataConfig, allocate: Allocate = np.empty) -> np.ndarray:
    clouds = load_points(sample_list, max(MAX_POINTS, data.num_points), allocate=_one_view(allocate))[:, None]
    _check_clouds(clouds, sample_list, data)
    return clouds


def _check_clouds(clouds: np.ndarray, sample_list: SampleList, data: DataConfig) -> None:
    for subsets, what in ((1, ""), (data.eval_subsets, f"data.eval_subsets = {data.eval_subsets} disjoint subsets of ")):
        if clouds.shape[2] < data.num_points * subsets:
            raise UserError(
                f"{sample_list.path}: clouds hold {clouds.shape[2]} points, fewer than {what}data.num_points = {data.num_points}; "
                "prepare more points or lower the setting"
            )


KINDS: dict[str, Kind] = {
    "image": Kind(
        load=_load_image_views,
        sources=lambda rows, data: (
            [data.image_resize, data.num_views], [file for view in range(data.num_views) for file in view_list(rows, view).files]
        ),
        augment=lambda rows, data, generator: augment_images(rows, data.image_size, data.image_resize, data.augment, generator),
        prepare=lambda rows, data: [
            prepare_images(view, data.image_size, data.image_resize) for view in _shown(rows, data).unbind(1)
        ],
    ),
    "points": Kind(
        load=_load_clouds,
        sources=lambda rows, data: ([max(MAX_POINTS, data.num_points)], rows.files),
        check=_check_clouds,
        augment=lambda rows, data, generator: augment_points(rows, data.num_points, data.augment, generator),
        prepare=lambda rows, data: [prepare_points(rows[:, 0], data.num_points, subset) for subset in range(data.eval_subsets)],
    ),
    "mesh": Kind(
        load=lambda rows, data, allocate=np.empty: load_faces(rows, data.max_faces, allocate=_one_view(allocate))[:, None],
        sources=lambda rows, data: ([data.max_faces], rows.files),
        augment=lambda rows, data, generator: augment_faces(rows, data.augment, generator),
        prepare=lambda rows, data: [prepare_faces(rows[:, 0])],
    ),
    "features": Kind(
        load=lambda rows, data, allocate=np.empty: load_vectors(rows, data.features[rows.modality], allocate),
        sources=lambda rows, data: ([data.features[rows.modality]], rows.files),
        augment=lambda rows, data, generator: rows,
        prepare=lambda rows, data: list(_shown(rows, data).unbind(1)),
    ),
}
