"""generation.json: what decides what an image looks like, and how fast the images came."""

import json
import os
from pathlib import Path
from typing import Any

import accelerate
import diffusers
import torch
from accelerate import PartialState
from diffusers import DDIMScheduler, DDPMScheduler, DiffusionPipeline, ModelMixin

from generation.labels import ImageLabels
from generation.options import GenerationOptions
from generation.writing import write_atomically
from images.records import RECORD, read_record
from pipelines import network_of, vae_of
from pipelines.checks import without_private
from pipelines.weights import hash_weights

SETTINGS = (  # options that decide what image i looks like, or which files hold it
    "sampler",
    "num_inference_steps",
    "skip_schedule",
    "eta",
    "seed",
    "batch_size",
    "format",
    "mixed_precision",
    "compile",
)


def write_record(folder: Path, **new: Any) -> None:
    """Store what is known of this run over what an earlier run into the same folder has left."""
    record = (read_record(folder) or {}) | new
    write_atomically(folder / RECORD, lambda file: file.write((json.dumps(record, indent=2) + "\n").encode()))


def describe_settings(
    options: GenerationOptions, pipeline: DiffusionPipeline, labels: ImageLabels | None
) -> dict[str, Any]:
    """All that decides what image i looks like, as JSON has it; two runs into one folder must agree on it."""
    scheduler, path = pipeline.scheduler, Path(options.pipeline)
    return {
        "pipeline": str(path.resolve()) if path.is_dir() else options.pipeline,
        "weights": fingerprint(network_of(pipeline)),
        **({"vae": fingerprint(vae)} if (vae := vae_of(pipeline)) is not None else {}),
        "scheduler": {"class": type(scheduler).__name__, **without_private(json.loads(scheduler.to_json_string()))},
        # Earlier versions had DDIM's steps along the network's own epsilon
        **({"use_clipped_model_output": True} if steps_from_the_clipped(scheduler) else {}),
        **{name: getattr(options, name) for name in SETTINGS},
        **(describe_classes(options, labels) if labels else {}),
        "device": pipeline.device.type,
    }


def steps_from_the_clipped(scheduler: DDPMScheduler | DDIMScheduler) -> bool:
    """Whether it matters to the chain that DDIM goes on along the noise of the clipped image."""
    return isinstance(scheduler, DDIMScheduler) and scheduler.config.clip_sample


def describe_classes(options: GenerationOptions, labels: ImageLabels) -> dict[str, Any]:
    """The settings that a class-conditional model has beside the others."""
    interval = options.guidance_interval  # as text: JSON has no infinity
    return {
        **labels.to_settings(),
        "guidance_scale": options.guidance_scale,
        "guidance_interval": interval and "({}, {}]".format(*interval),
        "guidance_channels": options.guidance_channels,
    }


def fingerprint(network: ModelMixin) -> str:
    """SHA-256 of a network's config and weights."""
    return hash_weights(network, json.dumps(without_private(network.config), sort_keys=True))


def differences(record: dict[str, Any] | None, num_images: int, settings: dict[str, Any]) -> list[str]:
    """What keeps a run from going on in a folder with this record (or None), in words."""
    if record is None:
        return []
    old = record["settings"]
    differ = [f"{name} was {old.get(name)!r}, now {new!r}" for name, new in settings.items() if old.get(name) != new]
    if num_images < record["num_images"]:
        differ.append(f"num_images was {record['num_images']}, now {num_images}")
    return differ


def describe_run(state: PartialState, new_images: int, seconds: float) -> dict[str, Any]:
    """How fast the new images came, and on what; {} if there were none."""
    if not new_images:
        return {}
    kind = state.device.type
    return {
        "images_per_second": new_images / seconds,
        "seconds": seconds,
        "new_images": new_images,
        "hardware": torch.cuda.get_device_name() if kind == "cuda" else f"{kind}, {os.cpu_count()} cores",
        "num_processes": state.num_processes,
        "num_threads": torch.get_num_threads(),
        "versions": {module.__name__: module.__version__ for module in (torch, diffusers, accelerate)},
    }
