"""One image -> an upright, opaque PIL image, grey or RGB."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from .file_types import CAMERA_RAW, extension_of

Entry = dict | np.ndarray | None  # of `datasets.Image(decode=False)`: {"bytes": ..., "path": ...}; or uint8 [H, W, 1|3]


class ImageError(ValueError):
    """An image cannot be used; the message says which, and why."""


class BadImage(ImageError):
    """An image cannot be decoded, at any setting."""


class WhiteLevels(NamedTuple):
    """The level that is white in grey images of more than 8 bits, and in grey images of floats; 0 is black."""

    integers: float = 65535
    floats: float = 1

    def of(self, image: Image.Image) -> float:
        return self.floats if image.mode == "F" else self.integers


def decode_image(entry: Entry, white_levels: WhiteLevels = WhiteLevels()) -> Image.Image:  # noqa: B008
    """Decode one image into a PIL image, upright, opaque, and of mode "L" (grey) or "RGB".

    Args:
        entry: what `datasets.Image(decode=False)` gives, `{"bytes": bytes or None, "path": str or None}`
            or None; or pixels, uint8 [H, W, 1 or 3].
        white_levels: grey images of more than 8 bits or of floats are scaled from 0..white to 8 bits, never clipped.

    Transparency is composited over white. Of an animation, the first frame is taken.

    Raises:
        BadImage: the entry is empty, truncated, not an image, or too large to be one (a decompression bomb).
        ImageError: its levels are outside 0..white.
    """
    image = load_image(entry)
    with _named_errors(_path_of(entry)):
        return eight_bits(image, white_levels.of(image)) if is_deep(image) else grey_or_rgb(image)


def load_image(entry: Entry) -> Image.Image:
    """Decode one image upright, in the mode of its file. Raises BadImage."""
    if isinstance(entry, np.ndarray):
        return Image.fromarray(entry if entry.shape[2] == 3 else entry[..., 0])
    content, path = (entry or {}).get("bytes"), _path_of(entry)
    if content is None and path is None:
        raise BadImage("the row holds no image")
    with _named_errors(path):
        if content is None and extension_of(path) in CAMERA_RAW:
            raise BadImage("a camera's raw file, of which only the thumbnail could be read: convert it first")
        with Image.open(path if content is None else BytesIO(content)) as image:
            image.load()
            if image.getexif().get(ExifTags.Base.Orientation) is not None:
                image = ImageOps.exif_transpose(image)
            return image


def _path_of(entry: Entry) -> str | None:
    return entry.get("path") if isinstance(entry, dict) else None


@contextmanager
def _named_errors(path: str | None) -> Iterator[None]:
    """Whatever goes wrong becomes a BadImage, or stays an ImageError, that names the file."""
    where = f"{path}: " if path else ""
    try:
        yield
    except MemoryError:
        raise  # says something about the machine, not about the file
    except ImageError as error:
        raise type(error)(f"{where}{error}") from None
    except UnidentifiedImageError:
        raise BadImage(f"{where}not an image in a format that Pillow reads") from None
    except Exception as error:  # Pillow's readers raise nearly any exception on a malformed file
        raise BadImage(f"{where}{type(error).__name__}: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def is_deep(image: Image.Image) -> bool:
    """Whether a grey image has more than 8 bits, or floats."""
    return image.mode in ("I", "F") or image.mode.startswith("I;16")


def grey_or_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of 8 bits: to "L" if it is grey (with or without alpha), else to "RGB"."""
    mode = "L" if image.mode in ("1", "L", "LA") else "RGB"
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(mode)


def eight_bits(image: Image.Image, white: float) -> Image.Image:
    """Scale a deep grey image from 0..white to "L"; Pillow would clip it. Raises BadImage, or ImageError."""
    levels = levels_of(image)
    check_levels(levels.min(), levels.max(), white)
    return Image.fromarray(np.rint(levels * 255 / white).astype(np.uint8))


def levels_of(image: Image.Image) -> np.ndarray:
    """The levels of a deep grey image, float64 [H, W]. Raises BadImage if some are no numbers."""
    levels = np.asarray(image, dtype=np.float64)
    if not np.isfinite(levels).all():
        raise BadImage("some of its levels are infinite or no numbers")
    return levels


def check_levels(lowest: float, highest: float, white: float) -> None:
    """Raise ImageError unless levels are in 0..white."""
    if lowest < 0:
        raise ImageError(f"grey levels {lowest:.6g}..{highest:.6g} are outside 0..{white:g}: --white_level N makes N "
                         "white, but black is always 0")  # fmt: skip
    if highest > white:
        raise ImageError(
            f"grey levels {lowest:.6g}..{highest:.6g} are outside 0..{white:g}: --white_level {math.ceil(highest)} "
            "would scale all images from that level"
        )
