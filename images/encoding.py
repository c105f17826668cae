"""Images -> the moments of their latents, by a VAE; threads decode the next images meanwhile."""

import copy
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch

from progress import progress_bar

from .dataset import ImageDataset, normalize
from .latent_files import LatentFiles

if TYPE_CHECKING:  # seconds to import, which who has a VAE has spent
    from diffusers import AutoencoderKL


def encode_blocks(
    files: LatentFiles,
    blocks: Sequence[int],
    dataset: ImageDataset,
    vae: "AutoencoderKL",
    *,
    mirrored: bool,
    device: str | torch.device,
    batch_size: int,
    show_progress: bool,
) -> None:
    """Write these blocks, with a copy of the VAE in float32. An image's bits do not depend on the other blocks: batches
    have one size, because a device may compute another in another way.

    Raises:
        ValueError: images cannot be decoded and are not to be skipped, or a latent is beyond float16.
        OSError: a file cannot be written.
    """
    device = torch.device(device)
    encoder = copy.deepcopy(vae).to(device).float().eval()
    batches = {block: _split(files.images_of(block), batch_size) for block in blocks}
    all_batches = [rows for of_block in batches.values() for rows in of_block]
    total, name = sum(map(len, all_batches)), dataset.name
    bar = progress_bar(total=total, desc=f"Encoding {name}", unit="image", disable=not show_progress)
    with bar, closing(_decode_ahead(dataset, all_batches, batch_size)) as decoded, _repeatable_float32(device):
        for block, of_block in batches.items():
            parts, bad = [], {}
            for rows in of_block:
                images, bad_of_batch = next(decoded)
                moments = encode(encoder, torch.from_numpy(images).to(device), mirrored)[: len(rows)]
                parts.append(_to_float16(moments, rows.start, name))
                bad.update(bad_of_batch)
                bar.update(len(rows))
            dataset.check_bad_images(bad)
            files.write(block, torch.cat(parts).numpy(), bad)


def _split(images: range, batch_size: int) -> list[range]:
    return [images[i : i + batch_size] for i in range(0, len(images), batch_size)]


def encode(vae: "AutoencoderKL", images_uint8: torch.Tensor, mirrored: bool) -> torch.Tensor:
    """Moments [B, V, 2, C, h, w] of images [B, C, H, W]: mean and standard deviation, times the scaling factor, of the
    image, and of its mirror image if `mirrored`."""
    views = [images_uint8, images_uint8.flip(-1)] if mirrored else [images_uint8]
    posteriors = [vae.encode(normalize(view)).latent_dist for view in views]
    moments = [torch.stack([posterior.mean, posterior.std], dim=1) for posterior in posteriors]
    return torch.stack(moments, dim=1) * vae.config.scaling_factor


@contextmanager
def _repeatable_float32(device: torch.device) -> Iterator[None]:
    """float32 without autocast, by algorithms that are not chosen by a race: the same bits each time on a device.

    A GPU's convolutions, nearly all of the work, may round their operands to TF32, which is several times as fast: it
    moves a latent of a VAE as large as Stable Diffusion's by 0.001 of the latents' spread, where float16 moves it by
    0.0003. That is too little to tell the files apart for: one device may go on where another was."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    cudnn = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=True)
    try:
        with torch.inference_mode(), torch.autocast(device.type, enabled=False), cudnn:
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


def _to_float16(moments: torch.Tensor, first: int, name: str) -> torch.Tensor:
    """Round to float16, on the CPU. Raises ValueError, which names the image, where one is too large, or no number."""
    rounded = moments.to(torch.float16).cpu()
    if not rounded.isfinite().all():
        place = (~rounded.isfinite()).nonzero()[0].tolist()
        what = "standard deviation" if place[2] else "mean"
        raise ValueError(
            f"{name}: image {first + place[0]}: the VAE gives it a latent with a {what} of "
            f"{moments[tuple(place)].item():.6g}, and latents are kept as float16, which ends at 65504"
        )
    return rounded


def _decode_ahead(
    dataset: ImageDataset, batches: Sequence[range], batch_size: int
) -> Iterator[tuple[np.ndarray, dict[int, str]]]:
    """(uint8 [batch_size, C, H, W], {index: why} of bad images) of each batch; black where there is no image."""

    def decode(rows: range) -> tuple[np.ndarray, dict[int, str]]:
        images = np.zeros((batch_size, *dataset.image_shape), np.uint8)
        bad, _ = dataset.decode_rows(rows.start, images[: len(rows)])
        return images, bad

    threads = min(os.cpu_count() or 1, 8)
    pool, waiting = ThreadPoolExecutor(threads), deque()
    try:
        for rows in batches:
            waiting.append(pool.submit(decode, rows))
            if len(waiting) > 2 * threads:  # all of a data set's might not fit in memory
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
