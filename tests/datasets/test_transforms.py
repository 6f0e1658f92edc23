"""datasets/transforms.py: randomness by generator alone, ranges recovered from the output, and identity settings."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from datasets.mesh_faces import augment_faces
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

NONE = dict(
    image_rotation_degrees=0.0, image_scale=(1.0, 1.0), image_translate=0.0, image_shear_degrees=0.0,
    image_elastic=0.0, image_brightness=0.0, image_contrast=0.0, image_flip=False, point_rotation_degrees=0.0, point_tilt_degrees=0.0,
    point_scale=(1.0, 1.0), point_shear=0.0, point_translate=0.0, point_jitter=0.0, point_warp=0.0,
)
MEAN, STD = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))


def only(**changes):
    assert changes.keys() <= NONE.keys()
    return SimpleNamespace(**{**NONE, **changes})


def generator(seed=0):
    return BatchGenerator(torch.Generator().manual_seed(seed))


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


# Images


@pytest.mark.parametrize("stored,size,resize", [(28, 28, 28), (28, 24, 32), (30, 32, 32), (30, 31, 36), (64, 24, 32), (8, 224, 256)])
@pytest.mark.parametrize("count", [1, 3])
def test_image_shapes_types_and_finiteness(stored, size, resize, count):
    images = noise_images(count, stored)
    for result in (prepare_images(images, size, resize), augment_images(images, size, resize, AugmentConfig(), generator())):
        assert result.shape == (count, 3, size, size) and result.dtype == torch.float32 and result.isfinite().all()


def test_prepare_images_equals_loops_without_resizing():
    images = noise_images(2, 10)
    result = prepare_images(images, 6, 10)
    for b, c, y, x in ((0, 0, 0, 0), (1, 2, 5, 3), (0, 1, 2, 5), (1, 0, 5, 5)):
        pixel = int(images[b, c, y + 2, x + 2]) / 255
        assert float(result[b, c, y, x]) == pytest.approx((pixel - IMAGENET_MEAN[c]) / IMAGENET_STD[c], abs=1e-5)


@pytest.mark.parametrize("kind", ["images", "points", "faces"])
def test_the_generator_is_the_only_randomness(kind):
    pictures, clouds, meshes = noise_images(4), cloud(4), torch.cat([cloud(4, 40)] * 6, dim=2)

    def view(source):
        if kind == "images":
            return augment_images(pictures, 24, 28, AugmentConfig(image_flip=True), source)
        if kind == "faces":
            return augment_faces(meshes, AugmentConfig(), source)
        return augment_points(clouds, 30, AugmentConfig(), source)

    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = view(BatchGenerator(generator_for(0, "train", 1)))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert torch.equal(view(BatchGenerator(generator_for(0, "train", 1))), first)
    for other in (generator_for(0, "train", 2), generator_for(1, "train", 1)):
        assert all(not torch.allclose(a, b, atol=1e-3) for a, b in zip(view(BatchGenerator(other)), first))
    source = BatchGenerator(generator_for(0, "train", 1))
    view(source)
    assert not torch.allclose(view(source), first, atol=1e-3)  # the next batch gets other draws
    assert torch.equal(pictures, noise_images(4)) and torch.equal(clouds, cloud(4)) and torch.equal(meshes[..., :3], cloud(4, 40))


@pytest.mark.parametrize("augment", [
    lambda rows, source: augment_images(noise_images(6)[rows], 24, 28, AugmentConfig(image_flip=True), source),
    lambda rows, source: augment_points(cloud(6)[rows], 30, AugmentConfig(), source),
    lambda rows, source: augment_faces(torch.cat([cloud(6, 40)] * 6, dim=2)[rows], AugmentConfig(), source),
], ids=["images", "points", "faces"])
def test_shares_of_a_batch_join_to_the_whole_batch(augment):
    seeded = lambda: torch.Generator().manual_seed(3)
    whole = augment(slice(0, 6), BatchGenerator(seeded()))
    parts = [augment(rows, BatchGenerator(seeded(), rows, 6)) for rows in (slice(0, 2), slice(2, 6))]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=1e-6)


def test_every_sample_gets_its_own_transform():
    same = noise_images(1).expand(5, -1, -1, -1)
    views = augment_images(same, 28, 28, AugmentConfig(), generator())
    clouds = augment_points(cloud(1).expand(5, -1, -1), 50, AugmentConfig(), generator())
    for rows in (views.flatten(1), clouds.flatten(1)):
        distances = torch.cdist(rows, rows) + torch.eye(5) * 1e9
        assert distances.min() > 0.1


@pytest.mark.parametrize("stored,size,resize", [(28, 28, 28), (28, 24, 28), (28, 24, 32), (30, 32, 32), (16, 56, 64), (10, 16, 40)])
def test_zero_augmentation_equals_evaluation(stored, size, resize):
    images = noise_images(3, stored)
    result = augment_images(images, size, resize, only(), generator())
    assert torch.allclose(result, prepare_images(images, size, resize), atol=2e-4)


@pytest.mark.parametrize("size,resize", [(27, 32), (28, 33), (223, 256)])
def test_zero_augmentation_is_half_a_pixel_off_at_most_for_odd_margins(size, resize):
    images = smooth_images(32)
    trained, evaluated = augment_images(images, size, resize, only(), generator()), prepare_images(images, size, resize)
    assert (to_unit(trained) - to_unit(evaluated)).abs().max() < 0.05
    exact = F.interpolate(images / 255, size=(resize, resize), mode="bilinear")
    start = (resize - size) // 2
    halves = [exact[:, :, start + d:start + d + size, start + d:start + d + size] for d in (0, 1)]
    assert (to_unit(trained) - (halves[0] + halves[1]) / 2).abs().max() < 0.01


def test_zero_augmentation_equals_evaluation_when_shrinking_smooth_images():
    images = smooth_images(96)
    trained, evaluated = augment_images(images, 28, 32, only(), generator()), prepare_images(images, 28, 32)
    assert (to_unit(trained) - to_unit(evaluated)).abs().max() < 0.02


def test_shrinking_does_not_alias_in_training_only():
    # Pixel noise averages out at a quarter of its resolution; point sampling would keep most of its contrast.
    images = noise_images(2, 128)
    trained, evaluated = augment_images(images, 28, 32, only(), generator()), prepare_images(images, 28, 32)
    assert to_unit(trained).std() < 1.5 * to_unit(evaluated).std()


def fitted_maps(augment, count=150, side=32, zoom=1.0):
    """Recover each image's map (count, 2, 3) from output to input coordinates by sending coordinate ramps through."""
    ramp = (torch.arange(side) * 7).to(torch.uint8)
    image = torch.stack([ramp.expand(side, side), ramp[:, None].expand(side, side), torch.zeros(side, side)]).to(torch.uint8)
    size = int(side * zoom)
    out = to_unit(augment_images(image.expand(count, -1, -1, -1), size, side, augment, generator(1)))
    axis = (torch.arange(size) + 0.5) / size * 2 - 1
    grid = torch.stack([axis.expand(size, size), axis[:, None].expand(size, size), torch.ones(size, size)], -1).double()
    inner = slice(size // 3, size - size // 3)
    target = (2 * (out[:, :2, inner, inner].double() * 255 / 7 + 0.5) / side - 1).flatten(2).transpose(1, 2)
    design = grid[inner, inner].reshape(1, -1, 3).expand(count, -1, -1)
    solution = torch.linalg.lstsq(design, target).solution.transpose(1, 2)
    assert (design @ solution.transpose(1, 2) - target).abs().max() < 1e-3  # one affine map explains the image
    return solution


def spread(values, low, high):
    """Draws stay inside [low, high] and fill it."""
    margin = 1e-3 + 1e-3 * (high - low)
    assert values.min() >= low - margin and values.max() <= high + margin
    assert values.min() < low + 0.1 * (high - low) and values.max() > high - 0.1 * (high - low)


def test_image_rotation_range():
    maps = fitted_maps(only(image_rotation_degrees=20.0))
    linear = maps[:, :, :2]
    assert torch.allclose(linear @ linear.transpose(1, 2), torch.eye(2).double(), atol=1e-3)
    assert (torch.linalg.det(linear) > 0).all() and maps[:, :, 2].abs().max() < 1e-3
    spread(torch.atan2(linear[:, 1, 0], linear[:, 0, 0]).rad2deg(), -20, 20)


def test_image_scale_range_per_axis():
    maps = fitted_maps(only(image_scale=(0.8, 1.3)))
    factors = 1 / maps[:, [0, 1], [0, 1]]
    assert maps[:, [0, 1], [1, 0]].abs().max() < 1e-3 and maps[:, :, 2].abs().max() < 1e-3
    spread(factors[:, 0], 0.8, 1.3)
    spread(factors[:, 1], 0.8, 1.3)
    assert abs(torch.corrcoef(factors.T)[0, 1]) < 0.3


def test_image_shear_range():
    maps = fitted_maps(only(image_shear_degrees=15.0))
    expected = torch.eye(2, 3).double().repeat(len(maps), 1, 1)
    expected[:, 0, 1] = maps[:, 0, 1]
    assert torch.allclose(maps, expected, atol=1e-3)
    spread(torch.atan(maps[:, 0, 1]).rad2deg(), -15, 15)


def test_image_shift_range_is_a_fraction_of_the_side():
    maps = fitted_maps(only(image_translate=0.15))
    assert torch.allclose(maps[:, :, :2], torch.eye(2).double().expand(len(maps), 2, 2), atol=1e-3)
    spread(maps[:, 0, 2] / 2, -0.15, 0.15)
    spread(maps[:, 1, 2] / 2, -0.15, 0.15)


@pytest.mark.parametrize("zoom", [0.5, 0.75, 1.0])
def test_image_crop_is_central(zoom):
    expected = torch.tensor([[zoom, 0, 0], [0, zoom, 0]]).double()
    assert torch.allclose(fitted_maps(only(), 1, zoom=zoom)[0], expected, atol=1e-3)


def test_brightness_range_and_clamp():
    grey = torch.full((200, 3, 4, 4), 102, dtype=torch.uint8)  # 0.4
    out = to_unit(augment_images(grey, 4, 4, only(image_brightness=0.2, image_contrast=0.9), generator()))
    assert out.flatten(1).std(dim=1).max() < 1e-5  # contrast turns about the mean: no effect on a flat image
    spread(out[:, 0, 0, 0] - 0.4, -0.2, 0.2)
    out = to_unit(augment_images(noise_images(50), 28, 28, only(image_brightness=1.0, image_contrast=1.0), generator()))
    assert out.min() > -1e-5 and out.max() < 1 + 1e-5


def test_contrast_range_keeps_the_mean():
    images = (127 + noise_images(200, 6).int() // 16 - 8).to(torch.uint8)
    plain = to_unit(prepare_images(images, 6, 6)).flatten(1)
    out = to_unit(augment_images(images, 6, 6, only(image_contrast=0.4), generator())).flatten(1)
    assert torch.allclose(out.mean(1), plain.mean(1), atol=1e-4)
    spread(out.std(1) / plain.std(1), 0.6, 1.4)


def test_flip_mirrors_about_half_and_only_if_asked():
    images = noise_images(200, 9)
    plain = prepare_images(images, 9, 9)
    out = augment_images(images, 9, 9, only(image_flip=True), generator())
    kept = ((out - plain).abs().flatten(1).amax(1) < 1e-4)
    mirrored = ((out - plain.flip(3)).abs().flatten(1).amax(1) < 1e-4)
    assert (kept ^ mirrored).all() and 70 < mirrored.sum() < 130


def test_outside_the_image_the_edge_continues():
    white = torch.full((20, 3, 16, 16), 255, dtype=torch.uint8)
    strong = only(image_rotation_degrees=180.0, image_translate=0.5, image_scale=(0.4, 0.5), image_shear_degrees=30.0)
    assert torch.allclose(to_unit(augment_images(white, 16, 16, strong, generator())), torch.ones(1), atol=1e-4)


# Point clouds


def test_evaluation_keeps_its_input_and_looks_at_one_sample_at_a_time():
    images, points = noise_images(), cloud()
    result = prepare_images(images, 24, 32)
    assert torch.equal(images, noise_images()) and torch.allclose(prepare_images(images[1:2], 24, 32)[0], result[1], atol=1e-6)
    assert torch.equal(prepare_points(points, 20), points[:, :20])
    assert torch.equal(prepare_points(points, 50), points)


@pytest.mark.parametrize("count", [1, 20, 50])
def test_zero_augmentation_is_a_subset_without_replacement(count):
    points = cloud(4, 50)
    result = augment_points(points, count, only(), generator())
    chosen = (result[:, :, None] == points[:, None]).all(dim=3)  # (B, count, stored), exact equality
    assert (chosen.sum(dim=2) == 1).all() and (chosen.sum(dim=1) <= 1).all()
    if count > 1:
        assert len({tuple(row.nonzero()[:, 0].tolist()) for row in chosen.any(dim=1)}) > 1 or count == 50
        assert not torch.equal(result[0], points[0, :count])


def test_subsets_are_uniform():
    source = generator()
    points = torch.arange(20.0)[None, :, None].expand(400, -1, 3)
    chosen = augment_points(points, 5, only(), source)[:, :, 0].long()
    counts, first = torch.bincount(chosen.flatten(), minlength=20), torch.bincount(chosen[:, 0], minlength=20)
    assert counts.sum() == 2000 and counts.min() > 60 and counts.max() < 140  # 100 expected, sigma 9
    assert first.min() > 3 and first.max() < 42  # 20 expected, sigma 4.4


def fitted_clouds(augment, count=200):
    """Recover each cloud's map: matrices (count, 3, 3) and shifts (count, 3), from the images of 0 and the axes."""
    probes = torch.cat([torch.zeros(1, 3), torch.eye(3)])
    images = [augment_points(p.expand(count, 1, 3), 1, augment, generator(3))[:, 0] for p in probes]
    return torch.stack([image - images[0] for image in images[1:]], dim=2), images[0]


def test_point_turn_is_about_the_vertical_axis():
    matrix, shift = fitted_clouds(only(point_rotation_degrees=30.0))
    assert torch.allclose(matrix @ matrix.transpose(1, 2), torch.eye(3), atol=1e-5) and not shift.any()
    up = torch.tensor([0.0, 0.0, 1.0])
    assert torch.allclose(matrix[:, :, 2], up, atol=1e-6) and torch.allclose(matrix[:, 2], up, atol=1e-6)
    spread(torch.atan2(matrix[:, 1, 0], matrix[:, 0, 0]).rad2deg(), -30, 30)


def test_point_tilt_leans_the_vertical_axis_both_ways():
    matrix, _ = fitted_clouds(only(point_tilt_degrees=20.0))
    assert torch.allclose(matrix @ matrix.transpose(1, 2), torch.eye(3), atol=1e-5)
    assert torch.allclose(torch.linalg.det(matrix), torch.ones(1), atol=1e-5)
    lean = torch.acos(matrix[:, 2, 2].clamp(-1, 1)).rad2deg()
    assert 15 < lean.max() < 20 * math.sqrt(2) + 0.1
    about_y = torch.atan2(matrix[:, 0, 2], matrix[:, 2, 2]).rad2deg()
    spread(about_y, -20, 20)
    spread(torch.asin(-matrix[:, 1, 2]).rad2deg(), -20, 20)


def test_point_scale_range_per_axis():
    matrix, shift = fitted_clouds(only(point_scale=(0.7, 1.4)))
    factors = matrix.diagonal(dim1=1, dim2=2)
    assert torch.allclose(matrix, torch.diag_embed(factors), atol=1e-6) and not shift.any()
    for axis in range(3):
        spread(factors[:, axis], 0.7, 1.4)
    assert (torch.corrcoef(factors.T) - torch.eye(3)).abs().max() < 0.3
    assert abs(factors.log().mean() - math.log(0.7 * 1.4) / 2) < 0.05  # as often larger by a factor as smaller


def test_point_shear_leans_with_the_height():
    matrix, _ = fitted_clouds(only(point_shear=0.3))
    expected = torch.eye(3).repeat(len(matrix), 1, 1)
    expected[:, :2, 2] = matrix[:, :2, 2]
    assert torch.allclose(matrix, expected, atol=1e-6)
    spread(matrix[:, 0, 2], -0.3, 0.3)
    spread(matrix[:, 1, 2], -0.3, 0.3)


def test_point_shift_range():
    matrix, shift = fitted_clouds(only(point_translate=0.25))
    assert torch.allclose(matrix, torch.eye(3).expand_as(matrix), atol=1e-6)
    for axis in range(3):
        spread(shift[:, axis], -0.25, 0.25)
    moved = augment_points(cloud(), 50, only(point_translate=0.25), generator()).mean(1) - cloud().mean(1)
    assert (moved.abs() <= 0.25 + 1e-5).all() and moved.abs().max() > 0.01  # one shift per cloud, not per point


def test_point_jitter_is_independent_noise_of_the_given_deviation():
    noise = augment_points(torch.zeros(20, 500, 3), 500, only(point_jitter=0.02), generator())
    assert noise.std().item() == pytest.approx(0.02, rel=0.03) and abs(noise.mean()) < 1e-3
    assert noise[0].std(dim=0).min() > 0.015 and (torch.corrcoef(noise.flatten(0, 1).T) - torch.eye(3)).abs().max() < 0.05


def test_all_ranges_together_are_one_affine_map_per_cloud_without_mirroring():
    augment = only(point_rotation_degrees=180.0, point_tilt_degrees=15.0, point_scale=(0.8, 1.25), point_shear=0.2,
                   point_translate=0.1)
    matrix, shift = fitted_clouds(augment)
    assert (torch.linalg.det(matrix) > 0.8**3 - 1e-3).all() and (torch.linalg.det(matrix) < 1.25**3 + 1e-3).all()
    probe = torch.tensor([0.3, -2.0, 1.5])
    moved = augment_points(probe.expand(200, 1, 3), 1, augment, generator(3))[:, 0]
    assert torch.allclose(moved, matrix @ probe + shift, atol=1e-4)


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
