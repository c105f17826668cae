"""The options of generate.py: named, explained, and checked as far as that goes without the weights."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import psutil
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from transformers.hf_argparser import HfArg

from generation.labels import BALANCED, ImageLabels, parse_labels
from images.records import GRID
from pipelines import SCHEDULERS, check_variant, denoising_steps, load_configs, sample_shape
from pipelines.denoising import Step
from pipelines.sampling import guidance_scales
from recipes import check_ranges, parse_options

DTYPES = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}
HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")
MAX_IMAGES = 2**32  # as many numbers of images as there are; the last batch is padded with the next ones
BYTES_PER_BLOCK = 200  # a Python range and its bounds
RANGES = {
    "num_images": "[1, 2**32)",
    "batch_size": "[1, 2**32)",
    "grid_images": "[0, 10000]",  # a picture of 6,500 pixels a side, at least
    "seed": "[0, 2**32)",
    "eta": "[0, 1]",
    "guidance_scale": "[0, inf)",
    "guidance_channels": "[1, 2**16]",
}


@dataclass
class OutputOptions:
    """What is sampled from, and where it goes. --pipeline and --output_dir are required."""

    _argument_group_name = "Pipeline and output"

    config: str | None = HfArg(default=None, help="A recipe (YAML) of these options; flags override it.")
    pipeline: str | None = HfArg(default=None, help="Folder or Hub id; with a DDPM or DDIM scheduler; required.")
    variant: str | None = HfArg(default=None, help="Of its weights, as in diffusers: fp16 for *.fp16.safetensors.")
    output_dir: str | None = HfArg(default=None, help="Where the images go; made when missing; required.")
    overwrite_output_dir: bool = HfArg(default=False, help="Delete images made with other settings, and nothing else.")
    num_images: int = HfArg(default=64, help="How many images. More than before extends the folder.")
    batch_size: int = HfArg(default=64, help="Images per network call and process; the last are padded.")
    format: Literal["png", "npz", "parquet"] = HfArg(default="png", help="npz: all in one file, as ADM's.")
    grid_images: int = HfArg(default=64, help=f"Images in {GRID}; 0 for no grid.")


@dataclass
class SamplingOptions:
    """How an image comes about."""

    _argument_group_name = "Sampling"

    seed: int = HfArg(default=0, help="Names the series of images, in [0, 2**32).")
    sampler: Literal["ddpm", "ddim"] = HfArg(
        default="ddpm", help="Random steps (ddpm), or fixed ones (ddim, at --eta 0); of any pipeline."
    )
    num_inference_steps: int | None = HfArg(default=None, help="Default: all trained ones for ddpm, 100 for ddim.")
    skip_schedule: Literal["uniform", "quadratic"] = HfArg(
        default="uniform", help="Where the steps are; quadratic: more at low noise."
    )
    eta: float = HfArg(default=0.0, help="ddim only: 0 deterministic to 1 as in DDPM.")
    mixed_precision: Literal["no", "bf16", "fp16"] = HfArg(default="no", help="Autocast of the network.")
    compile: bool = HfArg(default=False, help="torch.compile the network; on a GPU with CUDA graphs.")


@dataclass
class ClassOptions:
    """What a class-conditional model is asked for."""

    _argument_group_name = "Classes and guidance, of a class-conditional model"

    class_labels: list[str] | None = field(
        default=None,
        metadata={
            "help": f"Names or numbers, in turn; {BALANCED}, the default: image i is of class i mod N, of N classes."
        },
    )
    guidance_scale: float = HfArg(default=1.0, help="Classifier-free guidance; 1: none, any other takes twice as long.")
    guidance_interval: list[float] | None = field(
        default=None,
        metadata={"help": "LOW HIGH: guide at noise levels LOW < sigma <= HIGH only; default: at all of them."},
    )
    guidance_channels: int | None = HfArg(
        default=None, help="Guide the first channels only, as DiT's code does with 3 of 4 latent ones; default: all."
    )


@dataclass
class GenerationOptions(OutputOptions, SamplingOptions, ClassOptions):
    """All of a run's."""

    _recipe_block = "generate"

    def __post_init__(self):
        for name in ("pipeline", "output_dir"):
            if getattr(self, name) is None:
                raise ValueError(f"--{name} is required (--help lists the flags)")
        check_ranges(self, RANGES)
        if self.num_images + self.batch_size > MAX_IMAGES:
            raise ValueError(
                f"--num_images {self.num_images} and --batch_size {self.batch_size} must add up to {MAX_IMAGES} at most"
            )
        if self.eta and self.sampler != "ddim":
            raise ValueError(f"--eta {self.eta} belongs to --sampler ddim, not {self.sampler}")
        if self.guidance_interval is not None:
            check_guidance_interval(self.guidance_interval, self.guidance_scale)


def check_guidance_interval(interval: list[float], guidance_scale: float) -> None:
    """Refuse what is no interval of noise levels, and one of no effect.

    Raises:
        ValueError: naming the flag.
    """
    given = "--guidance_interval " + " ".join(map(str, interval))
    if len(interval) != 2 or not 0 <= interval[0] <= interval[1]:
        raise ValueError(f"{given}: must be two noise levels, LOW HIGH, with 0 <= LOW <= HIGH")
    if guidance_scale == 1:
        raise ValueError(f"{given} needs a --guidance_scale other than 1, which is no guidance")


def why_unreadable(folder: Path) -> str:
    """What is wrong with a pipeline of which a file cannot be found: a phrase."""
    if not folder.exists():
        return "there is no such folder, and on the Hugging Face Hub it cannot be read"
    if (folder / "manifest.json").exists():
        return "is a checkpoint of training; the pipeline is saved in the folder above it, at the end"
    return "is not the folder of a whole pipeline, or cannot be read"


def read_options(argv: Sequence[str] | None, device: torch.device) -> tuple[GenerationOptions, ImageLabels | None]:
    """The options, checked against the pipeline's configs, with the default number of steps filled in; and the images'
    classes, None of an unconditional model.

    Raises:
        ValueError, NotImplementedError, OSError: the message names the option at fault.
    """
    options = parse_options(GenerationOptions, argv)
    if options.mixed_precision == "fp16" and device.type == "cpu":
        raise ValueError("--mixed_precision fp16 needs a GPU; on a CPU use bf16 or no")
    if not Path(options.pipeline).is_dir() and not HUB_ID.fullmatch(options.pipeline):
        raise ValueError(f"--pipeline {options.pipeline}: no such folder, and no Hub id, which is owner/name")
    try:
        configs = load_configs(options.pipeline)
        check_variant(options.pipeline, options.variant)
    except OSError as error:
        raise ValueError(
            f"--pipeline {options.pipeline}: {why_unreadable(Path(options.pipeline))} ({error})"
        ) from error
    except (ValueError, NotImplementedError) as error:
        raise ValueError(f"--pipeline {error}") from error
    shape, scheduler = configs.image_shape, configs.scheduler
    if shape[0] not in (1, 3):
        raise ValueError(f"--pipeline {options.pipeline} makes {shape[0]} channels, not grey or RGB")
    check_memory(options, shape)
    trained = scheduler.config.num_train_timesteps
    if options.num_inference_steps is None:
        options.num_inference_steps = trained if options.sampler == "ddpm" else min(100, trained)
    check_ranges(options, {"num_inference_steps": f"[1, {trained}]"})
    scheduler = SCHEDULERS[options.sampler].from_config(scheduler.config)
    steps = denoising_steps(scheduler, options.num_inference_steps, options.eta, options.skip_schedule)
    if options.guidance_interval:
        check_interval(scheduler, steps, options.guidance_interval)
    labels = choose_classes(options, configs.id2label)
    check_guidance_channels(options, sample_shape(configs.network)[0])
    return options, labels


def check_guidance_channels(options: ClassOptions, channels: int) -> None:
    """Refuse more than the network has, and a number of no effect. Raises ValueError."""
    given = f"--guidance_channels {options.guidance_channels}"
    if options.guidance_channels is None:
        return
    if options.guidance_scale == 1:
        raise ValueError(f"{given} needs a --guidance_scale other than 1, which is no guidance")
    if options.guidance_channels > channels:
        raise ValueError(f"{given}: the network has {channels}")


def check_interval(scheduler: DDPMScheduler | DDIMScheduler, steps: list[Step], interval: list[float]) -> None:
    """Refuse an interval that no step is in: guidance would be asked for, and have no effect. Raises ValueError."""
    if set(guidance_scales(scheduler, steps, scale=2.0, interval=(interval[0], interval[1]))) == {1.0}:
        low, high = interval
        raise ValueError(f"--guidance_interval {low} {high}: none of the {len(steps)} steps is at such a noise level")


def choose_classes(options: ClassOptions, id2label: dict[int, str] | None) -> ImageLabels | None:
    """The images' classes; ValueError, which names the option, where the model has none, or not the one asked for."""
    if id2label is None:
        for name, default in (("class_labels", None), ("guidance_scale", 1)):
            if (value := getattr(options, name)) != default:
                given = " ".join(value) if isinstance(value, list) else value
                raise ValueError(f"--{name} {given} needs a class-conditional model, and this one is unconditional")
        return None
    try:
        return parse_labels(options.class_labels, id2label)
    except ValueError as error:
        raise ValueError(f"--class_labels: {error}") from error


def check_memory(options: GenerationOptions, shape: tuple[int, int, int]) -> None:
    """Refuse what a typing error asks for before it exhausts the memory: a batch of images [C, H, W], or the list of
    blocks."""
    available = psutil.virtual_memory().available
    num_blocks = math.ceil(options.num_images / options.batch_size)
    needs = {"batch_size": 4 * options.batch_size * math.prod(shape), "num_images": BYTES_PER_BLOCK * num_blocks}
    for name, needed in needs.items():
        if needed > available:
            raise ValueError(
                f"--{name} {getattr(options, name)} needs {needed / 1e9:,.1f} GB of memory, of which "
                f"{available / 1e9:,.1f} are available"
            )
