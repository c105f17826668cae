"""Endless training batches. The order of the images is *stateless*: image number n of a run depends on the seed and on
n alone. So a resumed run needs only the number of images it has seen, and processes share the images out without
talking.
"""

import functools
import itertools
import os
from collections.abc import Iterable, Iterator

import psutil
import torch

from .dataset import ImageDataset
from .decoding import ImageError

PLACEMENTS = ("auto", "device", "memory", "stream")


# ----------------------------------------------------------------------------------------------------- order


def _epoch_seed(seed: int, epoch: int) -> int:
    """Mix seed and epoch into 32 bits: a CPU generator's `manual_seed` ignores all higher ones.

    The multiplier is 2^32 / golden ratio: its multiples stay as far apart as 32 bits allow. So the epochs of
    one run never collide, nor do those of the seeds 0..S-1 with E epochs each, as long as S * E < 1e9.
    """
    return (seed * 2654435761 + epoch) % 2**32


def image_order(num_images: int, seed: int, first: int, count: int) -> torch.Tensor:
    """Dataset indices of images number first..first+count-1 of a run, int64 [count].

    Image number n of a run is `permutation[n % num_images]`; every epoch n // num_images has its permutation.
    """
    generator, permutations = torch.Generator(), []
    for epoch in range(first // num_images, (first + count) // num_images + 1):
        generator.manual_seed(_epoch_seed(seed, epoch))
        permutations.append(torch.randperm(num_images, generator=generator))
    start = first % num_images
    return torch.cat(permutations)[start : start + count]


def _batches_of_indices(
    num_images: int,
    batch_size: int,
    *,
    seed: int,
    first_image: int,
    rank: int,
    world_size: int,
    device: str | torch.device = "cpu",
) -> Iterator[torch.Tensor]:
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
    dataset: ImageDataset,
    batch_size: int,
    *,
    seed: int,
    first_image: int = 0,
    rank: int = 0,
    world_size: int = 1,
    device: str | torch.device = "cpu",
    placement: str = "auto",
    num_workers: int = 0,
    show_progress: bool = True,
) -> "ImageBatches":
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

    def __init__(self, dataset: ImageDataset, batches: Iterator[torch.Tensor], placement: str, num_images: int):
        self.placement = placement
        self.num_images = num_images
        self._dataset = dataset
        self._batches = batches

    def __iter__(self) -> "ImageBatches":
        return self

    def __next__(self) -> torch.Tensor:
        return next(self._batches)

    def peek(self) -> torch.Tensor:
        """The batch that comes next: a streamed one shows what is wrong with the data before a run begins."""
        batch = next(self._batches)
        self._batches = itertools.chain([batch], self._batches)
        return batch

    @property
    def skipped(self) -> int:
        return len(self._dataset.bad_images)


def _placement_that_fits(nbytes: int, device: torch.device) -> str:
    """Choose where `nbytes` of images may live; half of the host's, 3/4 of the GPU's memory stays free."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # of torchrun and accelerate; each holds a copy
    if nbytes >= psutil.virtual_memory().available / 2 / processes:
        return "stream"
    if device.type == "cuda" and nbytes < torch.cuda.mem_get_info(device)[0] / 4:
        return "device"
    return "memory"


def _to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Move a host tensor without waiting for it, where that can be done: from pinned memory to a CUDA device.

    Pinning the batch is enough: the gather that makes a batch would lose the pinning of a whole dataset.
    """
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


class _InWorkers(torch.utils.data.Dataset):
    """(image, bad indices passed over, None), or (None, [], error): the main process hears what a worker met.

    An error that a worker raised would reach the main process as a traceback in the text of another.
    """

    def __init__(self, dataset: ImageDataset):
        self.dataset = dataset

    def __getitem__(self, index: int) -> tuple:
        try:
            return *self.dataset.image_or_next(index), None
        except (ImageError, OSError) as error:
            return None, [], error


def _collate(examples: list[tuple]) -> tuple:
    images, bad, errors = zip(*examples, strict=True)
    first_error = next((error for error in errors if error is not None), None)
    return None if first_error else torch.stack(images), [i for indices in bad for i in indices], first_error


def _named_deaths(loader: Iterable) -> Iterator:
    """The loader's batches; a worker that was killed, by a lack of memory say, is an OSError."""
    try:
        yield from loader
    except RuntimeError as error:
        raise OSError(f"a process that decodes images has ended (--dataloader_num_workers): {error}") from error


def _stream(
    dataset: ImageDataset, index_batches: Iterator[torch.Tensor], num_workers: int, device: torch.device
) -> Iterator[torch.Tensor]:
    """Endlessly yield uint8 batches [B, C, H, W] that a DataLoader decodes as `index_batches` says."""
    loader = torch.utils.data.DataLoader(
        _InWorkers(dataset),
        batch_sampler=(indices.tolist() for indices in index_batches),  # never ends, so the workers persist
        num_workers=num_workers,
        collate_fn=_collate,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # its own: a DataLoader would draw from the run's global generator
    )
    for images, bad, error in _named_deaths(loader):
        dataset.note_bad_images(bad)
        if error is not None:
            raise error
        yield _to_device(images, device)
