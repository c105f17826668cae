"""A pipeline in, a folder of images out: OUT/images/ (or OUT/images.npz), OUT/grid.png and OUT/generation.json.

accelerate launch generate.py --pipeline DIR_OR_HUB_ID --num_images 10000 --output_dir OUT
accelerate launch --config_file accelerate_configs/cpu.yaml --num_processes 2 generate.py ...   # several on a CPU

Image i depends on the weights, the seed and i, not on how many processes share the work. A killed run goes on where
it stopped when the same command is given again, and ends with the same files; a larger --num_images extends the
folder. With another batch size or device the network rounds differently, so these are settings that a folder keeps.
"""

import hashlib
import json
import os
import re
import sys
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Literal

import accelerate
import diffusers
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, parse_flag_from_env
from diffusers import DDIMScheduler, DDPMScheduler
from tqdm.auto import tqdm
from transformers.hf_argparser import HfArg

from images.records import RECORD, read_record
from pipelines import (
    UnconditionalPipeline,
    choose_kernels,
    denoising_steps,
    load_configs,
    make_grid_image,
)
from pipelines.image_files import FORMATS, Writer, write_atomically
from recipes import one_line_errors, parse_options

SCHEDULERS = {"ddpm": DDPMScheduler, "ddim": DDIMScheduler}
DTYPES = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}
HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")
GRID = "grid.png"
OUR_FILES = re.compile(
    r"(generation\.json|grid\.png|images\.npz|images/(\d{6,}\.png|\d{6,}-\d{6,}\.(npz|parquet)))(\.tmp)?"
)


@dataclass
class GenerationOptions:
    """--pipeline and --output_dir are required."""

    config: str | None = HfArg(default=None, help="A recipe (YAML) of these options; flags override it.")
    pipeline: str | None = HfArg(default=None, help="Folder or Hub id of a UNet2DModel with a DDPM or DDIM scheduler.")
    output_dir: str | None = HfArg(default=None, help="Where the images go; made when missing.")
    overwrite_output_dir: bool = HfArg(default=False, help="Delete images made with other settings, and nothing else.")
    num_images: int = HfArg(default=64, help="How many images. More than before extends the folder.")
    batch_size: int = HfArg(default=64, help="Images per network call and process; the last are padded.")
    seed: int = HfArg(default=0, help="Names the series of images, in [0, 2**32).")
    format: Literal["png", "npz", "parquet"] = HfArg(default="png", help="npz: all in one file, as ADM's.")
    grid_images: int = HfArg(default=64, help=f"Images in {GRID}; 0 for no grid.")

    # Sampling
    sampler: Literal["ddpm", "ddim"] = HfArg(default="ddpm", help="Need not be the saved one.")
    num_inference_steps: int | None = HfArg(default=None, help="Default: all trained ones for ddpm, 100 for ddim.")
    skip_schedule: Literal["uniform", "quadratic"] = HfArg(default="uniform", help="quadratic: more near the image.")
    eta: float = HfArg(default=0.0, help="ddim only: 0 deterministic to 1 as in DDPM.")
    mixed_precision: Literal["no", "bf16", "fp16"] = HfArg(default="no", help="Autocast of the network.")
    compile: bool = HfArg(default=False, help="torch.compile the network; on a GPU with CUDA graphs.")

    def __post_init__(self):
        for name in ("pipeline", "output_dir"):
            if getattr(self, name) is None:
                raise ValueError(f"--{name} is required (--help lists the flags)")
        for name, least in (("num_images", 1), ("batch_size", 1), ("grid_images", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"--{name} {getattr(self, name)} must be {least} or more")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"--seed {self.seed} must be in [0, 2**32)")
        if self.eta and self.sampler != "ddim":
            raise ValueError(f"--eta {self.eta} belongs to --sampler ddim, not {self.sampler}")


def main(argv=None):
    # Without a GPU, processes find each other only when told that they are on the CPU. One may finish long before
    # another: the default timeout of ten minutes would end the run.
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    state = PartialState(cpu=cpu, timeout=timedelta(days=1))

    # Refuse what cannot work before any weights are read
    options = on_main(state, lambda: read_options(argv, state.device))
    folder = Path(options.output_dir)

    # The model, and what is left to do
    with state.main_process_first(), one_line_errors(ValueError, OSError):
        pipeline = UnconditionalPipeline.from_pretrained(options.pipeline).to(state.device)
    pipeline.scheduler = SCHEDULERS[options.sampler].from_config(pipeline.scheduler.config)
    # Blocks are all of one shape: a GPU can replay the network's kernels as a CUDA graph
    choose_kernels(pipeline.unet, state.device, options.mixed_precision, options.compile, mode="reduce-overhead")
    files = FORMATS[options.format](folder, options.num_images, options.batch_size)
    todo = on_main(state, lambda: prepare_folder(folder, options, pipeline, files))

    start = time.perf_counter()
    with one_line_errors(OSError):
        sample_blocks(pipeline, options, files, todo, state)
    state.wait_for_everyone()
    seconds, new = time.perf_counter() - start, sum(map(len, todo))

    on_main(state, lambda: finish_folder(folder, options, files, describe_run(state, new, seconds)))
    state.print(f"{options.num_images} images in {folder} ({new} new in {seconds:.1f} s)")
    state.destroy_process_group()


def on_main(state, function):
    """Run `function` on the main process; all processes return its result, or exit when it fails, with one message."""
    result, code = None, None
    if state.is_main_process:
        try:
            with one_line_errors(ValueError, NotImplementedError, OSError):
                result = function()
        except SystemExit as error:
            code = error.code
    result, status = broadcast_object_list([result, 1 if isinstance(code, str) else code])
    if status is not None:
        sys.exit(code if state.is_main_process else status)
    return result


def sample_blocks(pipeline, options, files, todo, state):
    """Sample this process's share of the blocks `todo`: every n-th one, written while the next one is sampled."""
    is_main, dtype = state.is_main_process, DTYPES[options.mixed_precision]
    done = options.num_images - sum(map(len, todo))
    bar = tqdm(total=options.num_images, initial=done, unit="image", disable=not is_main, desc="generating")
    pipeline.set_progress_bar_config(leave=False, position=1, disable=not is_main or not sys.stderr.isatty())
    with bar, Writer(limit=2 * len(files.names(files.blocks[0]))) as writer:
        for block in todo[state.process_index :: state.num_processes]:
            # Always a whole block, the next images of the series being the padding: the network's rounding depends
            # on the shape of its batch, so an image must not depend on whether it is among the last.
            indices = range(block.start, block.start + options.batch_size)
            with torch.autocast(state.device.type, dtype=dtype, enabled=dtype is not None):
                images = pipeline.sample(
                    indices, options.seed, options.num_inference_steps, options.eta, options.skip_schedule
                )
            for path, write in files.parts(block, images[: len(block)].cpu()):
                writer.submit(path, write)
            bar.update(min(len(block) * state.num_processes, bar.total - bar.n))  # the others go at about this pace


# ---------------------------------------------------------------------------------------------------- options


def read_options(argv, device):
    """The options, checked as far as that goes without the weights, with the default number of steps filled in.

    Raises:
        ValueError, NotImplementedError, OSError: the message names the option at fault.
    """
    options = parse_options(GenerationOptions, argv)
    if options.mixed_precision == "fp16" and device.type == "cpu":
        raise ValueError("--mixed_precision fp16 needs a GPU; on a CPU use bf16 or no")
    if not Path(options.pipeline).is_dir() and not HUB_ID.fullmatch(options.pipeline):
        raise ValueError(f"--pipeline {options.pipeline}: no such folder, and no Hub id, which is owner/name")
    try:
        unet_config, scheduler = load_configs(options.pipeline)
    except OSError as error:
        raise ValueError(f"--pipeline {options.pipeline} is no pipeline's folder or Hub id: {error}") from error
    channels = unet_config.get("in_channels", 3)
    if channels not in (1, 3):
        raise ValueError(f"--pipeline {options.pipeline} makes {channels} channels, not grey or RGB")
    scheduler = SCHEDULERS[options.sampler].from_config(scheduler.config)
    if options.num_inference_steps is None:
        trained = scheduler.config.num_train_timesteps
        options.num_inference_steps = trained if options.sampler == "ddpm" else min(100, trained)
    denoising_steps(scheduler, options.num_inference_steps, options.eta, options.skip_schedule)
    check_folder(Path(options.output_dir), options.overwrite_output_dir)
    return options


def check_folder(folder, overwrite):
    """Refuse a folder with files of others, or at least with files that could be taken for ours."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output_dir {folder} is a file")
    names = sorted(set(os.listdir(folder)) - {RECORD + ".tmp"}) if folder.exists() else []
    if not names or read_record(folder):
        return
    if not overwrite:
        raise ValueError(
            f"--output_dir {folder} is not empty ({names[0]}, ...) and has no {RECORD} of ours: "
            "choose another folder, or give --overwrite_output_dir, which leaves foreign files alone"
        )
    for name in ("images", "images.npz", GRID, RECORD):
        if name in names:
            raise ValueError(
                f"--output_dir {folder} has {name}, which generate.py did not write (there is no {RECORD} of ours): "
                "choose another folder"
            )


# ----------------------------------------------------------------------------------------------------- folder


def describe_settings(options, pipeline):
    """All that decides what image i looks like, as JSON has it; two runs into one folder must agree on it."""
    scheduler, path = pipeline.scheduler, Path(options.pipeline)
    names = "sampler num_inference_steps skip_schedule eta seed batch_size format mixed_precision compile"
    return {
        "pipeline": str(path.resolve()) if path.is_dir() else options.pipeline,
        "weights": fingerprint(pipeline.unet),
        "scheduler": {"class": type(scheduler).__name__, **public(json.loads(scheduler.to_json_string()))},
        **{name: getattr(options, name) for name in names.split()},
        "device": pipeline.device.type,
    }


def fingerprint(unet):
    """SHA-256 of the U-Net's config and weights."""
    digest = hashlib.sha256(json.dumps(public(unet.config), sort_keys=True).encode())
    for name, tensor in sorted(unet.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def public(config):
    """A diffusers config without the entries about versions and folders."""
    return {name: value for name, value in config.items() if not name.startswith("_")}


def write_record(folder, **new):
    """Store what is known of this run over what an earlier run into the same folder has left."""
    record = (read_record(folder) or {}) | new
    write_atomically(folder / RECORD, lambda file: file.write((json.dumps(record, indent=2) + "\n").encode()))


def prepare_folder(folder, options, pipeline, files):
    """Store the settings, clear what a killed run left half done, and return the blocks still to sample."""
    settings = describe_settings(options, pipeline)
    folder.mkdir(parents=True, exist_ok=True)
    if differ := differences(read_record(folder), options.num_images, settings):
        if not options.overwrite_output_dir:
            raise ValueError(
                f"--output_dir {folder} holds images made otherwise: {'; '.join(differ)}. "
                "Choose another folder, or give --overwrite_output_dir to delete them"
            )
        for path in our_files(folder):
            if path.name != RECORD:  # a run killed here leaves a folder that is still known as ours
                path.unlink()
    write_record(folder, status="running", num_images=options.num_images, settings=settings)
    files.folder.mkdir(exist_ok=True)
    for path in our_files(folder):
        if path.suffix == ".tmp" or files.is_stale(path.name):
            path.unlink()
    return files.missing()


def differences(record, num_images, settings):
    """What keeps a run from going on in a folder with this record (or None), in words."""
    if record is None:
        return []
    old = record["settings"]
    differ = [f"{name} was {old.get(name)!r}, now {new!r}" for name, new in settings.items() if old.get(name) != new]
    if num_images < record["num_images"]:
        differ.append(f"num_images was {record['num_images']}, now {num_images}")
    return differ


def our_files(folder):
    """The files that generate.py has written, finished or not."""
    paths = sorted([*folder.glob("*"), *folder.glob("images/*")])
    return [path for path in paths if OUR_FILES.fullmatch(path.relative_to(folder).as_posix())]


def finish_folder(folder, options, files, run):
    """Merge shards, draw the grid, and mark the folder complete."""
    files.finish()
    if options.grid_images > 0:
        grid = make_grid_image(files.read(min(options.grid_images, options.num_images)))
        write_atomically(folder / GRID, lambda file: grid.save(file, format="PNG"))
    else:
        (folder / GRID).unlink(missing_ok=True)
    write_record(folder, status="complete", **run)


def describe_run(state, new_images, seconds):
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


if __name__ == "__main__":
    main()
