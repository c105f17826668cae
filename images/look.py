"""A look at a sample of the images, before anything is decided: are they grey, how large, how bright?"""

import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from .decoding import Entry, WhiteLevels, grey_or_rgb, is_deep, levels_of, load_image

SAMPLE_SIZE = 100
DEPTHS = (8, 10, 12, 14)  # bits of sensors whose pictures are kept in files of 16
DARK = 32  # of 255; pictures all below it were likely of 12 bits, of which Pillow kept the upper 8 of 16


@dataclass
class Seen:
    """One image: `kind` is "bytes" (8 bits a channel), "integers" or "floats"."""

    index: int
    mode: str
    size: tuple[int, int]
    kind: str
    lowest: float
    highest: float


class Look:
    """What up to 100 images, spread over the data set, show; bad ones are passed over.

    Attributes:
        seen: a `Seen` for each good image.
        sizes: {(width, height): how many}.
        is_complete: whether every image of the data set was looked at.
    """

    def __init__(self, images: Sequence):
        indices = range(0, len(images), max(1, -(-len(images) // SAMPLE_SIZE)))
        with ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as pool:
            seen = pool.map(lambda i: _see(i, images[i]), indices)
            self.seen = [image for image in seen if image is not None]
        self.sizes = Counter(image.size for image in self.seen)
        self.is_complete = len(indices) == len(images)

    def common_mode(self) -> str:
        """ "L" if all images are grey, else "RGB"."""
        return "L" if self.seen and all(image.mode == "L" for image in self.seen) else "RGB"

    def brightest(self, kind: str) -> float | None:
        """The highest level of a kind; None if there is no such image."""
        return max((image.highest for image in self.seen if image.kind == kind), default=None)

    def white_levels(self, white_level: float | None) -> WhiteLevels:
        """One range for all the images of a data set. `white_level` is the user's own."""
        if white_level is not None:
            return WhiteLevels(white_level, white_level)
        floats = self.brightest("floats")
        return WhiteLevels(floats=255 if floats is not None and floats > 1 else 1)

    def outside(self, white: WhiteLevels) -> list[int]:
        """Indices of the deep images whose levels are outside the range."""
        deep = [image for image in self.seen if image.kind != "bytes"]
        return [image.index for image in deep if image.lowest < 0 or image.highest > getattr(white, image.kind)]

    def notes_on_levels(self, white_level: float | None) -> list[str]:
        """What is unusual about the levels, and which flag changes how they are taken."""
        integers, floats, eight_bits = map(self.brightest, ("integers", "floats", "bytes"))
        among = f"in {len(self.seen)} images"
        if white_level is not None:
            is_used = integers is not None or floats is not None
            return [] if is_used else [f"--white_level {white_level:g} has no effect: {among} all are of 8 bits"]
        notes = []
        if floats is not None:
            white = 255 if floats > 1 else 1
            notes.append(f"grey levels are floats, up to {floats:g} {among}: {white} is white (else: --white_level)")
        bits = next((bits for bits in DEPTHS if integers and integers < 2**bits), None)
        if bits is not None:
            notes.append(
                f"grey levels of 16 bits reach {integers:g} only, {among}, and 65535 is white: "
                f"--white_level {2**bits - 1} makes it the level that {bits} bits have"
            )
        if eight_bits is not None and eight_bits < DARK and len(self.seen) > 0:
            notes.append(
                f"the images are almost black: no level above {eight_bits:g} of 255, {among}. If they are colour "
                "images of 12 bits in files of 16, convert them to 8 bits (--white_level is for grey ones)"
            )
        return notes


def _see(index: int, entry: Entry) -> Seen | None:
    try:
        image = load_image(entry)
        if is_deep(image):
            levels, kind, mode = levels_of(image), "floats" if image.mode == "F" else "integers", "L"
        else:
            image = grey_or_rgb(image)
            levels, kind, mode = np.asarray(image), "bytes", image.mode
    except Exception:  # a bad image, which `decode_image` will name when it is used
        return None
    return Seen(index, mode, image.size, kind, float(levels.min()), float(levels.max()))


def describe_size(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def range_of_sizes(sizes: Counter) -> str:
    """ "8x8 to 64x64", or "8x8"."""
    if not sizes:
        return "of unknown size"
    ordered = sorted(sizes, key=lambda size: (size[0] * size[1], size))
    return " to ".join(dict.fromkeys(describe_size(size) for size in (ordered[0], ordered[-1])))


def note_on_sizes(sizes: Counter, resolution: int, is_complete: bool) -> str | None:
    """How images that differ in size are treated; None if they do not."""
    if len(sizes) < 2:
        return None
    common = ", ".join(f"{count:,} of {describe_size(size)}" for size, count in sizes.most_common(5))
    more = f", and {len(sizes) - 5:,} more sizes" if len(sizes) > 5 else ""
    among = f"of {sizes.total():,} images" if is_complete else f"of a sample of {sizes.total()}"
    return (
        f"images differ in size ({among}: {common}{more}): all are resized and cropped to {resolution}x{resolution}, "
        "the size of the first; --resolution chooses another"
    )
