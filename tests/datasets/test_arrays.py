"""Loading images and clouds into arrays: every kind of picture, any storage order, and refusal of broken files by name and row."""

import io
import zlib

import numpy as np
import pytest
from PIL import Image

from datasets.arrays import load_images, load_points
from datasets.images import read_image
from datasets.lists import SampleList
from utils.errors import UserError


def as_list(files, modality):
    return SampleList(files[0].parent / "list.txt", modality, tuple(f.name for f in files), tuple(files), tuple(f.stem for f in files))


def save(root, *arrays):
    """A list of files: pictures of uint8 arrays, clouds of all others."""
    pictures = arrays[0].dtype == np.uint8
    files = [root / f"{number}.{'png' if pictures else 'npy'}" for number in range(len(arrays))]
    for file, array in zip(files, arrays, strict=True):
        Image.fromarray(array).save(file) if pictures else np.save(file, array)
    return as_list(files, "RGBImg" if pictures else "PointCloud")


def test_small_square_images_keep_their_pixels(tmp_path):
    rng = np.random.default_rng(0)
    colour, gray = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8), rng.integers(0, 256, (6, 6), dtype=np.uint8)
    images = load_images(save(tmp_path, colour, gray), 8)
    assert images.dtype == np.uint8 and np.array_equal(images, [colour.transpose(2, 0, 1), np.stack([gray] * 3)])


def test_images_of_several_sizes_are_resized_and_cropped(tmp_path):
    flat = [np.full((*shape, 3), 90, dtype=np.uint8) for shape in ((12, 20), (20, 12), (12, 12), (3, 7), (8, 8))]
    images = load_images(save(tmp_path, *flat), 8)
    assert images.shape == (5, 3, 8, 8) and images.min() == images.max() == 90
    wide = np.zeros((8, 24, 3), dtype=np.uint8)
    wide[:, 8:16] = 255
    assert load_images(save(tmp_path, wide), 8)[0, :, :, 1:-1].min() == 255  # the middle
    with pytest.raises(UserError, match="at least 1"):
        load_images(save(tmp_path, wide), 0)


@pytest.mark.parametrize("shape", [(50, 50), (31, 47), (96, 6), (7, 112), (90, 40), (33, 500)])
def test_pictures_of_ordinary_shape_are_resized_as_a_whole(tmp_path, shape):
    picture, side = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)), 24
    size = [max(side, round(length * (side / min(shape)))) for length in picture.size]
    corner = [(length - side) // 2 for length in size]
    expected = picture.resize(size, Image.Resampling.BILINEAR).crop((*corner, corner[0] + side, corner[1] + side))
    np.testing.assert_array_equal(load_images(save(tmp_path, np.asarray(picture)), side)[0], np.asarray(expected).transpose(2, 0, 1))


@pytest.mark.parametrize("turned", [False, True])
def test_a_strip_takes_little_memory_and_gives_its_middle(tmp_path, monkeypatch, turned):
    strip, sizes, resize = np.zeros((2, 40_001, 3), np.uint8), [], Image.Image.resize
    strip[:, 20_000] = 255
    samples = save(tmp_path, strip.transpose(1, 0, 2) if turned else strip)
    monkeypatch.setattr(Image.Image, "resize", lambda image, size, *more: (sizes.append(size), resize(image, size, *more))[1])
    (picture,) = load_images(samples, 256)
    bright = picture[0].max(axis=1 if turned else 0)
    assert max(sizes[0]) <= 20 * 256 and bright.argmax() in (127, 128) and bright[0] <= 1 and bright[126] == bright[129]


INK = np.zeros((16, 16, 4), np.uint8)  # a red drawing on transparent ground whose hidden colour is black
INK[4:12, 4:12] = (255, 0, 0, 255)
SCENE = np.zeros((16, 32, 3), np.uint8)  # wide, its upper half white
SCENE[:8] = 255


def encode(image, suffix="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, suffix, **options)
    return stream.getvalue()


def decode(data):
    return np.asarray(read_image(io.BytesIO(data))).astype(int)


PALETTE = Image.fromarray(INK[..., :3]).quantize(4)
CLEAR = PALETTE.getpixel((0, 0))


@pytest.mark.parametrize("data", [
    encode(Image.fromarray(INK)), encode(Image.fromarray(INK), "WEBP", lossless=True), encode(Image.fromarray(INK[..., :3]), transparency=(0, 0, 0)),
    encode(PALETTE, transparency=CLEAR), encode(PALETTE, "GIF", transparency=CLEAR),
    encode(PALETTE, transparency=bytes(0 if number == CLEAR else 255 for number in range(4))),
], ids=["RGBA", "webp", "colour key", "palette", "gif", "palette alpha"])
def test_transparent_pictures_stand_on_white(data):
    image = decode(data)
    assert (image[0, 0] == 255).all() and np.abs(image[8, 8] - [255, 0, 0]).max() <= 1


def test_gray_drawings_half_transparency_and_white_on_transparent():
    faint = np.stack([np.zeros((8, 8)), np.full((8, 8), 51)], axis=2).astype(np.uint8)  # black at a fifth
    assert (decode(encode(Image.fromarray(faint))) == 204).all()
    assert (decode(encode(Image.new("LA", (8, 8), (0, 0)))) == 255).all()  # nothing drawn
    with pytest.raises(UserError, match="as white as the ground"):
        decode(encode(Image.fromarray(np.where(INK[..., 3:] > 0, np.uint8(255), INK))))


TURNS = ["ROTATE_0", "FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_90", "TRANSVERSE", "ROTATE_270"]
BAD_EXIF = [b"Exif\0\0XX", b"Exif\0\0MM\x00*\xff\xff\xff\xff rubbish", b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\xff\xff\xff\x7f\0\0"]
FRAMES = {"save_all": True, "append_images": [Image.new("RGB", (32, 16))]}


def turned(orientation):
    """The scene as a camera stores it, and its EXIF."""
    image, exif = Image.fromarray(SCENE), Image.Exif()
    exif[274] = orientation
    return image if orientation == 1 else image.transpose(Image.Transpose[TURNS[orientation - 1]]), exif


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("data", [
    *(encode(image, suffix, exif=exif) for suffix in ("JPEG", "PNG", "WEBP", "TIFF") for image, exif in map(turned, range(1, 9))),
    *(encode(Image.fromarray(SCENE), "JPEG", exif=exif) for exif in BAD_EXIF),  # damaged: no reason to refuse
    *(encode(Image.fromarray(SCENE).convert(mode), suffix) for mode, suffix in
      (("1", "PNG"), ("L", "PNG"), ("P", "BMP"), ("CMYK", "JPEG"), ("YCbCr", "TIFF"))),
    encode(Image.fromarray(SCENE), "JPEG", progressive=True),
    *(encode(Image.fromarray(SCENE), suffix, **FRAMES) for suffix in ("GIF", "PNG", "WEBP", "TIFF")),  # the first frame
])
def test_every_orientation_mode_and_animation_shows_the_scene_upright(data):
    assert np.abs(decode(data) - SCENE).mean() < 3


def noise_bytes(suffix, **options):
    return encode(Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)), suffix, **options)


PIXEL = encode(Image.new("L", (1, 1)), "BMP")
HUGE = PIXEL[:18] + (60_000).to_bytes(4, "little") * 2 + PIXEL[26:]  # its header says 60,000 x 60,000


@pytest.mark.parametrize("content,words", [
    *[(data[: len(data) // 2], "") for data in (*map(noise_bytes, ("PNG", "JPEG", "GIF", "WEBP")), noise_bytes("JPEG", progressive=True))],
    (b"no image", "cannot identify"), (b"", "cannot identify"), (HUGE, "exceeds limit"),
    (encode(Image.fromarray(np.zeros((8, 8), np.uint16))), "pixel mode I;16.*scale it"),
    (encode(Image.fromarray(np.zeros((8, 8), np.float32)), "TIFF"), "pixel mode F"),
    (noise_bytes("PNG").replace(b"IEND", b"iCCP" + zlib.crc32(b"iCCP").to_bytes(4, "big") + bytes(4) + b"IEND"), "index out of range"),
])
def test_broken_images_are_named(tmp_path, content, words):
    images = save(tmp_path, *np.zeros((2, 64, 64, 3), np.uint8))
    images.files[1].write_bytes(content)
    with pytest.raises(UserError, match=rf"list.txt, row 2: .*1\.png is not a readable 8-bit image: .*{words}"):
        load_images(images, 64)


def by_rows(points):
    return points[np.lexsort(points.T)]


def unit(points):
    centred = points - points.mean(0)
    return centred / np.sqrt((centred**2).sum(1).max())


def test_clouds_fill_the_unit_sphere_short_ones_repeat_and_long_ones_are_sampled(tmp_path):
    long, short = np.random.default_rng(0).normal(3, 5, (10, 3)), np.arange(9.0).reshape(3, 3)
    points = load_points(save(tmp_path, long, short, np.ones((4, 3))), max_points=7)
    np.testing.assert_array_equal(points[1], points[1, [0, 1, 2, 0, 1, 2, 0]])
    np.testing.assert_allclose(by_rows(points[1, :3]), unit(short), atol=1e-6)
    distances = np.linalg.norm(points[0][:, None] - unit(long), axis=2)
    assert points.shape == (3, 7, 3) and points.dtype == np.float32 and not points[2].any()
    assert distances.min(1).max() < 1e-6 and len(set(distances.argmin(1))) == 7  # without replacement


@pytest.mark.parametrize("most", [5, 2048])
def test_the_order_of_storage_means_nothing(tmp_path, most):
    rng = np.random.default_rng(0)
    cloud = rng.normal(size=(300, 3)).round(1)  # many equal coordinates
    cloud[0, 0] = -0.0
    orders = [np.arange(300), cloud[:, 2].argsort(), rng.permutation(300)]
    assert len({load_points(save(tmp_path, cloud[order]), most).tobytes() for order in orders}) == 1


def test_a_beginning_of_a_cloud_is_a_random_part_that_depends_on_the_object_not_on_the_row(tmp_path):
    height = np.linspace(0, 1, 1000)
    points = load_points(save(tmp_path, np.stack([height * 0, height * 0, height], axis=1)))[0, :, 2]  # -1 to 1
    assert abs(points[:200].mean()) < 0.12 and np.abs(np.diff(points[:200])).mean() > 0.4
    samples = save(tmp_path, *np.random.default_rng(0).normal(size=(3, 20, 3)))
    points = load_points(samples, 5)
    np.testing.assert_array_equal(points, load_points(as_list(samples.files[::-1], "PointCloud"), 5)[::-1])
    same = load_points(save(tmp_path, *[np.arange(60.0).reshape(20, 3)] * 2), 5)
    assert (same[0] != same[1]).any()


@pytest.mark.parametrize("bad", [
    np.array([[0, 0, np.nan]]), np.array([[0, np.inf, 0]]), np.zeros((0, 3)), np.zeros((5, 4)), np.zeros(3), np.zeros((2, 5, 3)),
    np.array([["a", "b", "c"]]), np.zeros((5, 3), dtype=complex), np.full((4, 3), 1e300), np.array([[{}, 1, 2]], dtype=object),
    b"", b"\x93NUMPY", b"text", "archive",
], ids=str)
def test_bad_clouds_are_named(tmp_path, bad):
    samples, words = save(tmp_path, np.zeros((5, 3)), np.zeros((5, 3))), ""
    if isinstance(bad, np.ndarray):
        np.save(samples.files[1], bad)
    elif bad == "archive":
        with open(samples.files[1], "wb") as stream:
            np.savez(stream, a=np.zeros((5, 3)))
        words = ".*archive"
    else:
        samples.files[1].write_bytes(bad)
        words = " is not a readable .npy array"
    with pytest.raises(UserError, match=rf"list.txt, row 2: .*1\.npy{words}"):
        load_points(samples)
