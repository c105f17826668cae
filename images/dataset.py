"""Images as a map-style dataset of square uint8 tensors, of one mode, size and range for all."""

import copy
import itertools
import logging
import os
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from progress import progress_bar

from .decoding import BadImage, Entry, ImageError, WhiteLevels, decode_image
from .look import note_on_sizes, range_of_sizes
from .sources import Source

logger = logging.getLogger(__name__)

ROWS_PER_TASK = 64  # images a thread decodes before it reports: a smooth bar at little overhead
FINGERPRINTED = 64  # images that a fingerprint looks at
MAX_CLASSES_NAMED = 10


def _bad_images_summary(name: str, bad: dict[int, Any]) -> str:
    """Name the first ten of the bad images. `bad` maps an index to the reason why that image is bad."""
    indices = sorted(bad)
    first_indices = ", ".join(map(str, indices[:10])) + (", ..." if len(indices) > 10 else "")
    return f"{name}: cannot decode {len(bad)} image(s), index {first_indices}; the first: {bad[indices[0]]}"


def bad_images_error(name: str, bad: dict[int, Any], num_images: int) -> BadImage:
    """The error to raise for images that cannot be decoded: index -> reason, of a data set of `num_images`."""
    hint = " (--on_bad_image skip leaves such images out)" if len(bad) < num_images else " (no image is left)"
    return BadImage(_bad_images_summary(name, bad) + hint)


class ImageDataset(torch.utils.data.Dataset):
    """Map-style dataset of uint8 tensors [C, resolution, resolution], decoded on access. Made by `open_images`.

    With `on_bad_image="skip"`, the next good image stands in for one that cannot be decoded.

    Attributes:
        name: the `dataset_name` it was opened with.
        channels: 1 or 3.
        resolution: side in pixels.
        nbytes: size of all its images as uint8.
        bad_images: sorted indices of the images skipped so far because they cannot be decoded.
        classes: names of the classes; None without labels.
    """

    def __init__(
        self,
        source: Source,
        *,
        mode: str,
        resolution: int,
        mode_is_a_guess: bool = False,
        resolution_is_a_guess: bool = False,
        white_levels: WhiteLevels = WhiteLevels(),  # noqa: B008
        on_bad_image: str = "error",
    ):
        self.name = source.name
        self.channels = {"L": 1, "RGB": 3}[mode]
        self.resolution = resolution
        self._source = source
        self._images = source.images
        self._mode = mode
        self._mode_is_a_guess = mode_is_a_guess
        self._resolution_is_a_guess = resolution_is_a_guess
        self._white_levels = white_levels
        self._skip = on_bad_image == "skip"
        self._bad = set()
        self._sizes = Counter()  # {(width, height): how many} of those looked at, or of all once all are decoded
        self._notes = []
        self._note_on_sizes = None

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> torch.Tensor:
        image, bad = self.image_or_next(index)
        self.note_bad_images(bad)
        return image

    @property
    def settings(self) -> dict[str, Any]:
        """How its images are made alike: arguments of the class, for another split of them."""
        return {
            "mode": self._mode,
            "mode_is_a_guess": self._mode_is_a_guess,
            "resolution": self.resolution,
            "resolution_is_a_guess": self._resolution_is_a_guess,
            "white_levels": self._white_levels,
        }

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.channels, self.resolution, self.resolution

    @property
    def nbytes(self) -> int:
        return len(self) * self.channels * self.resolution**2

    @property
    def bad_images(self) -> list[int]:
        return sorted(self._bad)

    @property
    def classes(self) -> list[str] | None:
        return self._source.classes

    def labels(self, classes: list[str] | None = None) -> torch.Tensor:
        """int64 [N] of all its images, as indices into `classes`: its own, or those of another split.

        Raises:
            ValueError: they have none, or some of them, or one of another class, or there is an empty folder for one;
                naming the flag.
        """
        source = self._source
        if source.classes is None:
            raise ValueError(f"--dataset_name {self.name} {source.why_no_labels()}")
        if classes is None and source.empty_classes:
            empty = source.empty_classes[0]
            raise ValueError(f"--dataset_name {self.name}: no image of class {empty}: there is none in its folder")
        labels = torch.from_numpy(source.labels)
        if len(labels) and labels.min() < 0:
            unlabelled = int((labels < 0).nonzero()[0])
            raise ValueError(f"--dataset_name {self.name}: image {unlabelled} has no label")
        if classes in (None, source.classes):
            return labels
        for name in (source.classes[label] for label in labels.unique().tolist()):
            if name not in classes:
                raise ValueError(f"--dataset_name {self.name}: the class {name!r} is not one of {', '.join(classes)}")
        numbers = [classes.index(name) if name in classes else -1 for name in source.classes]
        return torch.tensor(numbers)[labels]

    @staticmethod
    def to_inputs(
        batch: torch.Tensor, flips: torch.Tensor | None = None, draw: Callable[..., torch.Tensor] | None = None
    ) -> torch.Tensor:
        """`normalize`; images have no use for `draw`, as latents have."""
        return normalize(batch, flips)

    @property
    def pixels(self) -> "ImageDataset":
        """Itself: images are no latents of others."""
        return self

    # A part of it

    def hold_out(self, share: float) -> tuple["ImageDataset", "ImageDataset"]:
        """(The others, those held out): the images divided at random, and always alike.

        Args:
            share: of the images, in (0, 1), to hold out; at least one is, and at least one is not.

        Raises:
            ValueError: there is but one image.
        """
        if len(self) < 2:
            raise ValueError(f"{self.name}: of one image none can be held out")
        count = min(max(round(share * len(self)), 1), len(self) - 1)
        order = self.random_order()
        return self._part(order[count:], "image held out"), self._part(order[:count], "image to train on")

    def _part(self, indices: torch.Tensor, left_out: str) -> "ImageDataset":
        part = copy.copy(self)
        part._source = self._source.select(indices.sort().values.tolist(), left_out)
        part._images = part._source.images
        part._bad, part._notes = set(), list(self._notes)
        return part

    # What it holds, for people

    def describe(self) -> str:
        """One line: how many images of what, of which classes and sizes, and what was left out."""
        contents = self.contents()
        of_files = f" of {counted(contents['files'], 'file')} in" if contents["files"] is not None else " of"
        left_out = ", ".join(counted(count, reason) for reason, count in contents["left_out"].items())
        name = self.name
        if contents["files"] is not None and not name.endswith(os.sep):
            name += os.sep
        details = "; ".join(filter(None, [_describe_classes(contents["classes"]), range_of_sizes(self._sizes)]))
        line = f"{counted(contents['images'], 'image')}{of_files} {name} ({details})"
        return f"{line}; left out: {left_out}" if left_out else line

    def contents(self) -> dict[str, Any]:
        """What `describe` says, for a record: images, files, classes, left_out ({reason: count}) and notes."""
        left_out = {reason: count for reason, count in self._source.left_out.items() if count}
        if self._bad:
            left_out["unreadable image"] = len(self._bad)
        return {
            "images": len(self) - len(self._bad),
            "files": self._source.files,
            "classes": self._source.classes,
            "left_out": left_out,
            "notes": self._notes + ([self._note_on_sizes] if self._note_on_sizes else []),
        }

    def fingerprint(self) -> str:
        """The number of images and a checksum over up to 64 of them, undecoded: the same for the same data anywhere.

        It changes when the data set grows, shrinks or is reordered; not for every change of a single image.
        """
        count = min(len(self), FINGERPRINTED)
        checksum = 0
        for i in range(count):
            checksum = zlib.crc32(_undecoded_bytes(self._images[i * len(self) // count]), checksum)
        return f"{len(self)}-{checksum:08x}"

    def add_note(self, note: str) -> None:
        """Keep an announcement for `contents`, and log it."""
        self._notes.append(note)
        logger.warning("%s: %s", self.name, note)

    def note_sizes(self, sizes: Counter, is_complete: bool) -> None:
        """Keep the sizes of the images before resizing; say so if they differ and nobody chose a resolution."""
        self._sizes = sizes
        note = note_on_sizes(sizes, self.resolution, is_complete) if self._resolution_is_a_guess else None
        if note and note != self._note_on_sizes:
            logger.warning("%s: %s", self.name, note)
        self._note_on_sizes = note

    def note_bad_images(self, indices: Iterable[int]) -> None:
        """Add to `bad_images`: a DataLoader's workers find them in a process of their own."""
        self._bad.update(indices)

    # Decoding

    def image_or_next(self, index: int) -> tuple[torch.Tensor, list[int]]:
        """Return image `index`, and []. Where bad images are skipped: the first good one from `index` on,
        going round, and the list of the bad indices passed over."""
        index, bad = range(len(self))[index], {}  # the range resolves -1, and raises IndexError
        candidates = itertools.chain(range(index, len(self)), range(index)) if self._skip else [index]
        for i in candidates:
            try:
                return torch.tensor(self._fit(self._decode(i, self._images[i]))), list(bad)
            except BadImage as error:
                bad[i] = str(error)
        raise bad_images_error(self.name, bad, len(self))

    def sample(self, count: int = 512) -> torch.Tensor:
        """Up to `count` of the images, evenly spaced through the data set: float32 [N, C, H, W] in [-1, 1]."""
        spacing = max(len(self) / count, 1)
        return normalize(torch.stack([self[int(i * spacing)] for i in range(min(count, len(self)))]))

    def random_sample(self, count: int) -> tuple[torch.Tensor, list[int]]:
        """Up to `count` of the images that can be decoded, at random but always the same: uint8 [N, C, H, W], and their
        N indices."""
        images, indices = [], []
        for i in self.random_order().tolist():
            image, bad = self.image_or_next(i)
            self.note_bad_images(bad)
            if not bad:
                images.append(image)
                indices.append(i)
            if len(images) == count:
                break
        return torch.stack(images), indices

    def random_order(self) -> torch.Tensor:
        """int64 [N], a permutation that depends on N alone."""
        return torch.randperm(len(self), generator=torch.Generator().manual_seed(0))

    def decode_all(self, num_workers: int | None = None, show_progress: bool = True) -> torch.Tensor:
        """Decode every image, in a pool of threads (Pillow releases the GIL while it decodes).

        Args:
            num_workers: number of threads; None or 0 for one a core, up to 8 (small images gain little).
            show_progress: draw a progress bar.

        Returns:
            uint8 tensor [N, C, H, W], in the order of the dataset, without the skipped ones (`bad_images`).

        Raises:
            ValueError: images cannot be decoded (with "skip": all of them), naming the first ten.
        """
        images = torch.empty(len(self), self.channels, self.resolution, self.resolution, dtype=torch.uint8)
        pixels, bad, sizes = images.numpy(), {}, Counter()
        starts = range(0, len(self), ROWS_PER_TASK)
        parts = [pixels[start : start + ROWS_PER_TASK] for start in starts]
        bar = progress_bar(total=len(self), desc=f"Decoding {self.name}", unit="image", disable=not show_progress)
        pool = ThreadPoolExecutor(num_workers or min(os.cpu_count() or 1, 8))
        with bar, pool:
            try:
                for part, (bad_of_part, sizes_of_part) in zip(
                    parts, pool.map(self.decode_rows, starts, parts), strict=True
                ):
                    bar.update(len(part))
                    bad.update(bad_of_part)
                    sizes.update(sizes_of_part)
            except BaseException:
                pool.shutdown(cancel_futures=True)  # else the error would be heard after all the rest is decoded
                raise
        self._bad.clear()  # an image that could not be read before may be there now
        if bad:
            images = self._without(images, bad)
        self.note_sizes(sizes, is_complete=True)
        return images

    def decode_rows(self, start: int, pixels: np.ndarray) -> tuple[dict[int, str], list[tuple[int, int]]]:
        """Decode images from `start` on into `pixels`, uint8 [count, C, H, W], where bad ones leave what is there.

        Returns:
            {index: why} of the bad ones, and the sizes before resizing of the others.
        """
        bad, sizes = {}, []
        for i, entry in enumerate(self._images[start : start + len(pixels)], start):
            try:
                image = self._decode(i, entry)
                pixels[i - start] = self._fit(image)
                sizes.append(image.size)
            except BadImage as error:
                bad[i] = str(error)  # not the error itself, whose traceback would keep the image alive
        return bad, sizes

    def leave_out(self, bad: dict[int, str]) -> None:
        """Skip bad images, index -> why, and say so; or raise `bad_images_error`, as on_bad_image says."""
        self.check_bad_images(bad)
        if bad:
            self.note_bad_images(bad)
            logger.warning("Skipping bad images. %s", _bad_images_summary(self.name, bad))

    def check_bad_images(self, bad: dict[int, str]) -> None:
        """Raise `bad_images_error` where there are bad images, index -> why, that cannot be skipped."""
        if bad and (not self._skip or len(bad) == len(self)):
            raise bad_images_error(self.name, bad, len(self))

    def _decode(self, index: int, entry: Entry) -> Image.Image:
        """Decode one image to "L" or "RGB", at its own size."""
        try:
            image = decode_image(entry, self._white_levels)
        except BadImage:
            raise
        except ImageError as error:
            raise ImageError(f"{self.name}: image {index}: {error}") from None
        if self._mode_is_a_guess and self._mode == "L" and image.mode == "RGB":
            raise ImageError(
                f"{self.name}: image {index} is in colour, and a sample of the others was all grey: "
                "pass --image_mode RGB (or L, to make every image grey)"
            )
        return image

    def _fit(self, image: Image.Image) -> np.ndarray:
        """Resize and crop to uint8 [C, resolution, resolution]; an image of that very size is unchanged."""
        size = (self.resolution, self.resolution)
        image = ImageOps.fit(image.convert(self._mode), size, method=Image.Resampling.BICUBIC)
        return np.asarray(image).reshape(*size, self.channels).transpose(2, 0, 1)

    def _without(self, images: torch.Tensor, bad: dict[int, str]) -> torch.Tensor:
        """Drop the images at the indices in `bad` from [N, C, H, W], or raise, as on_bad_image says."""
        self.leave_out(bad)
        good = [i for i in range(len(images)) if i not in bad]
        for to, i in enumerate(good):  # in place: a second copy might not fit
            images[to] = images[i]
        return images[: len(good)]


def _undecoded_bytes(entry: Entry) -> bytes:
    """The bytes of an image as they are stored; none if there are none, or if the file has vanished."""
    if isinstance(entry, np.ndarray):
        return entry.tobytes()
    entry = entry or {}
    if entry.get("bytes") is not None:
        return entry["bytes"]
    try:
        return Path(entry["path"]).read_bytes() if entry.get("path") else b""
    except OSError:
        return b""


def counted(count: int, reason: str) -> str:
    """ "2 hidden files", "1 .txt": what is counted in the plural if there are several."""
    if count != 1 and not reason.startswith("."):
        reason = re.sub(r"\b(image|file|folder|link)\b", r"\1s", reason, count=1)
    return f"{count:,} {reason}"


def _describe_classes(classes: list[str] | None) -> str:
    if classes is None:
        return ""
    names = ", ".join(classes[:MAX_CLASSES_NAMED]) + (", ..." if len(classes) > MAX_CLASSES_NAMED else "")
    return f"{len(classes)} class{'es' if len(classes) != 1 else ''}: {names}"


def normalize(images_uint8: torch.Tensor, flips: torch.Tensor | None = None) -> torch.Tensor:
    """Map uint8 images [B, C, H, W] to float32 in [-1, 1]: x / 127.5 - 1.

    Args:
        flips: bool [B] on the same device, or None; where True, the image is mirrored left to right.
    """
    if flips is not None:
        images_uint8 = torch.where(flips[:, None, None, None], images_uint8.flip(-1), images_uint8)
    return images_uint8.to(torch.float32) / 127.5 - 1
