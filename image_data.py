"""Any image source -> uint8 tensors [C, H, W], for training and for evaluation.

    dataset = open_images("uoft-cs/cifar10")                            # or a folder, or "digits"
    for images in training_batches(dataset, batch_size=128, seed=0):    # endless uint8 [128, 3, 32, 32]
        ...
    every_image = dataset.decode_all()                                  # uint8 [50000, 3, 32, 32]

Images stay uint8 until the training step (`normalize`): a quarter of the memory and of the copying.

The order of the images is *stateless*: image number n of a run depends on the seed and on n alone. So a
resumed run needs only the number of images it has seen, and processes share the images out without talking.
"""

import functools
import itertools
import logging
import os
import re
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import datasets
import numpy as np
import psutil
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from tqdm.auto import tqdm

logger = logging.getLogger(__name__)

IMAGE_MODES = ("auto", "L", "RGB")
ON_BAD_IMAGE = ("error", "skip")
PLACEMENTS = ("auto", "device", "memory", "stream")
ROWS_PER_TASK = 64  # images a thread decodes before it reports: a smooth bar at little overhead


# ------------------------------------------------------------------------------------------------- one image


class BadImage(ValueError):
    """An image cannot be decoded; the message says which and why."""


def decode_image(entry):
    """Decode one image into a PIL image, upright, opaque, and of mode "L" (grey) or "RGB".

    Args:
        entry: what `datasets.Image(decode=False)` gives, `{"bytes": bytes or None, "path": str or None}`
            or None.

    Transparency is composited over white. Grey images of more than 8 bits are scaled to 8, never clipped.
    Of an animation, the first frame is taken.

    Raises:
        BadImage: the entry is empty, truncated, not an image, or too large to be one (a decompression bomb).
    """
    entry = entry or {}
    content, path = entry.get("bytes"), entry.get("path")
    if content is None and path is None:
        raise BadImage("the row holds no image")
    where = f"{path}: " if path else ""
    try:
        with Image.open(path if content is None else BytesIO(content)) as image:
            image.load()
            if image.getexif().get(ExifTags.Base.Orientation) is not None:
                image = ImageOps.exif_transpose(image)
            return _grey_or_rgb(image)
    except MemoryError:
        raise  # says something about the machine, not about the file
    except UnidentifiedImageError:
        raise BadImage(f"{where}not an image in a format that Pillow reads") from None
    except Exception as error:  # Pillow's readers raise nearly any exception on a malformed file
        raise BadImage(f"{where}{type(error).__name__}: {error}") from error


def _grey_or_rgb(image):
    """Convert a PIL image of any mode: to "L" if it is grey (with or without alpha), else to "RGB"."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _eight_bits(image)
    mode = "L" if image.mode in ("1", "L", "LA") else "RGB"
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(mode)


def _eight_bits(image):
    """Scale a grey image of 16 bits (0..65535) or floats (0..1 or 0..255) to "L"; Pillow would clip it."""
    levels = np.asarray(image, dtype=np.float64)
    white = 65535 if image.mode != "F" else 1 if levels.max() <= 1 else 255
    if not (levels.min() >= 0 and levels.max() <= white):  # written so that NaN fails too
        raise ValueError(f"grey levels {levels.min():g}..{levels.max():g} are outside 0..{white}")
    return Image.fromarray(np.rint(levels * 255 / white).astype(np.uint8))


# --------------------------------------------------------------------------------------------------- sources


def _digits():
    """scikit-learn's 1797 handwritten digits, 8x8, as a `datasets.Dataset`. They come with scikit-learn."""
    from sklearn.datasets import load_digits

    pixels = np.rint(load_digits().images * 255 / 16).astype(np.uint8)  # grey levels 0..16
    features = datasets.Features({"image": datasets.Image()})
    return datasets.Dataset.from_dict({"image": list(pixels)}, features=features)


def _load_rows(name, config_name, split, cache_dir):
    """Open one split of a source as a `datasets.Dataset`; a ValueError names the flag if that fails."""
    path = Path(name).expanduser()
    if name == "digits":
        splits = _digits()
    elif (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        splits = _call(name, datasets.load_from_disk, dataset_path=str(path))
    else:
        arguments = {"name": config_name, "split": split, "cache_dir": cache_dir, **_location(name, path)}
        return _call(name, datasets.load_dataset, **arguments)
    if isinstance(splits, datasets.Dataset):  # a single split
        splits = {str(splits.split or "train"): splits}
    if split not in splits:
        raise ValueError(f"--dataset_name {name} has no split {split!r}, but {sorted(splits)}")
    return splits[split]


def _location(name, path):
    """Arguments that tell `datasets.load_dataset` to read a local folder, a .parquet file, or the Hub."""
    if path.is_dir():  # absolute, because a folder named "csv" would be taken for the reader of csv files
        return {"path": str(path.resolve())}
    if path.is_file() and path.suffix == ".parquet":
        return {"path": "parquet", "data_files": str(path)}
    if path.is_file():
        raise ValueError(f"--dataset_name {name} is a file: give a folder of images, or a .parquet file")
    if not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name):  # cannot be on the Hub: no need to ask the network
        raise ValueError(f"--dataset_name {name}: no such folder, and not the name of a Hub dataset")
    return {"path": name}


def _call(name, load, /, **arguments):
    """Call a loader of the `datasets` library, and sum up its error in one ValueError."""
    try:
        return load(**arguments)
    except Exception as error:  # from the network, the Hub, the file system, Arrow, or any reader of a format
        # A DatasetGenerationError keeps what went wrong (a corrupt file, a full disk) in its cause.
        generating = isinstance(error, datasets.exceptions.DatasetGenerationError)
        cause = error.__cause__ if generating and error.__cause__ else error
        reason = f"{type(cause).__name__}: {cause}"
    if not Path(name).expanduser().exists():
        reason = f"there is no such folder, and from the Hugging Face Hub: {reason}"
    if "onfig" in reason:
        reason += " (--dataset_config_name chooses the configuration)"
    raise ValueError(f"--dataset_name {name} cannot be loaded: {reason}")  # outside the except: one traceback


def _image_rows(rows, name, image_column):
    """Reduce a `datasets.Dataset` to its image column, found by its type, and leave it undecoded."""
    columns = ", ".join(f"{column}: {feature}" for column, feature in rows.features.items())
    found = [column for column, feature in rows.features.items() if isinstance(feature, datasets.Image)]
    if image_column is not None and image_column not in rows.features:
        raise ValueError(f"--image_column {image_column}: {name} has no such column, but {columns}")
    if image_column is None and len(found) > 1:
        raise ValueError(f"--dataset_name {name} has image columns {found}: choose one by --image_column")
    if image_column is None and not found:
        raise ValueError(f"--dataset_name {name} has no image column, but {columns}")
    column = image_column or found[0]
    try:  # a named column of raw bytes or of paths is taken as well
        return rows.select_columns([column]).cast_column(column, datasets.Image(decode=False))
    except (TypeError, ValueError, NotImplementedError) as error:
        raise ValueError(f"--image_column {column} holds no images, but {rows.features[column]}") from error


# --------------------------------------------------------------------------------------------------- dataset


def open_images(
    dataset_name,
    *,
    dataset_config_name=None,
    split="train",
    cache_dir=None,
    image_column=None,
    resolution=None,
    image_mode="auto",
    on_bad_image="error",
):
    """Open a source of images as a map-style dataset of square uint8 tensors.

    Args:
        dataset_name: "digits" (scikit-learn's, 8x8 grey, no download); or a local path, to a folder of
            images, of parquet files, or written by `save_to_disk`, or to one .parquet file; or a Hub dataset.
        dataset_config_name: configuration of a Hub dataset that has several.
        split: which split; or a slice such as "train[:1000]", but not of "digits" and `save_to_disk` folders.
        cache_dir: where `datasets` keeps its files; None for its default.
        image_column: name of the image column; None finds it by its type.
        resolution: side in pixels; other sizes are resized (bicubic) and centre-cropped. None takes the size
            of the first image, which must be square.
        image_mode: "L" (1 channel), "RGB" (3 channels), or "auto": "L" if a sample of images spread over
            the dataset is all grey.
        on_bad_image: "error", or "skip" to leave out images that cannot be decoded.

    Raises:
        ValueError: the source, its split or its image column cannot be found, or the size or mode is unclear.
    """
    if image_mode not in IMAGE_MODES:
        raise ValueError(f"--image_mode {image_mode} is none of {IMAGE_MODES}")
    if on_bad_image not in ON_BAD_IMAGE:
        raise ValueError(f"--on_bad_image {on_bad_image} is none of {ON_BAD_IMAGE}")
    if resolution is not None and resolution < 1:
        raise ValueError(f"--resolution {resolution} is not a positive number of pixels")
    rows = _load_rows(dataset_name, dataset_config_name, split, cache_dir)
    rows = _image_rows(rows, dataset_name, image_column)
    return ImageDataset(
        dataset_name,
        rows,
        mode=_common_mode(rows) if image_mode == "auto" else image_mode,
        mode_is_a_guess=image_mode == "auto",
        resolution=resolution or _own_resolution(dataset_name, rows, on_bad_image),
        on_bad_image=on_bad_image,
    )


def _entries(rows, start, stop):
    """The undecoded images of rows start..stop-1, a list of what `decode_image` takes."""
    return rows[start:stop][rows.column_names[0]]


def _common_mode(rows):
    """Choose "L" if some 100 images, spread over the dataset, are all grey, else "RGB"; ignore bad ones."""
    modes = []
    for i in range(0, len(rows), -(-len(rows) // 100)):
        try:
            modes.append(decode_image(*_entries(rows, i, i + 1)).mode)
        except BadImage:
            continue
        if modes[-1] == "RGB":
            return "RGB"
    return "L" if modes else "RGB"


def _own_resolution(name, rows, on_bad_image):
    """Side in pixels of the first image that can be decoded. Raises ValueError if it is not square."""
    for i in range(len(rows)):
        try:
            width, height = decode_image(*_entries(rows, i, i + 1)).size
        except BadImage as error:
            if on_bad_image == "error":
                raise _bad_images_error(name, {i: error}, len(rows)) from error
            continue
        if width != height:
            raise ValueError(f"{name}: image {i} is {width}x{height}, not square: pass --resolution")
        return width
    raise ValueError(f"{name}: none of the {len(rows)} images can be decoded")


def _bad_images_summary(name, bad):
    """Name the first ten of the bad images. `bad` maps an index to the reason why that image is bad."""
    indices = sorted(bad)
    some = ", ".join(map(str, indices[:10])) + (", ..." if len(indices) > 10 else "")
    return f"{name}: cannot decode {len(bad)} image(s), index {some}; the first: {bad[indices[0]]}"


def _bad_images_error(name, bad, num_images):
    hint = " (--on_bad_image skip leaves such images out)" if len(bad) < num_images else " (no image is left)"
    return BadImage(_bad_images_summary(name, bad) + hint)


class ImageDataset(torch.utils.data.Dataset):
    """Map-style dataset of uint8 tensors [C, resolution, resolution], decoded on access. See `open_images`.

    With `on_bad_image="skip"`, the next good image stands in for one that cannot be decoded.

    Attributes:
        name: the `dataset_name` it was opened with.
        channels: 1 or 3.
        resolution: side in pixels.
        nbytes: size of all its images as uint8.
        bad_images: sorted indices of the images skipped so far because they cannot be decoded.
    """

    def __init__(self, name, rows, *, mode, resolution, mode_is_a_guess=False, on_bad_image="error"):
        self.name = name
        self.channels = {"L": 1, "RGB": 3}[mode]
        self.resolution = resolution
        self._rows = rows  # datasets.Dataset of one undecoded image column
        self._mode = mode
        self._mode_is_a_guess = mode_is_a_guess
        self._skip = on_bad_image == "skip"
        self._bad = set()

    def __len__(self):
        return len(self._rows)

    def __getitem__(self, index):
        image, bad = self.image_or_next(index)
        self.note_bad_images(bad)
        return image

    @property
    def nbytes(self):
        return len(self) * self.channels * self.resolution**2

    @property
    def bad_images(self):
        return sorted(self._bad)

    def note_bad_images(self, indices):
        """Add to `bad_images`: a DataLoader's workers find them in a process of their own."""
        self._bad.update(indices)

    def image_or_next(self, index):
        """Return image `index`, and []. Where bad images are skipped: the first good one from `index` on,
        going round, and the list of the bad indices passed over."""
        index, bad = range(len(self))[index], {}  # the range resolves -1, and raises IndexError
        candidates = itertools.chain(range(index, len(self)), range(index)) if self._skip else [index]
        for i in candidates:
            try:
                return torch.tensor(self._pixels(i, *_entries(self._rows, i, i + 1))), list(bad)
            except BadImage as error:
                bad[i] = str(error)
        raise _bad_images_error(self.name, bad, len(self))

    def sample(self, count=512):
        """Up to `count` of the images, evenly spaced through the data set: float32 [N, C, H, W] in [-1, 1]."""
        spacing = max(len(self) / count, 1)
        return normalize(torch.stack([self[int(i * spacing)] for i in range(min(count, len(self)))]))

    def decode_all(self, num_workers=None, show_progress=True):
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
        pixels, bad = images.numpy(), {}

        def decode_rows(start):
            entries = _entries(self._rows, start, start + ROWS_PER_TASK)
            for i, entry in enumerate(entries, start):
                try:
                    pixels[i] = self._pixels(i, entry)
                except BadImage as error:
                    bad[i] = str(error)  # not the error itself, whose traceback would keep the image alive
            return len(entries)

        bar = tqdm(total=len(self), desc=f"Decoding {self.name}", unit="image", disable=not show_progress)
        with bar, ThreadPoolExecutor(num_workers or min(os.cpu_count() or 1, 8)) as pool:
            for count in pool.map(decode_rows, range(0, len(self), ROWS_PER_TASK)):
                bar.update(count)
        return self._without(images, bad) if bad else images

    def _pixels(self, index, entry):
        """Decode one image to uint8 [C, resolution, resolution]; one of that very size is unchanged."""
        image = decode_image(entry)
        if self._mode_is_a_guess and self._mode == "L" and image.mode == "RGB":
            raise ValueError(
                f"{self.name}: image {index} is in colour, and a sample of the others was all grey: "
                "pass --image_mode RGB (or L, to make every image grey)"
            )
        size = (self.resolution, self.resolution)
        image = ImageOps.fit(image.convert(self._mode), size, method=Image.Resampling.BICUBIC)
        return np.asarray(image).reshape(*size, self.channels).transpose(2, 0, 1)

    def _without(self, images, bad):
        """Drop the images at the indices in `bad` from [N, C, H, W], or raise, as on_bad_image says."""
        if not self._skip or len(bad) == len(self):
            raise _bad_images_error(self.name, bad, len(self))
        self.note_bad_images(bad)
        logger.warning("Skipping bad images. %s", _bad_images_summary(self.name, bad))
        good = [i for i in range(len(images)) if i not in bad]
        for to, i in enumerate(good):  # in place: a second copy might not fit
            images[to] = images[i]
        return images[: len(good)]


# ----------------------------------------------------------------------------------------------------- order


def _epoch_seed(seed, epoch):
    """Mix seed and epoch into 32 bits: a CPU generator's `manual_seed` ignores all higher ones.

    The multiplier is 2^32 / golden ratio: its multiples stay as far apart as 32 bits allow. So the epochs of
    one run never collide, nor do those of the seeds 0..S-1 with E epochs each, as long as S * E < 1e9.
    """
    return (seed * 2654435761 + epoch) % 2**32


def image_order(num_images, seed, first, count):
    """Dataset indices of images number first..first+count-1 of a run, int64 [count].

    Image number n of a run is `permutation[n % num_images]`; every epoch n // num_images has its permutation.
    """
    generator, permutations = torch.Generator(), []
    for epoch in range(first // num_images, (first + count) // num_images + 1):
        generator.manual_seed(_epoch_seed(seed, epoch))
        permutations.append(torch.randperm(num_images, generator=generator))
    start = first % num_images
    return torch.cat(permutations)[start : start + count]


def _batches_of_indices(num_images, batch_size, *, seed, first_image, rank, world_size, device="cpu"):
    """Endlessly yield the indices of this rank's next batch, int64 [batch_size] on `device`.

    They are made and moved about an epoch at a time: a step then costs no more than a look-up.
    """
    images_per_step = batch_size * world_size
    steps = max(1, num_images // images_per_step)
    while True:
        order = image_order(num_images, seed, first_image, steps * images_per_step)
        order = order.view(steps, images_per_step)[:, rank::world_size].contiguous()
        order = _to_device(order, torch.device(device))
        for step in range(steps):
            yield order[step]
        first_image += steps * images_per_step


# --------------------------------------------------------------------------------------------------- batches


def training_batches(
    dataset,
    batch_size,
    *,
    seed,
    first_image=0,
    rank=0,
    world_size=1,
    device="cpu",
    placement="auto",
    num_workers=0,
    show_progress=True,
):
    """Iterate endlessly over batches, uint8 [batch_size, C, H, W] on `device`, in the order of `image_order`.

    Step b of all W = world_size ranks together takes the next W * batch_size images of that order from
    first_image + b * W * batch_size on; rank r takes every W-th of them, from the r-th. So W ranks see what
    one process with W times the batch size sees. Every rank decodes and holds its own copy of the dataset.

    Args:
        dataset: an `ImageDataset`.
        batch_size: images per batch and rank.
        seed: seed of the order.
        first_image: how many images all ranks together have seen before; to resume, steps * W * batch_size.
        device: where the batches go.
        placement: where the decoded images live. "device": all on `device`; "memory": all in host memory;
            "stream": nowhere, they are decoded anew for every batch; "auto": the first of these that has room
            to spare ("device" if it is a GPU).
        num_workers: "stream": processes that decode, 0 for none but this; else: see `decode_all`.
        show_progress: draw a progress bar while all images are decoded.

    Returns:
        An `ImageBatches` iterator. As to skipped images, "device" and "memory" know them from the start, and
        order only the good ones; "stream" meets them on the way, and the next good one stands in.
    """
    if placement not in PLACEMENTS:
        raise ValueError(f"--data_placement {placement} is none of {PLACEMENTS}")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} is not in [0, {world_size})")
    device = torch.device(device)
    if placement == "auto":
        placement = _placement_that_fits(dataset.nbytes, device)
    share = {"seed": seed, "first_image": first_image, "rank": rank, "world_size": world_size}
    order = functools.partial(_batches_of_indices, batch_size=batch_size, **share)
    if placement == "stream":
        batches = _stream(dataset, order(len(dataset)), num_workers, device)
        return ImageBatches(dataset, batches, placement, len(dataset))
    images = dataset.decode_all(num_workers, show_progress)
    if placement == "device":
        images = images.to(device)
        batches = (images.index_select(0, indices) for indices in order(len(images), device=device))
    else:  # index_select, because images[indices] copies byte by byte on a CPU: 10 to 100 times slower
        batches = (_to_device(images.index_select(0, indices), device) for indices in order(len(images)))
    return ImageBatches(dataset, batches, placement, len(images))


class ImageBatches:
    """Endless iterator over uint8 batches [batch_size, C, H, W]; made by `training_batches`.

    Attributes:
        placement: "device", "memory" or "stream": what "auto" chose.
        num_images: images in an epoch; without the skipped ones, except for "stream".
        skipped: images found undecodable so far.
    """

    def __init__(self, dataset, batches, placement, num_images):
        self.placement = placement
        self.num_images = num_images
        self._dataset = dataset
        self._batches = batches

    def __iter__(self):
        return self

    def __next__(self):
        return next(self._batches)

    @property
    def skipped(self):
        return len(self._dataset.bad_images)


def _placement_that_fits(nbytes, device):
    """Choose where `nbytes` of images may live; half of the host's, 3/4 of the GPU's memory stays free."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # of torchrun and accelerate; each holds a copy
    if nbytes >= psutil.virtual_memory().available / 2 / processes:
        return "stream"
    if device.type == "cuda" and nbytes < torch.cuda.mem_get_info(device)[0] / 4:
        return "device"
    return "memory"


def _to_device(tensor, device):
    """Move a host tensor without waiting for it, where that can be done: from pinned memory to a CUDA device.

    Pinning the batch is enough: the gather that makes a batch would lose the pinning of a whole dataset.
    """
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


class _WithBadIndices(torch.utils.data.Dataset):
    """(image, bad indices passed over), so that the main process hears what a worker met."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __getitem__(self, index):
        return self.dataset.image_or_next(index)


def _collate(examples):
    images, bad = zip(*examples, strict=True)
    return torch.stack(images), [i for indices in bad for i in indices]


def _stream(dataset, index_batches, num_workers, device):
    """Endlessly yield uint8 batches [B, C, H, W] that a DataLoader decodes as `index_batches` says."""
    loader = torch.utils.data.DataLoader(
        _WithBadIndices(dataset),
        batch_sampler=(indices.tolist() for indices in index_batches),  # never ends, so the workers persist
        num_workers=num_workers,
        collate_fn=_collate,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # its own: a DataLoader would draw from the run's global generator
    )
    for images, bad in loader:
        dataset.note_bad_images(bad)
        yield _to_device(images, device)


def normalize(images_uint8, flips=None):
    """Map uint8 images [B, C, H, W] to float32 in [-1, 1]: x / 127.5 - 1.

    Args:
        flips: bool [B] on the same device, or None; where True, the image is mirrored left to right.
    """
    if flips is not None:
        images_uint8 = torch.where(flips[:, None, None, None], images_uint8.flip(-1), images_uint8)
    return images_uint8.to(torch.float32) / 127.5 - 1
