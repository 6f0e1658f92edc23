"""Decodes pictures as users have them: of any 8-bit mode, transparent, turned by EXIF, animated. Training and preparation share it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from PIL import Image, ImageOps

from utils.errors import UserError

# Below transparent pixels: most drawings without a ground are dark ink, and our own renderings stand on white.
GROUND = (255, 255, 255)


def read_image(source: str | Path | BinaryIO) -> Image.Image:
    """Decode a file or binary stream: the first frame, upright as its EXIF orientation says, on white where it is transparent.

    Returns:
        An image of mode RGB.
    Raises:
        UserError: with the reason alone: it cannot be read to its end, has more than 8 bits, or is all white after blending.
    """
    with _opened(source) as image:
        if image.mode[0] in "IF":
            raise UserError(f"pixel mode {image.mode} has more than 8 bits; scale it to 0..255 as it should be seen")
        image.load()
        return _on_ground(_upright(image))


def image_size(source: str | Path | BinaryIO) -> tuple[int, int]:
    """Return width and height before any turn by EXIF, from the header alone; errors as `read_image`."""
    with _opened(source) as image:
        return image.size


@contextmanager
def _opened(source: str | Path | BinaryIO) -> Iterator[Image.Image]:
    try:
        with Image.open(source) as image:
            yield image
    except UserError:
        raise
    except Exception as error:  # libraries raise anything on a damaged file
        raise UserError(str(error) or repr(error)) from error


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:
        return image


def _on_ground(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    blended = Image.alpha_composite(Image.new("RGBA", image.size, (*GROUND, 255)), image).convert("RGB")
    least, most = image.getchannel("A").getextrema()
    if least < most and blended.getcolors(1) is not None:
        raise UserError("its drawing is as white as the ground put below transparent pixels; give it an opaque ground")
    return blended
