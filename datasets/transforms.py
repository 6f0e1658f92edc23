"""Batched transforms of images and point clouds: random ones for training, deterministic ones for evaluation.

All work on the device of their input and draw from the generator they are given, so that a seed fixes every sample.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from utils.engine.seed import BatchGenerator

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
ELASTIC_KNOTS = 5  # per side of the coarse grid of an elastic warp
WARP_WAVES = 4
WARP_FREQUENCY = 3.0  # radians per unit of the unit sphere: waves of about its diameter


def prepare_images(images: Tensor, size: int, resize: int) -> Tensor:
    """Evaluation transform: resize to `resize`, crop the central `size`, normalise with the ImageNet statistics.

    Args:
        images: (B, 3, S, S) uint8.
        size: side of the result in pixels; resize: side before the central crop, >= size.
    Returns:
        (B, 3, size, size) float32.
    """
    images = images.float() / 255
    if images.shape[-1] != resize:
        images = _resize(images, resize)
    start = (resize - size) // 2
    return _normalise(images[:, :, start : start + size, start : start + size])


def augment_images(images: Tensor, size: int, resize: int, augment, generator: BatchGenerator) -> Tensor:
    """Training transform: one random affine map and elastic warp, brightness and contrast per image, then as `prepare_images`.

    Rotation, scale, shear, shift and warp are one bilinear resampling of the stored image; outside it, the edge continues.

    Args:
        images: (B, 3, S, S) uint8; size, resize: as in `prepare_images`.
        augment: ranges, see `utils.settings.data_options.AugmentConfig` (the image_* fields).
        generator: on the device of the images.
    Returns:
        (B, 3, size, size) float32.
    """
    images = images.float() / 255
    if images.shape[-1] > resize:  # the resampling below does not smooth: without this, training images would alias
        images = _resize(images, resize)
    theta = _random_affine(len(images), size / resize, augment, generator)  # (B, 2, 3)
    grid = F.affine_grid(theta, [len(images), 3, size, size], align_corners=False)
    if augment.image_elastic:
        grid = grid + elastic_field(len(images), size, augment.image_elastic, generator)
    images = F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)
    images = _random_tone(images, augment, generator)
    if augment.image_flip:
        mirrored = _uniform(len(images), 0, 1, generator) < 0.5
        images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
    return _normalise(images)


def prepare_points(points: Tensor, num_points: int, subset: int = 0) -> Tensor:
    """Evaluation transform: of stored points (B, P, 3), in random order, the given one of the disjoint runs of `num_points`."""
    return points[:, subset * num_points : (subset + 1) * num_points]


def augment_points(points: Tensor, num_points: int, augment, generator: BatchGenerator) -> Tensor:
    """Training transform: a fresh random subset, smooth warp, rotation, scale per axis, shear, shift and jitter per cloud.

    Args:
        points: (B, P, 3) float32, z up.
        num_points: size of the subset, drawn without replacement, <= P.
        augment: ranges, see `utils.settings.data_options.AugmentConfig` (the point_* fields).
        generator: on the device of the points.
    Returns:
        (B, num_points, 3) float32.
    """
    batch_size, stored, _ = points.shape
    order = generator.rand(batch_size, stored).topk(num_points, dim=1, largest=False).indices
    points = points.gather(1, order[:, :, None].expand(-1, -1, 3))
    if augment.point_warp:
        points = points + random_warp(batch_size, augment.point_warp, generator)(points)
    matrix, shift = random_map(batch_size, augment, generator)
    noise = generator.randn(*points.shape) * augment.point_jitter
    return points @ matrix.transpose(1, 2) + shift + noise


def elastic_field(count: int, size: int, deviation: float, generator: BatchGenerator) -> Tensor:
    """Smooth random displacements of image grids (Simard et al. 2003): normal at the knots of a coarse grid, bicubic between.

    Args:
        size: side of the grid in pixels; deviation: standard deviation at the knots, in half sides of the image.
    Returns:
        (count, size, size, 2) float32, on the device of the generator, to be added to a sampling grid in [-1, 1].
    """
    knots = generator.randn(count, 2, ELASTIC_KNOTS, ELASTIC_KNOTS) * deviation
    return F.interpolate(knots, size=(size, size), mode="bicubic", align_corners=True).permute(0, 2, 3, 1)


def random_warp(count: int, deviation: float, generator: BatchGenerator) -> Callable[[Tensor], Tensor]:
    """Draw one smooth displacement field per 3D object: a sum of sines in random directions.

    d(p) = deviation sqrt(2 / W) sum_w a_w sin(f_w . p + phase_w) with standard normal amplitudes a_w (3,), normal wave vectors
    f_w of deviation WARP_FREQUENCY, and uniform phases, W = WARP_WAVES; each coordinate of d has the standard deviation asked for.

    Args:
        deviation: in units of the unit sphere.
    Returns:
        A function from points (count, P, 3) to their displacements (count, P, 3), on the device of the generator.
    """
    waves = generator.randn(count, WARP_WAVES, 3) * WARP_FREQUENCY
    phases = generator.rand(count, 1, WARP_WAVES) * (2 * math.pi)
    amplitudes = generator.randn(count, WARP_WAVES, 3) * (deviation * math.sqrt(2 / WARP_WAVES))
    return lambda points: torch.sin(points @ waves.transpose(1, 2) + phases) @ amplitudes


def random_map(count: int, augment, generator: BatchGenerator) -> tuple[Tensor, Tensor]:
    """Random affine maps of 3D objects: matrices (count, 3, 3), rotation x scale x shear, and shifts (count, 1, 3)."""
    low, high = augment.point_scale
    matrix = _random_rotation(count, augment, generator)
    scale = torch.exp(_uniform((count, 3), math.log(low), math.log(high), generator))
    matrix = matrix @ torch.diag_embed(scale) @ _random_shear(count, augment.point_shear, generator)
    reach = augment.point_translate
    return matrix, _uniform((count, 1, 3), -reach, reach, generator)


def _random_affine(count: int, zoom: float, augment, generator: BatchGenerator) -> Tensor:
    """Maps (count, 2, 3) from output to input coordinates; `zoom` is the central crop's share of the image."""
    degrees = augment.image_rotation_degrees
    angle = _uniform(count, -math.radians(degrees), math.radians(degrees), generator)
    degrees = augment.image_shear_degrees
    shear = torch.tan(_uniform(count, -math.radians(degrees), math.radians(degrees), generator))
    low, high = augment.image_scale
    scale = torch.exp(_uniform((count, 2), math.log(low), math.log(high), generator))
    shift = _uniform((count, 2), -2 * augment.image_translate, 2 * augment.image_translate, generator)
    cos, sin = angle.cos(), angle.sin()
    rotation = torch.stack([torch.stack([cos, -sin], 1), torch.stack([sin, cos], 1)], 1)  # (B, 2, 2)
    shearing = torch.eye(2, device=angle.device).repeat(count, 1, 1)
    shearing[:, 0, 1] = shear
    linear = rotation @ shearing @ torch.diag_embed(zoom / scale)
    return torch.cat([linear, shift[:, :, None]], dim=2)


def _random_tone(images: Tensor, augment, generator: BatchGenerator) -> Tensor:
    shape = (len(images), 1, 1, 1)
    reach = augment.image_contrast
    contrast = _uniform(shape, 1 - reach, 1 + reach, generator)
    reach = augment.image_brightness
    brightness = _uniform(shape, -reach, reach, generator)
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    return ((images - mean) * contrast + mean + brightness).clamp(0, 1)


def _random_rotation(count: int, augment, generator: BatchGenerator) -> Tensor:
    """Rotations (count, 3, 3): a turn about the vertical axis z, then small tilts about x and y."""
    turn = math.radians(augment.point_rotation_degrees)
    tilt = math.radians(augment.point_tilt_degrees)
    about_z = _axis_rotation(2, _uniform(count, -turn, turn, generator))
    about_x = _axis_rotation(0, _uniform(count, -tilt, tilt, generator))
    about_y = _axis_rotation(1, _uniform(count, -tilt, tilt, generator))
    return about_y @ about_x @ about_z


def _axis_rotation(axis: int, angle: Tensor) -> Tensor:
    first, second = [a for a in range(3) if a != axis]
    matrix = torch.eye(3, device=angle.device).repeat(len(angle), 1, 1)
    matrix[:, first, first] = matrix[:, second, second] = angle.cos()
    matrix[:, first, second] = -angle.sin()
    matrix[:, second, first] = angle.sin()
    return matrix


def _random_shear(count: int, reach: float, generator: BatchGenerator) -> Tensor:
    """Shears (count, 3, 3): the horizontal coordinates lean with the height z by up to `reach`."""
    matrix = torch.eye(3, device=generator.device).repeat(count, 1, 1)
    matrix[:, :2, 2] = _uniform((count, 2), -reach, reach, generator)
    return matrix


def _resize(images: Tensor, side: int) -> Tensor:
    return F.interpolate(images, size=(side, side), mode="bilinear", antialias=True, align_corners=False)


def _uniform(shape, low: float, high: float, generator: BatchGenerator) -> Tensor:
    shape = (shape,) if isinstance(shape, int) else shape
    return generator.rand(*shape) * (high - low) + low


def _normalise(images: Tensor) -> Tensor:
    mean = images.new_tensor(IMAGENET_MEAN)[:, None, None]
    std = images.new_tensor(IMAGENET_STD)[:, None, None]
    return (images - mean) / std
