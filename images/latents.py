"""The latents of images: a VAE encodes them once, into files, and a diffusion model trains on these.

    latents = open_latents(dataset, vae, Path("latents"), identity={"sha256": ...}, mirrored=True, device="cuda")
    for moments in training_batches(latents, batch_size=128, seed=0):  # endless float16 [128, 2, 2, 4, 32, 32]
        loss = model(sample_posterior(moments, noise, flips)) ...

Moments are float16 [V, 2, C, h, w] for an image: of each of its V views the mean and the standard deviation of the
posterior, times the VAE's scaling factor. The views are the image and its mirror image, whose latent is not the
mirrored latent; or the image alone.
"""

import json
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from progress import progress_bar

from .dataset import ImageDataset
from .encoding import encode_blocks
from .latent_files import LatentFiles, saved_settings

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

NOTICEABLE_SECONDS = 2  # that a bar waits: what is read or checked sooner needs none


def open_latents(
    dataset: ImageDataset,
    vae: "AutoencoderKL",
    folder: Path,
    *,
    identity: dict[str, Any],
    mirrored: bool,
    device: str | torch.device,
    batch_size: int = 32,
    rank: int = 0,
    world_size: int = 1,
    wait: Callable[[], None] = lambda: None,
    show_progress: bool = True,
) -> "LatentDataset":
    """Encode into `folder` what is not there yet, check the rest, by their checksums where files were written to since
    they were last checked, and open all. A run that was killed goes on with the block of images that it was at.

    All W = world_size processes must call it; each takes a W-th of the work. The files' bits do not depend on W.

    Args:
        dataset: the images, or a part of them.
        vae: stays as it is, where it is; a copy encodes, in float32 (a GPU's convolutions in TF32).
        folder: holds the latents of these images, or nothing.
        identity: what tells the VAE from others, as JSON can hold it.
        mirrored: of mirror images, too. A folder that has them serves without them as well.
        device: that encodes.
        batch_size: of encoding.
        wait: returns when every process has called it.

    Raises:
        ValueError: the folder is of other images or another VAE, has too little space, or a damaged file, or is not the
            same for all processes; images cannot be decoded (with "skip": all of them); the VAE cannot encode them, or
            not within float16.
        OSError: a file cannot be written.
    """
    both_views = _has_both_views(folder, mirrored)
    shape = (len(dataset), 2 if both_views else 1, 2, *latent_shape(vae.config, dataset.channels, dataset.resolution))
    settings = {"vae": identity, **_settings_of(dataset), "mirrored": both_views, "batch_size": batch_size}
    files = LatentFiles(folder, shape, batch_size, settings)
    missing = files.missing_blocks()  # each process looks before any writes a block
    if rank == 0:
        files.write_index()
    wait()
    files.check_is_shared()
    present = sorted(set(range(files.num_blocks)) - set(missing))
    _check_blocks(files, present[rank::world_size], dataset, show_progress)
    if own := missing[rank::world_size]:
        how = {"mirrored": both_views, "device": device, "batch_size": batch_size}
        encode_blocks(files, own, dataset, vae, **how, show_progress=show_progress)
    wait()
    latents = LatentDataset(dataset, files, mirrored)
    dataset.leave_out(latents.bad)
    return latents


def latent_shape(vae_config: dict[str, Any], channels: int, resolution: int) -> tuple[int, int, int]:
    """(C, h, w) of the latents of images of `channels` and side `resolution`.

    Raises:
        ValueError: the VAE cannot encode them; naming the flag.
    """
    factor, taken = 2 ** (len(vae_config["block_out_channels"]) - 1), vae_config["in_channels"]
    if channels != taken:
        hint = f"; pass --image_mode {'L' if taken == 1 else 'RGB'}" if taken in (1, 3) else ""
        raise ValueError(f"--vae: encodes images of {taken} channel(s), and these have {channels}{hint}")
    if resolution % factor:
        raise ValueError(f"--resolution {resolution}: is no multiple of {factor}, by which the VAE divides it")
    return vae_config["latent_channels"], resolution // factor, resolution // factor


def _has_both_views(folder: Path, mirrored: bool) -> bool:
    """Whether the folder has latents of mirror images, or will have. Raises ValueError if they are lacking."""
    found = saved_settings(folder).get("mirrored", mirrored)
    if mirrored and found is False:
        raise ValueError(
            f"--latents_dir {folder}: has no mirror images' latents, which --random_flip needs. Choose another folder"
        )
    return mirrored or found is True


def _settings_of(dataset: ImageDataset) -> dict[str, Any]:
    """What tells images from others. The fingerprint looks at 64 of the N at most: that is enough for other data sets,
    other parts of the same, and images that were all made anew; but that a share s of them was replaced in place is
    noticed with a probability of 1 - (1 - s)^64, and for a single image of 64 / N: the others keep their old latents.
    """
    white_levels = dataset.settings["white_levels"]._asdict()
    return {"fingerprint": dataset.fingerprint(), "image_shape": dataset.image_shape, "white_levels": white_levels}


def _check_blocks(files: LatentFiles, blocks: list[int], dataset: ImageDataset, show_progress: bool) -> None:
    """Raises ValueError if a block is damaged, or has bad images that are not to be skipped."""
    settings = {"desc": f"Checking the latents of {dataset.name}", "unit": "file", "delay": NOTICEABLE_SECONDS}
    for block in progress_bar(blocks, **settings, disable=not show_progress):
        files.check(block)
        dataset.check_bad_images(files.bad_images(block))


class LatentDataset(torch.utils.data.Dataset):
    """Map-style dataset of moments, float16 [V, 2, C, h, w], in memory-mapped files. Made by `open_latents`.

    It has what training uses of an `ImageDataset`, with the images in the same order, and the same ones left out.

    Attributes:
        pixels: the `ImageDataset` that it is of.
        name: of the images.
        classes: of the images; None without labels.
        image_shape: (C, h, w) of a latent.
        channels: C.
        resolution: h.
        nbytes: size of all the moments.
        bad: {index: why} of the images that cannot be decoded, as was found when they were encoded.
    """

    def __init__(self, images: ImageDataset, files: LatentFiles, mirrored: bool):
        self.pixels = images
        self.name, self.classes = images.name, images.classes
        self.image_shape = files.shape[-3:]
        self.channels, self.resolution, _ = self.image_shape
        self._files, self._mirrored = files, mirrored
        self._views = 2 if mirrored else 1  # of those in the files
        self.nbytes = len(images) * files.image_bytes * self._views // files.shape[1]
        self._blocks = [files.read(block)[:, : self._views] for block in range(files.num_blocks)]
        self.bad = {i: why for block in range(files.num_blocks) for i, why in files.bad_images(block).items()}

    def __reduce__(self) -> tuple:
        # A DataLoader's worker that is not forked opens the files itself: pickled, the blocks are all that is in them
        return LatentDataset, (self.pixels, self._files, self._mirrored)

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.image_or_next(index)[0]

    @property
    def bad_images(self) -> list[int]:
        return sorted(self.bad)

    # What it shares with the images

    def labels(self, classes: list[str] | None = None) -> torch.Tensor:
        """See `ImageDataset.labels`."""
        return self.pixels.labels(classes)

    def describe(self) -> str:
        """One line: of what size the latents are, and what the images are."""
        return f"latents {'x'.join(map(str, self.image_shape))} of {self.pixels.describe()}"

    def contents(self) -> dict[str, Any]:
        """See `ImageDataset.contents`."""
        return self.pixels.contents()

    def fingerprint(self) -> str:
        """That of the images, and a checksum of the VAE's identity."""
        vae = json.dumps(self._files.settings["vae"], sort_keys=True)
        return f"{self.pixels.fingerprint()}-{zlib.crc32(vae.encode()):08x}"

    def add_note(self, note: str) -> None:
        """See `ImageDataset.add_note`."""
        self.pixels.add_note(note)

    def note_bad_images(self, indices: Iterable[int]) -> None:
        """All are known: a stream of latents finds no others."""

    # Moments

    def image_or_next(self, index: int) -> tuple[torch.Tensor, list[int]]:
        """Moments [V, 2, C, h, w] of image `index`, and []. If that is bad: those of the first good image from `index`
        on, going round, and the list of the bad indices passed over."""
        index, passed_over = range(len(self))[index], []  # the range resolves -1, and raises IndexError
        while index in self.bad:
            passed_over.append(index)
            index = (index + 1) % len(self)
        block, row = divmod(index, self._files.images_per_block)
        return torch.tensor(self._blocks[block][row]), passed_over

    def sample(self, count: int = 512) -> torch.Tensor:
        """Latents of up to `count` of the images, evenly spaced through the data set, and always the same: float32
        [N, C, h, w]."""
        spacing = max(len(self) / count, 1)
        moments = torch.stack([self[int(i * spacing)] for i in range(min(count, len(self)))])
        noise = torch.randn(len(moments), *self.image_shape, generator=torch.Generator().manual_seed(0))
        flips = torch.arange(len(moments)) % 2 == 1 if moments.shape[1] == 2 else None  # half of each, as in training
        return sample_posterior(moments, noise, flips)

    @staticmethod
    def to_inputs(
        batch: torch.Tensor, flips: torch.Tensor | None, draw: Callable[[torch.Size], torch.Tensor]
    ) -> torch.Tensor:
        """`sample_posterior` of moments [B, V, 2, C, h, w], with noise that `draw` makes of a shape."""
        return sample_posterior(batch, draw(batch[:, 0, 0].shape), flips)

    def random_sample(self, count: int) -> tuple[torch.Tensor, list[int]]:
        """Moments [N, V, 2, C, h, w] of the images that `ImageDataset.random_sample` chooses, and their N indices."""
        indices = [i for i in self.pixels.random_order().tolist() if i not in self.bad][:count]
        return torch.stack([self[i] for i in indices]), indices

    def decode_all(self, num_workers: int | None = None, show_progress: bool = True) -> torch.Tensor:
        """Read all the moments: float16 [N, V, 2, C, h, w], in the order of the dataset, without `bad_images`.

        Args:
            num_workers: of no use here.
            show_progress: draw a progress bar.
        """
        shape = (len(self) - len(self.bad), self._views, *self._files.shape[2:])
        all_moments, start = torch.empty(shape, dtype=torch.float16), 0
        settings = {"desc": f"Reading the latents of {self.name}", "unit": "file", "delay": NOTICEABLE_SECONDS}
        for block, moments in enumerate(progress_bar(self._blocks, **settings, disable=not show_progress)):
            good = [row for row, i in enumerate(self._files.images_of(block)) if i not in self.bad]
            all_moments[start : start + len(good)] = torch.from_numpy(moments[good])
            start += len(good)
        return all_moments


def sample_posterior(moments: torch.Tensor, noise: torch.Tensor, flips: torch.Tensor | None = None) -> torch.Tensor:
    """Latents of images, or of their mirror images: mean + standard deviation * noise, float32 [B, C, h, w].

    Args:
        moments: [B, V, 2, C, h, w].
        noise: standard normal, [B, C, h, w].
        flips: bool [B], or None; where True, the latent is that of the mirror image.

    Raises:
        ValueError: flips of moments that have no mirror images.
    """
    if flips is None:
        moments = moments[:, 0]
    elif moments.shape[1] == 2:
        moments = torch.where(flips[:, None, None, None, None], moments[:, 1], moments[:, 0])
    else:
        raise ValueError("these latents are not of mirror images too: encode them with mirrored=True")
    mean, std = moments.float().unbind(1)
    return mean + std * noise
