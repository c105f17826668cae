"""A pipeline in, a folder of images out: OUT/images/ (or OUT/images.npz), OUT/grid.png and OUT/generation.json.

accelerate launch generate.py --pipeline DIR_OR_HUB_ID --num_images 10000 --output_dir OUT
accelerate launch --config_file accelerate_configs/cpu.yaml --num_processes 2 generate.py ...   # several on a CPU

Image i depends on the weights, the seed and i, not on how many processes share the work. A killed run goes on where
it stopped when the same command is given again, and ends with the same files; a larger --num_images extends the
folder. With another batch size or device the network rounds differently, so these are settings that a folder keeps.
"""

import hashlib
import json
import math
import os
import re
import signal
import sys
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Literal

import accelerate
import diffusers
import psutil
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, parse_flag_from_env
from diffusers import DDIMScheduler, DDPMScheduler
from tqdm.auto import tqdm
from transformers.hf_argparser import HfArg

from images.records import GRID, RECORD, read_record
from pipelines import (
    check_variant,
    choose_kernels,
    denoising_steps,
    image_shape,
    load_configs,
    load_pipeline,
    make_grid_image,
)
from pipelines.image_files import FORMATS, Writer, write_atomically
from recipes import is_main_process, one_line_errors, parse_options
from training.folder_lock import LOCK_FILE, folder_lock

SCHEDULERS = {"ddpm": DDPMScheduler, "ddim": DDIMScheduler}
DTYPES = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}
HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")
MAX_IMAGES = 2**32  # as many numbers of images as there are; the last batch is padded with the next ones
BYTES_PER_BLOCK = 200  # a Python range and its bounds
MAX_GRID_IMAGES = 10_000  # a picture of 6,500 pixels a side, at least


@dataclass
class GenerationOptions:
    """--pipeline and --output_dir are required."""

    config: str | None = HfArg(default=None, help="A recipe (YAML) of these options; flags override it.")
    pipeline: str | None = HfArg(default=None, help="Folder or Hub id of a UNet2DModel with a DDPM or DDIM scheduler.")
    variant: str | None = HfArg(default=None, help="Of its weights, as in diffusers: fp16 for *.fp16.safetensors.")
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
        whole_numbers = {
            "num_images": (1, MAX_IMAGES),
            "batch_size": (1, MAX_IMAGES),
            "grid_images": (0, MAX_GRID_IMAGES + 1),
            "seed": (0, 2**32),
        }
        for name, (least, end) in whole_numbers.items():
            if not least <= getattr(self, name) < end:
                raise ValueError(f"--{name} {getattr(self, name)} must be in [{least}, {end})")
        if self.num_images + self.batch_size > MAX_IMAGES:
            raise ValueError(
                f"--num_images {self.num_images} and --batch_size {self.batch_size} must add up to {MAX_IMAGES} at most"
            )
        if not 0 <= self.eta <= 1:
            raise ValueError(f"--eta {self.eta} must be in [0, 1]")
        if self.eta and self.sampler != "ddim":
            raise ValueError(f"--eta {self.eta} belongs to --sampler ddim, not {self.sampler}")


def main(argv=None):
    # Without a GPU, processes find each other only when told that they are on the CPU. One may finish long before
    # another: the default timeout of ten minutes would end the run.
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    state = PartialState(cpu=cpu, timeout=timedelta(days=1))

    # Refuse what cannot work before any weights are read
    options = on_main(state, lambda: read_options(argv, state.device))
    with ExitStack() as held:
        on_main(state, lambda: held.enter_context(folder_lock(options.output_dir)))
        generate(options, state)
    state.destroy_process_group()


def generate(options, state):
    """Sample what is missing in a folder that this run holds."""
    folder = Path(options.output_dir)

    # The model, and what is left to do. The main process first: it may download, and what is wrong is said once
    pipeline = on_main(state, lambda: load_weights(options), share=False)
    with one_line_errors(ValueError):
        pipeline = (pipeline or load_weights(options)).to(state.device)
    pipeline.scheduler = SCHEDULERS[options.sampler].from_config(pipeline.scheduler.config)
    # Blocks are all of one shape: a GPU can replay the network's kernels as a CUDA graph
    choose_kernels(pipeline.unet, state.device, options.mixed_precision, options.compile, mode="reduce-overhead")
    files = FORMATS[options.format](folder, options.num_images, options.batch_size)
    todo = on_main(state, lambda: prepare_folder(folder, options, pipeline, files))

    start = time.perf_counter()
    with one_line_errors(OSError, FloatingPointError, torch.OutOfMemoryError), report_when_stopped(files):
        sample_blocks(pipeline, options, files, todo, state)
        state.wait_for_everyone()
        seconds, new = time.perf_counter() - start, sum(map(len, todo))
        on_main(state, lambda: finish_folder(folder, options, files, describe_run(state, new, seconds)))
    state.print(f"{options.num_images} images in {folder} ({new} new in {seconds:.1f} s)")


def on_main(state, function, share=True):
    """Run `function` on the main process; all processes return its result, or exit when it fails, with one message.

    With `share` false, the others return None."""
    result, code = None, None
    if state.is_main_process:
        try:
            with one_line_errors(ValueError, NotImplementedError, OSError):
                result = function()
        except SystemExit as error:
            code = error.code
    shared, status = broadcast_object_list([result if share else None, 1 if isinstance(code, str) else code])
    if status is not None:
        sys.exit(code if state.is_main_process else status)
    return result if state.is_main_process else shared


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


# ---------------------------------------------------------------------------------------------------- signals


class Stopped(BaseException):
    """SIGINT (Ctrl-C) or SIGTERM has come. No Exception, so that nothing on the way takes it for a failure."""

    def __init__(self, number, message="nothing was written"):
        super().__init__(f"stopped by {signal.Signals(number).name}: {message}")
        self.number = number


@contextmanager
def exit_when_stopped():
    """Make a signal end the block at once, with one line and the shell's exit status for it, 128 + its number."""

    def stop(number, _frame):
        raise Stopped(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    try:
        yield
    except Stopped as stopped:
        if is_main_process():
            print(f"{Path(sys.argv[0]).name}: {stopped}", file=sys.stderr)
        sys.exit(128 + stopped.number)


@contextmanager
def report_when_stopped(files):
    """Tell, if a signal ends the block, how far the run has come."""
    try:
        yield
    except Stopped as stopped:
        total, missing = files.blocks[-1].stop, sum(map(len, files.missing()))
        message = f"{total - missing} of {total} images are in {files.folder.parent}; the same command goes on"
        raise Stopped(stopped.number, message) from None


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
        check_variant(options.pipeline, options.variant)
    except (ValueError, NotImplementedError, OSError) as error:
        raise ValueError(f"--pipeline {error}") from error
    shape = image_shape(unet_config)
    if shape[0] not in (1, 3):
        raise ValueError(f"--pipeline {options.pipeline} makes {shape[0]} channels, not grey or RGB")
    check_memory(options, shape)
    trained = scheduler.config.num_train_timesteps
    if options.num_inference_steps is None:
        options.num_inference_steps = trained if options.sampler == "ddpm" else min(100, trained)
    if not 1 <= options.num_inference_steps <= trained:
        raise ValueError(f"--num_inference_steps {options.num_inference_steps} must be in [1, {trained}]")
    scheduler = SCHEDULERS[options.sampler].from_config(scheduler.config)
    denoising_steps(scheduler, options.num_inference_steps, options.eta, options.skip_schedule)
    check_folder(Path(options.output_dir), options)
    return options


def load_weights(options):
    """The pipeline with its weights; ValueError, which names the option, where they cannot be loaded."""
    try:
        return load_pipeline(options.pipeline, options.variant)
    except (ValueError, OSError) as error:
        raise ValueError(f"--pipeline {error}") from error


def check_memory(options, shape):
    """Refuse what a typing error asks for before it exhausts the memory: a batch's images, or the list of blocks."""
    available = psutil.virtual_memory().available
    num_blocks = math.ceil(options.num_images / options.batch_size)
    needs = {"batch_size": 4 * options.batch_size * math.prod(shape), "num_images": BYTES_PER_BLOCK * num_blocks}
    for name, needed in needs.items():
        if needed > available:
            raise ValueError(
                f"--{name} {getattr(options, name)} needs {needed / 1e9:,.1f} GB of memory, of which "
                f"{available / 1e9:,.1f} are available"
            )


def check_folder(folder, options):
    """Refuse a folder with files of others, or at least with such as the run would write over or be taken for ours."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output_dir {folder} is a file")
    names = sorted(set(os.listdir(folder)) - {RECORD + ".tmp", LOCK_FILE}) if folder.exists() else []
    if not names:
        return
    if read_record(folder):
        files = FORMATS[options.format](folder, options.num_images, options.batch_size)
        foreign = written_paths(files, options.grid_images > 0) - recorded_paths(folder)
    elif options.overwrite_output_dir:
        written = ("images", "images.npz", "images.npz.tmp", GRID, f"{GRID}.tmp", RECORD)
        foreign = {folder / name for name in written if name in names}
    else:
        raise ValueError(
            f"--output_dir {folder} is not empty ({names[0]}, ...) and has no {RECORD} of ours: "
            "choose another folder, or give --overwrite_output_dir, which leaves foreign files alone"
        )
    if foreign:
        raise ValueError(
            f"--output_dir {folder} has {min(foreign).relative_to(folder)}, which generate.py did not write "
            f"(by its {RECORD}, if there is one): choose another folder"
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
    ours = recorded_paths(folder)
    kept = written_paths(files, options.grid_images > 0)
    if differ := differences(read_record(folder), options.num_images, settings):
        if not options.overwrite_output_dir:
            raise ValueError(
                f"--output_dir {folder} holds images made otherwise: {'; '.join(differ)}. "
                "Choose another folder, or give --overwrite_output_dir to delete them"
            )
        if files.folder.is_symlink():
            raise ValueError(f"--overwrite_output_dir: {files.folder} is a link, and what it leads to is not deleted")
        kept = set()
    # The record goes on naming what is deleted until nothing of it is left: a run killed here can be started again
    if doomed := {path for path in ours if path.suffix == ".tmp" or path not in kept}:
        write_record(folder, status="running")
        for path in doomed:
            path.unlink()
    write_record(
        folder, status="running", num_images=options.num_images, grid=options.grid_images > 0, settings=settings
    )
    files.folder.mkdir(exist_ok=True)
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


def recorded_paths(folder):
    """The files in a folder that its record says are ours; nothing else is ever deleted."""
    if (record := read_record(folder)) is None:
        return set()
    try:
        settings = record["settings"]
        files = FORMATS[settings["format"]](folder, record["num_images"], settings["batch_size"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder / RECORD} is broken: {error!r}") from error
    return {path for path in written_paths(files, record.get("grid", True)) if path.is_symlink() or path.is_file()}


def written_paths(files, grid):
    """Whatever lies where a run writes its images, and its grid: files, finished or not, and all that is in the way."""
    folder = files.folder.parent
    names = {GRID if grid else None, files.merged and files.merged.name}
    paths = {path for path in folder.glob("*") if path.name.removesuffix(".tmp") in names}
    if files.folder.is_dir():
        return paths | {path for path in files.folder.glob("*") if files.writes(path.name)}
    return paths | ({files.folder} if os.path.lexists(files.folder) else set())


def finish_folder(folder, options, files, run):
    """Merge shards, draw the grid, and mark the folder complete."""
    files.finish()
    if options.grid_images > 0:
        grid = make_grid_image(files.read(min(options.grid_images, options.num_images)))
        write_atomically(folder / GRID, lambda file: grid.save(file, format="PNG"))
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
    with exit_when_stopped():
        main()
