"""The latents of a run's images, encoded once."""

import hashlib
import json
import logging
import time
from contextlib import ExitStack
from pathlib import Path

import datasets
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from diffusers import AutoencoderKL

from images import ImageDataset, LatentDataset, latent_shape, open_latents

from .clock import PhaseClock
from .folder_lock import FolderInUse, folder_lock
from .options import TrainingOptions
from .vae import identify_vae, load_vae

logger = logging.getLogger(__name__)

CACHE = "adaptive_ddpm_latents"  # beside the data sets'


def encode_images(
    options: TrainingOptions,
    accelerator: Accelerator,
    dataset: ImageDataset,
    validation_images: ImageDataset | None,
    clock: PhaseClock,
) -> tuple[AutoencoderKL | None, ImageDataset | LatentDataset, ImageDataset | LatentDataset | None]:
    """(The VAE, latents to train on, those to measure the validation loss on or None); without `--vae`: None, and the
    images themselves.

    They are read where they have been encoded before. All processes must call it, and share the work.

    Raises:
        ValueError: images that the VAE does not take, or `--latents_dir` holds something else.
        OSError: they cannot be written.
    """
    if options.vae is None:
        return None, dataset, validation_images
    vae = load_vae(options.vae)
    latent_shape(vae.config, dataset.channels, dataset.resolution)
    identity = identify_vae(vae)
    vae.to(accelerator.device)

    def encode(images: ImageDataset, part: str) -> LatentDataset:
        folder = latents_folder(options, images, part, identity)
        with ExitStack() as held:
            lock_when_free(held, folder, accelerator)
            latents = open_latents(
                images,
                vae,
                folder,
                identity=identity,
                mirrored=options.random_flip,
                device=accelerator.device,
                rank=accelerator.process_index,
                world_size=accelerator.num_processes,
                wait=accelerator.wait_for_everyone,
                show_progress=accelerator.is_local_main_process,
            )
            accelerator.wait_for_everyone()
            return latents

    with clock.phase("encode"):
        latents = encode(dataset, "train")
        validation_latents = None if validation_images is None else encode(validation_images, "validation")
    accelerator.print(latents.describe())
    return vae, latents, validation_latents


def lock_when_free(held: ExitStack, folder: Path, accelerator: Accelerator) -> None:
    """Wait until no other run encodes into the folder, which is then there to be read; the main process holds it.

    All processes ask again and again: in one barrier until the end the others would run into its timeout.
    """
    is_said = False
    while in_use := broadcast_object_list([lock_if_free(held, folder) if accelerator.is_main_process else None])[0]:
        if accelerator.is_main_process and not is_said:
            logger.warning(f"waiting: {in_use}")
        is_said = True
        time.sleep(1)


def lock_if_free(held: ExitStack, folder: Path) -> str | None:
    """Hold the folder, or say who does."""
    try:
        held.enter_context(folder_lock(folder, "--latents_dir"))
    except FolderInUse as error:
        return str(error)


def latents_folder(options: TrainingOptions, images: ImageDataset, part: str, identity: dict) -> Path:
    """Of a part of `--latents_dir`; by default of the cache, where each data set, part, size and VAE has its own."""
    if options.latents_dir:
        return Path(options.latents_dir).expanduser() / part
    made_of = {**identity, "images": images.fingerprint(), "shape": images.image_shape, "mirrored": options.random_flip}
    made_of["white_levels"] = images.settings["white_levels"]
    key = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:16]
    return Path(options.cache_dir or datasets.config.HF_DATASETS_CACHE) / CACHE / key
