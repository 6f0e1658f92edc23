"""datasets/transforms.py: randomness by generator alone, ranges recovered from the output, and identity settings."""

import math

import pytest
import torch
from augmentation import generator, only
from torch.nn import functional as F

from datasets.mesh_transforms import augment_faces
from datasets.transforms import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    augment_images,
    augment_points,
    elastic_field,
    prepare_images,
    prepare_points,
    random_warp,
)
from utils.engine.seed import BatchGenerator, generator_for
from utils.settings.data_options import AugmentConfig

MEAN, STD = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))


def noise_images(count=3, side=28, seed=5):
    return torch.randint(0, 256, (count, 3, side, side), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def smooth_images(side, count=3):
    """Band-limited images, the same scene at any resolution."""
    axis = (torch.arange(side) + 0.5) / side
    waves = [torch.sin(2 * axis[:, None] + k) * torch.cos(3 * axis + c) for k in range(count) for c in range(3)]
    return (127 + 120 * torch.stack(waves).view(count, 3, side, side)).round().to(torch.uint8)


def cloud(batch=2, points=50, seed=7):
    return torch.randn(batch, points, 3, generator=torch.Generator().manual_seed(seed))


def to_unit(images):
    return images * STD + MEAN


def test_evaluation_by_hand():
    images, points = noise_images(2, 10), cloud()
    torch.testing.assert_close(prepare_images(images, 6, 10), (images[:, :, 2:8, 2:8] / 255 - MEAN) / STD, rtol=0, atol=1e-5)
    assert torch.equal(prepare_points(points, 20), points[:, :20]) and torch.equal(prepare_points(points, 50), points)


AUGMENTATIONS = {
    "images": (noise_images(6), lambda rows, source: augment_images(rows, 24, 28, AugmentConfig(image_flip=True), source)),
    "points": (cloud(6), lambda rows, source: augment_points(rows, 30, AugmentConfig(), source)),
    "faces": (torch.cat([cloud(6, 40)] * 6, dim=2), lambda rows, source: augment_faces(rows, AugmentConfig(), source)),
}


@pytest.mark.parametrize("kind", AUGMENTATIONS)
def test_the_generator_is_the_only_randomness_and_shares_of_a_batch_join_to_the_whole(kind):
    stored, augment = AUGMENTATIONS[kind]
    before = stored.clone()
    torch.manual_seed(0)
    state = torch.get_rng_state()
    source = BatchGenerator(generator_for(0, "train", 1))
    first = augment(stored, source)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert torch.equal(augment(stored, BatchGenerator(generator_for(0, "train", 1))), first)
    for other in (source, BatchGenerator(generator_for(0, "train", 2)), BatchGenerator(generator_for(1, "train", 1))):  # the next batch, too
        assert all(not torch.allclose(a, b, atol=1e-3) for a, b in zip(augment(stored, other), first))
    assert torch.equal(stored, before)
    rows = augment(stored[:1].expand_as(stored), source).flatten(1)  # every sample gets its own transform
    assert (torch.cdist(rows, rows) + torch.eye(6) * 1e9).min() > 0.1
    seeded = lambda: torch.Generator().manual_seed(3)
    parts = [augment(stored[rows], BatchGenerator(seeded(), rows, 6)) for rows in (slice(0, 2), slice(2, 6))]
    torch.testing.assert_close(torch.cat(parts), augment(stored, BatchGenerator(seeded())), rtol=0, atol=1e-6)


@pytest.mark.parametrize("stored,size,resize", [(28, 28, 28), (28, 24, 28), (28, 24, 32), (30, 32, 32), (16, 56, 64), (10, 16, 40)])
def test_zero_augmentation_equals_evaluation(stored, size, resize):
    images = noise_images(3, stored)
    trained, evaluated = plain_and_evaluated(images, size, resize)
    assert torch.allclose(trained, evaluated, atol=1e-4) and torch.equal(images, noise_images(3, stored))
    torch.testing.assert_close(plain_and_evaluated(images[1:2], size, resize)[1][0], evaluated[1], rtol=0, atol=1e-6)
    for result in (trained, augment_images(images, size, resize, AugmentConfig(), generator())):
        assert result.shape == (3, 3, size, size) and result.dtype == torch.float32 and result.isfinite().all()


def plain_and_evaluated(images, size, resize):
    """In 0..1: without any augmentation, and as evaluation sees them."""
    return to_unit(augment_images(images, size, resize, only(), generator())), to_unit(prepare_images(images, size, resize))


def test_zero_augmentation_and_evaluation_shrink_alike():
    trained, evaluated = plain_and_evaluated(smooth_images(96), 28, 32)
    assert (trained - evaluated).abs().max() < 0.02
    # Pixel noise averages out at a quarter of its resolution; point sampling would keep most of its contrast.
    trained, evaluated = plain_and_evaluated(noise_images(2, 128), 28, 32)
    assert trained.std() < 1.5 * evaluated.std()


@pytest.mark.parametrize("size,resize", [(27, 32), (28, 33), (223, 256)])
def test_zero_augmentation_is_half_a_pixel_off_at_most_for_odd_margins(size, resize):
    images = smooth_images(32)
    trained, evaluated = plain_and_evaluated(images, size, resize)
    assert (trained - evaluated).abs().max() < 0.05
    exact = F.interpolate(images / 255, size=(resize, resize), mode="bilinear")
    start = (resize - size) // 2
    halves = [exact[:, :, start + d:start + d + size, start + d:start + d + size] for d in (0, 1)]
    assert (trained - (halves[0] + halves[1]) / 2).abs().max() < 0.01


def fitted_maps(augment, count=150, side=32):
    """Recover each image's map (count, 2, 3) from output to input coordinates by sending coordinate ramps through."""
    ramp = (torch.arange(side) * 7).to(torch.uint8)
    image = torch.stack([ramp.expand(side, side), ramp[:, None].expand(side, side), torch.zeros(side, side)]).to(torch.uint8)
    out = to_unit(augment_images(image.expand(count, -1, -1, -1), side, side, augment, generator(1)))
    axis = (torch.arange(side) + 0.5) / side * 2 - 1
    grid = torch.stack([axis.expand(side, side), axis[:, None].expand(side, side), torch.ones(side, side)], -1).double()
    inner = slice(side // 3, side - side // 3)
    target = (2 * (out[:, :2, inner, inner].double() * 255 / 7 + 0.5) / side - 1).flatten(2).transpose(1, 2)
    design = grid[inner, inner].reshape(1, -1, 3).expand(count, -1, -1)
    solution = torch.linalg.lstsq(design, target).solution.transpose(1, 2)
    assert (design @ solution.transpose(1, 2) - target).abs().max() < 1e-3  # one affine map explains the image
    return solution


def spread(values, low, high):
    """Draws stay inside [low, high] and fill it; one column of draws per axis."""
    margin = 1e-3 + 1e-3 * (high - low)
    for draws in values.reshape(len(values), -1).T:
        assert draws.min() >= low - margin and draws.max() <= high + margin
        assert draws.min() < low + 0.1 * (high - low) and draws.max() > high - 0.1 * (high - low)


def rotation(turn):
    return torch.stack([torch.cos(turn), -torch.sin(turn), torch.sin(turn), torch.cos(turn)], dim=1).view(-1, 2, 2)


@pytest.mark.parametrize("changes,draws,rebuild,low,high", [
    ({"image_rotation_degrees": 20.0}, lambda m: torch.atan2(m[:, 1, 0], m[:, 0, 0]).rad2deg(), lambda v: rotation(v.deg2rad()), -20, 20),
    ({"image_scale": (0.8, 1.3)}, lambda m: 1 / m[:, [0, 1], [0, 1]], lambda v: torch.diag_embed(1 / v), 0.8, 1.3),
    ({"image_shear_degrees": 15.0}, lambda m: torch.atan(m[:, 0, 1]).rad2deg(),
     lambda v: torch.eye(2).double() + torch.tan(v.deg2rad())[:, None, None] * torch.tensor([[0.0, 1], [0, 0]]), -15, 15),
    ({"image_translate": 0.15}, lambda m: m[:, :, 2] / 2, lambda v: torch.cat([torch.eye(2).double().expand(len(v), 2, 2), 2 * v[..., None]], dim=2), -0.15, 0.15),
], ids=["rotation", "scale", "shear", "shift"])
def test_image_maps_stay_in_their_ranges_and_are_nothing_else(changes, draws, rebuild, low, high):
    maps = fitted_maps(only(**changes))
    values = draws(maps)
    spread(values, low, high)
    expected = rebuild(values)
    torch.testing.assert_close(maps[:, :, : expected.shape[2]], expected, rtol=0, atol=1e-3)
    assert expected.shape[2] == 3 or maps[:, :, 2].abs().max() < 1e-3
    if values.ndim == 2:
        assert abs(torch.corrcoef(values.T)[0, 1]) < 0.3  # the axes are drawn apart


def test_brightness_and_contrast_ranges_about_the_mean():
    grey = torch.full((200, 3, 4, 4), 102, dtype=torch.uint8)  # 0.4
    out = to_unit(augment_images(grey, 4, 4, only(image_brightness=0.2, image_contrast=0.9), generator()))
    assert out.flatten(1).std(dim=1).max() < 1e-5  # contrast turns about the mean: no effect on a flat image
    spread(out[:, 0, 0, 0] - 0.4, -0.2, 0.2)
    out = to_unit(augment_images(noise_images(50), 28, 28, only(image_brightness=1.0, image_contrast=1.0), generator()))
    assert out.min() > -1e-5 and out.max() < 1 + 1e-5
    images = (127 + noise_images(200, 6).int() // 16 - 8).to(torch.uint8)
    plain = to_unit(prepare_images(images, 6, 6)).flatten(1)
    out = to_unit(augment_images(images, 6, 6, only(image_contrast=0.4), generator())).flatten(1)
    assert torch.allclose(out.mean(1), plain.mean(1), atol=1e-4)
    spread(out.std(1) / plain.std(1), 0.6, 1.4)


def test_flip_mirrors_about_half_and_outside_the_image_the_edge_continues():
    images = noise_images(200, 9)
    plain, out = prepare_images(images, 9, 9), augment_images(images, 9, 9, only(image_flip=True), generator())
    kept, mirrored = ((out - expected).abs().flatten(1).amax(1) < 1e-4 for expected in (plain, plain.flip(3)))
    assert (kept ^ mirrored).all() and 70 < mirrored.sum() < 130
    white = torch.full((20, 3, 16, 16), 255, dtype=torch.uint8)
    strong = only(image_rotation_degrees=180.0, image_translate=0.5, image_scale=(0.4, 0.5), image_shear_degrees=30.0)
    assert torch.allclose(to_unit(augment_images(white, 16, 16, strong, generator())), torch.ones(1), atol=1e-4)


@pytest.mark.parametrize("count", [1, 20, 50])
def test_zero_augmentation_is_a_uniform_subset_without_replacement(count):
    points = cloud(4, 50)
    result = augment_points(points, count, only(), generator())
    chosen = (result[:, :, None] == points[:, None]).all(dim=3)  # (B, count, stored), exact equality
    assert (chosen.sum(dim=2) == 1).all() and (chosen.sum(dim=1) <= 1).all()
    assert count == 1 or not torch.equal(result[0], points[0, :count])
    chosen = augment_points(torch.arange(20.0)[None, :, None].expand(400, -1, 3), 5, only(), generator())[:, :, 0].long()
    counts, first = torch.bincount(chosen.flatten(), minlength=20), torch.bincount(chosen[:, 0], minlength=20)
    assert counts.sum() == 2000 and counts.min() > 60 and counts.max() < 140  # 100 expected, sigma 9
    assert first.min() > 3 and first.max() < 42  # 20 expected, sigma 4.4


def fitted_clouds(augment, count=200):
    """Recover each cloud's map: matrices (count, 3, 3) and shifts (count, 3), from the images of 0 and the axes."""
    probes = torch.cat([torch.zeros(1, 3), torch.eye(3)])
    images = [augment_points(p.expand(count, 1, 3), 1, augment, generator(3))[:, 0] for p in probes]
    return torch.stack([image - images[0] for image in images[1:]], dim=2), images[0]


def placed(rows, columns, values):
    """Unit matrices (N, 3, 3) with these entries replaced by values (N, ...)."""
    matrices = torch.eye(3).repeat(len(values), 1, 1)
    matrices[:, rows, columns] = values
    return matrices


@pytest.mark.parametrize("changes,draws,rebuild,low,high", [  # the turn is about the vertical axis, the shear leans with the height
    ({"point_rotation_degrees": 30.0}, lambda m, _: torch.atan2(m[:, 1, 0], m[:, 0, 0]).rad2deg(),
     lambda v: placed([[0, 0], [1, 1]], [[0, 1], [0, 1]], rotation(v.deg2rad())), -30, 30),
    ({"point_scale": (0.7, 1.4)}, lambda m, _: m.diagonal(dim1=1, dim2=2), torch.diag_embed, 0.7, 1.4),
    ({"point_shear": 0.3}, lambda m, _: m[:, :2, 2], lambda v: placed([0, 1], [2, 2], v), -0.3, 0.3),
    ({"point_translate": 0.25}, lambda _, shift: shift, lambda v: placed([0], [0], torch.ones(len(v), 1)), -0.25, 0.25),
], ids=["rotation", "scale", "shear", "shift"])
def test_point_maps_stay_in_their_ranges_and_are_nothing_else(changes, draws, rebuild, low, high):
    matrix, shift = fitted_clouds(only(**changes))
    values = draws(matrix, shift)
    spread(values, low, high)
    torch.testing.assert_close(matrix, rebuild(values), rtol=0, atol=1e-5)
    assert "point_translate" in changes or shift.abs().max() < 1e-6
    assert values.ndim == 1 or (torch.corrcoef(values.T) - torch.eye(values.shape[1])).abs().max() < 0.3  # the axes are drawn apart
    if "point_scale" in changes:  # as often larger by a factor as smaller
        assert abs(values.log().mean() - math.log(0.7 * 1.4) / 2) < 0.05


def test_point_tilt_leans_the_vertical_axis_both_ways_and_all_ranges_together_are_one_affine_map_without_mirroring():
    matrix, _ = fitted_clouds(only(point_tilt_degrees=20.0))
    torch.testing.assert_close(matrix @ matrix.transpose(1, 2), torch.eye(3).expand_as(matrix), rtol=0, atol=1e-5)
    assert 15 < torch.acos(matrix[:, 2, 2].clamp(-1, 1)).rad2deg().max() < 20 * math.sqrt(2) + 0.1
    spread(torch.atan2(matrix[:, 0, 2], matrix[:, 2, 2]).rad2deg(), -20, 20)
    spread(torch.asin(-matrix[:, 1, 2]).rad2deg(), -20, 20)
    augment = only(point_rotation_degrees=180.0, point_tilt_degrees=15.0, point_scale=(0.8, 1.25), point_shear=0.2, point_translate=0.1)
    matrix, shift = fitted_clouds(augment)
    assert (torch.linalg.det(matrix) > 0.8**3 - 1e-3).all() and (torch.linalg.det(matrix) < 1.25**3 + 1e-3).all()
    probe = torch.tensor([0.3, -2.0, 1.5])
    moved = augment_points(probe.expand(200, 1, 3), 1, augment, generator(3))[:, 0]
    assert torch.allclose(moved, matrix @ probe + shift, atol=1e-4)


def test_point_jitter_is_independent_noise_of_the_given_deviation():
    noise = augment_points(torch.zeros(20, 500, 3), 500, only(point_jitter=0.02), generator())
    assert noise.std().item() == pytest.approx(0.02, rel=0.03) and abs(noise.mean()) < 1e-3
    assert noise[0].std(dim=0).min() > 0.015 and (torch.corrcoef(noise.flatten(0, 1).T) - torch.eye(3)).abs().max() < 0.05


def test_elastic_fields_pass_through_normal_knots_of_the_given_deviation():
    field = elastic_field(2000, 9, 0.06, generator())  # 9 pixels: every second one is a knot
    knots = field[:, ::2, ::2]
    assert knots.std(dim=0) == pytest.approx(0.06 * torch.ones(5, 5, 2), rel=0.1) and abs(float(knots.mean())) < 1e-3
    assert abs(float((knots[:, 0, 0, 0] * knots[:, 4, 4, 0]).mean())) < 3e-4  # far knots move by themselves
    steps = (field[:, 1:] - field[:, :-1]).abs().mean(), (knots[:, 1:] - knots[:, :-1]).abs().mean()
    assert steps[0] < 0.7 * steps[1]  # smooth between them


def test_elastic_images_are_the_stored_ones_resampled_and_differ_from_each_other():
    images = smooth_images(64, count=1).expand(3, -1, -1, -1)
    still, bent = (augment_images(images, 48, 56, only(image_elastic=deviation), generator()) for deviation in (0.0, 0.1))
    assert torch.equal(still[0], still[1]) and not torch.allclose(bent[0], bent[1], atol=0.05)
    assert bent.amin() >= still.amin() - 0.05 and bent.amax() <= still.amax() + 0.05


def test_warps_follow_their_formula_and_have_the_given_deviation():
    points = torch.rand(400, 50, 3, generator=torch.Generator().manual_seed(3)) * 2 - 1
    moved = random_warp(400, 0.08, generator())(points)
    assert float(moved.std()) == pytest.approx(0.08, rel=0.05)
    near = random_warp(400, 0.08, generator())(points + 0.01)  # the same fields, a step aside
    assert float((moved - near).abs().mean()) < 0.1 * float(moved.abs().mean())
    numbers = generator()
    waves, phases, amplitudes = numbers.randn(400, 4, 3) * 3, numbers.rand(400, 1, 4) * 2 * math.pi, numbers.randn(400, 4, 3)
    slow = sum(0.08 * math.sqrt(2 / 4) * amplitudes[7, w] * torch.sin(waves[7, w] @ points[7, 5] + phases[7, 0, w]) for w in range(4))
    torch.testing.assert_close(moved[7, 5], slow, rtol=1e-4, atol=1e-6)
    warped = augment_points(points, 50, only(point_warp=0.08), generator())
    assert float((warped.sort(dim=1).values - points.sort(dim=1).values).abs().mean()) > 0.005
