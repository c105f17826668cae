"""A run tried out on stand-ins, so that what cannot work is refused before any data is read."""

import json
import logging

import psutil
import torch
from accelerate import Accelerator, DistributedType

from images import latent_shape
from pipelines.checks import vae_factor
from samplers import NoiseSchedule

from .hub import HubUpload
from .memory import warn_of_memory
from .methods import build_sampler
from .network import build_network, check_network, network_class
from .noise_schedule import build_noise_scheduler
from .options import ClassOptions, ModelOptions, TrainingOptions
from .output import OutputDir
from .resuming import Start, check_same_network, check_same_vae, find_start
from .saved_config import load_network_config
from .vae import load_vae_config

logger = logging.getLogger(__name__)

CHANNELS = {"L": 1, "RGB": 3, "auto": 3}


def check_run(options: TrainingOptions, accelerator: Accelerator) -> tuple[OutputDir, HubUpload, Start]:
    """Refuse what can be seen to be wrong without the data; nothing is changed. Returns where the run writes to, where
    it uploads to, and where it begins.

    Raises:
        ValueError: naming the flag.
    """
    output = OutputDir(options.output_dir)
    hub = HubUpload(options, output, options.logging_dir)
    start = find_start(options, output, accelerator)
    if accelerator.is_main_process:
        hub.check()
        warn_of_other_network(options)
        warn_of_class_dropout(options)
    plan_run(options)
    check_same_network(options, start)
    check_same_vae(options, start)
    if accelerator.device.type == "cuda":
        check_gpu_memory(options, accelerator)
    return output, hub, start


def check_gpu_memory(options: TrainingOptions, accelerator: Accelerator) -> None:
    """Warn of a network and a batch that will probably not fit into the GPU."""
    channels, resolution = stand_in_shape(options)
    with torch.device("meta"):
        network = build_network(options, channels, resolution, stand_in_classes(options))
    total = torch.cuda.get_device_properties(accelerator.device).total_memory
    is_half = accelerator.mixed_precision in ("bf16", "fp16")
    num_shards = accelerator.num_processes if accelerator.distributed_type == DistributedType.FSDP else 1
    shape = channels, resolution, resolution
    warn_of_memory(network, shape, options.train_batch_size, is_half, total, num_shards)


def warn_of_other_network(options: ModelOptions) -> None:
    """Say that settings have no effect, being of a network that is not trained; a recipe may have both."""
    other = "unet" if options.is_dit else "dit"
    if settings := getattr(options, other):
        logger.warning(f"--{other} {json.dumps(settings)}: has no effect, since --model is {options.model}")


def warn_of_class_dropout(options: ClassOptions) -> None:
    """Say that a share of withheld labels has no effect where there are none; the default is no wish of the user's."""
    if not options.class_conditional and options.class_dropout != ClassOptions.class_dropout:
        logger.warning(f"--class_dropout {options.class_dropout:g}: has no effect without --class_conditional")


def plan_run(options: TrainingOptions) -> None:
    """Try the network, the chains of sampling and the timestep sampler, with noise in place of images or latents.

    Their size and colours are those that the options say, where they do.

    Raises:
        ValueError: naming the flag that leads to something that cannot work.
    """
    schedule = NoiseSchedule.from_scheduler(build_noise_scheduler(options, options.planned_num_steps))
    channels, resolution = stand_in_shape(options)
    # Without either, the images decide how many levels a U-Net has
    has_levels = options.resolution or options.model_config_name_or_path or "block_out_channels" in options.unet
    with torch.random.fork_rng(devices=[]):
        check_batch_memory(options, channels, resolution)
        if has_levels or options.is_dit:
            check_network(options, channels, resolution, stand_in_classes(options))
        images = torch.randn(8, channels, min(resolution, 64), min(resolution, 64)).clamp(-1, 1)
        sampler = build_sampler(options, schedule, lambda: images, options.seed, "cpu")
        try:
            sampler.noise(images)
            timesteps, weights = sampler.sample(8, images=images)
            sampler.update(timesteps, torch.ones(8) * weights)
        except Exception as error:
            raise ValueError(
                f"--timestep_sampler_options {dict(options.timestep_sampler_options)}: {type(error).__name__}: {error}"
            ) from error


def stand_in_classes(options: TrainingOptions) -> int | None:
    """A number of classes that the options would allow; the data may have another. None without classes."""
    if not options.class_conditional:
        return None
    num_class_embeds = options.unet.get("num_class_embeds")
    return num_class_embeds - 1 if isinstance(num_class_embeds, int) and num_class_embeds > 1 else 10


def stand_in_shape(options: TrainingOptions) -> tuple[int, int]:
    """(C, side) of images that the options would allow, or of their latents; the images themselves may be others.

    Raises:
        ValueError: images that the VAE does not take.
    """
    if options.vae is None:
        settings = options.dit if options.is_dit else options.unet
        channels, size = settings.get("in_channels"), settings.get("sample_size")
        if options.image_mode != "auto" or channels not in (1, 3):
            channels = CHANNELS[options.image_mode]
        if options.resolution:
            return channels, options.resolution
        return channels, size if type(size) is int and size > 0 else stand_in_resolution(options)
    config = load_vae_config(options.vae)
    channels = config["in_channels"] if options.image_mode == "auto" else CHANNELS[options.image_mode]
    resolution = options.resolution or stand_in_resolution(options) * vae_factor(config)
    return latent_shape(config, channels, resolution)[:2]


def stand_in_resolution(options: TrainingOptions) -> int:
    """A side that the network can halve as often as it has levels, or divide into patches."""
    saved = {}
    if options.model_config_name_or_path:
        saved = load_network_config(options.model_config_name_or_path, network_class(options))
    if options.is_dit:
        patch_size = (saved | options.dit).get("patch_size")
        return 8 * patch_size if type(patch_size) is int and 0 < patch_size < 2**12 else 32
    widths = (saved | options.unet).get("block_out_channels", ())
    return max(32, 2 ** min(len(widths), 12)) if isinstance(widths, list | tuple) else 32


def check_batch_memory(options: TrainingOptions, channels: int, resolution: int) -> None:
    """Refuse a batch whose images alone, in float32, do not fit into the machine's memory. Raises ValueError."""
    images = options.train_batch_size * options.gradient_accumulation_steps
    needed, there = 4 * images * channels * resolution**2, psutil.virtual_memory().total
    if needed > there:
        raise ValueError(
            f"--train_batch_size {options.train_batch_size} times --gradient_accumulation_steps "
            f"{options.gradient_accumulation_steps}: {images:,} images of {resolution}x{resolution} take "
            f"{needed / 1e9:,.0f} GB, and this machine has {there / 1e9:,.0f} GB"
        )
