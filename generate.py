"""A pipeline in, a folder of images out.

    accelerate launch generate.py --pipeline DIR_OR_HUB_ID --num_images 10000 --output_dir OUT

Image i depends on the weights, the seed and i, not on how many processes share the work. A killed run goes on
where it stopped when the same command is given again, and ends with the same files; a larger --num_images
extends the folder. With another batch size or device the network rounds differently, so these are settings
that a folder keeps. On a CPU, several processes need `accelerate launch --multi_gpu --num_processes 2`, odd as
it reads: with --cpu, accelerate starts a single one.
"""

import hashlib
import io
import json
import os
import re
import sys
import time
import zipfile
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, BinaryIO, Literal

import accelerate
import diffusers
import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, parse_flag_from_env
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel
from PIL import Image
from tqdm import tqdm
from transformers import HfArgumentParser

from pipelines import UnconditionalPipeline, denoising_steps, load_configs, make_grid_image, to_pil

SCHEDULERS = {"ddpm": DDPMScheduler, "ddim": DDIMScheduler}
DTYPES = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}
RECORD = "generation.json"
OURS = re.compile(
    r"(\d{6,}\.png|\d{6,}-\d{6,}\.(npz|parquet)|images\.npz|grid\.png|generation\.json)(\.tmp)?"
)
WRITER_THREADS = 4


@dataclass
class GenerationArguments:
    """Options of generate.py."""

    pipeline: str = field(
        metadata={"help": "Folder or Hub id of a UNet2DModel with a DDPM or DDIM scheduler."}
    )
    output_dir: str = field(metadata={"help": "Folder for the images; made when missing."})
    num_images: int = field(
        default=64, metadata={"help": "How many images. More than before extends the folder."}
    )
    batch_size: int = field(
        default=64, metadata={"help": "Images per network call and process; the last are padded."}
    )
    seed: int = field(default=0, metadata={"help": "Names the series of images, in [0, 2**32)."})
    sampler: Literal["ddpm", "ddim"] = field(default="ddpm", metadata={"help": "Need not be the saved one."})
    num_inference_steps: int | None = field(
        default=None,
        metadata={"help": "Denoising steps. Default: all the trained ones for ddpm, 100 for ddim."},
    )
    skip_schedule: Literal["uniform", "quadratic"] = field(
        default="uniform",
        metadata={"help": "Which timesteps fewer steps use; quadratic ones crowd at the image end."},
    )
    eta: float | None = field(
        default=None, metadata={"help": "ddim only: 0 deterministic (default) to 1 as in DDPM."}
    )
    format: Literal["png", "npz", "parquet"] = field(
        default="png",
        metadata={
            "help": "One PNG each; one images.npz (arr_0, uint8 NHWC); or parquet shards for `datasets`."
        },
    )
    mixed_precision: Literal["no", "bf16", "fp16"] = field(
        default="no", metadata={"help": "Autocast of the network."}
    )
    compile: bool = field(default=False, metadata={"help": "torch.compile the network."})
    grid_images: int = field(default=64, metadata={"help": "Images in grid.png; 0 for no grid."})
    overwrite_output_dir: bool = field(
        default=False,
        metadata={
            "help": "If output_dir holds images made with other settings, delete them (and nothing else)."
        },
    )


def main(argv: list[str] | None = None) -> None:
    args = GenerationArguments(**vars(HfArgumentParser(GenerationArguments).parse_args(argv)))
    # Without a GPU, processes find each other only when told that they are on the CPU. One may finish long
    # before another: the default timeout of ten minutes would end the run.
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    state = PartialState(cpu=cpu, timeout=timedelta(days=1))
    folder = Path(args.output_dir)

    # 1. refuse what cannot work, before any weights are read
    on_main(state, lambda: check_arguments(args, state.device))
    on_main(state, lambda: check_folder(folder, args.overwrite_output_dir))
    _, scheduler = read_configs(args)
    with state.main_process_first():
        pipeline = UnconditionalPipeline.from_pretrained(args.pipeline, scheduler=scheduler).to(state.device)
    if args.compile:
        pipeline.unet.compile()

    # 2. agree on what is left to do
    settings = on_main(state, lambda: read_settings(args, scheduler, pipeline.unet, state.device))
    files = FORMATS[args.format](folder, args.num_images, args.batch_size)
    todo = on_main(state, lambda: prepare_folder(folder, args, settings, files))

    # 3. sample: each process takes every n-th block, and writes it while the next one is sampled
    start = time.perf_counter()
    try:
        sample_blocks(pipeline, args, files, todo, state)
    except OSError as error:
        raise SystemExit(f"generate.py: error: {error}") from error
    state.wait_for_everyone()
    seconds = time.perf_counter() - start

    # 4. finish the folder
    new = sum(map(len, todo))
    speed = {"images_per_second": new / seconds, "seconds": seconds, "new_images": new} if new else {}
    on_main(state, lambda: finish_folder(folder, args, settings, files, speed | hardware(state)))
    state.print(f"{args.num_images} images in {folder} ({new} new in {seconds:.1f} s)")
    state.destroy_process_group()


def sample_blocks(
    pipeline, args: GenerationArguments, files: "Files", todo: list[range], state: PartialState
) -> None:
    """Sample this process's share of the blocks `todo`, and hand them to the writer threads."""
    done = args.num_images - sum(map(len, todo))
    main, dtype = state.is_main_process, DTYPES[args.mixed_precision]
    bar = tqdm(total=args.num_images, initial=done, unit="img", disable=not main, desc="generating")
    pipeline.set_progress_bar_config(leave=False, position=1, disable=not main or not sys.stderr.isatty())
    with bar, Writer(limit=2 * len(files.names(files.blocks[0]))) as writer:
        for block in todo[state.process_index :: state.num_processes]:
            # Always a whole block, the next images of the series being the padding: the network's rounding
            # depends on the shape of its batch, so an image must not depend on whether it is among the last.
            indices = range(block.start, block.start + args.batch_size)
            with torch.autocast(state.device.type, dtype=dtype, enabled=dtype is not None):
                images = pipeline.sample(
                    indices, args.seed, args.num_inference_steps, args.eta or 0.0, args.skip_schedule
                )
            for path, write in files.parts(block, images[: len(block)].cpu()):
                writer.submit(path, write)
            # the other processes go at about the same pace
            bar.update(min(len(block) * state.num_processes, bar.total - bar.n))


# Checks


def check_arguments(args: GenerationArguments, device: torch.device) -> None:
    """Raise a ValueError, NotImplementedError or OSError that names the option at fault; reads no weights."""
    for name, least in (("num_images", 1), ("batch_size", 1), ("grid_images", 0)):
        if getattr(args, name) < least:
            raise ValueError(f"--{name} {getattr(args, name)} must be {least} or more")
    if not 0 <= args.seed < 2**32:
        raise ValueError(f"--seed {args.seed} must be in [0, 2**32)")
    if args.eta is not None and args.sampler != "ddim":
        raise ValueError(f"--eta {args.eta} belongs to --sampler ddim, not {args.sampler}")
    if args.mixed_precision == "fp16" and device.type == "cpu":
        raise ValueError("--mixed_precision fp16 needs a GPU; on a CPU use bf16 or no")
    unet_config, scheduler = read_configs(args)
    denoising_steps(scheduler, args.num_inference_steps, args.eta or 0.0, args.skip_schedule)
    if unet_config.get("in_channels", 3) not in (1, 3):
        raise ValueError(
            f"--pipeline {args.pipeline} makes {unet_config['in_channels']} channels, not grey or RGB"
        )


def read_configs(args: GenerationArguments) -> tuple[dict[str, Any], DDPMScheduler | DDIMScheduler]:
    """The U-Net's config and the scheduler to sample with; fills in the default of --num_inference_steps."""
    path = Path(args.pipeline)
    like_an_id = (
        args.pipeline.count("/") == 1 and not path.is_absolute() and not args.pipeline.startswith(".")
    )
    if not path.is_dir() and not like_an_id:
        raise ValueError(f"--pipeline {args.pipeline}: no such folder, and no Hub id, which is owner/name")
    try:
        unet_config, scheduler = load_configs(args.pipeline)
    except OSError as error:
        raise ValueError(f"--pipeline {args.pipeline} is no pipeline's folder or Hub id: {error}") from error
    scheduler = SCHEDULERS[args.sampler].from_config(scheduler.config)
    if args.num_inference_steps is None:
        trained = scheduler.config.num_train_timesteps
        args.num_inference_steps = trained if args.sampler == "ddpm" else min(100, trained)
    return unet_config, scheduler


def on_main(state: PartialState, function: Callable[[], Any]) -> Any:
    """Run `function` on the main process; all processes return its result, or exit with its error."""
    outcome = [None, None]
    if state.is_main_process:
        try:
            outcome[0] = function()
        except (ValueError, NotImplementedError, OSError) as error:
            outcome[1] = f"generate.py: error: {error}"
    broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise SystemExit(outcome[1] if state.is_main_process else 1)
    return outcome[0]


# The folder


def read_settings(args, scheduler, unet: UNet2DModel, device: torch.device) -> dict[str, Any]:
    """All that decides what image i looks like, as JSON has it; two runs into one folder must agree on it."""
    config = {k: v for k, v in json.loads(scheduler.to_json_string()).items() if k[0] != "_"}
    more = ("num_inference_steps", "skip_schedule", "seed", "batch_size", "format")
    return {
        "pipeline": str(Path(args.pipeline).resolve()) if Path(args.pipeline).is_dir() else args.pipeline,
        "weights": fingerprint(unet),
        "scheduler": {"class": type(scheduler).__name__, **config},
        "sampler": args.sampler,
        "eta": (args.eta or 0.0) if args.sampler == "ddim" else None,
        **{name: getattr(args, name) for name in more},
        "mixed_precision": args.mixed_precision,
        "compile": args.compile,
        "device": device.type,
    }


def fingerprint(unet: UNet2DModel) -> str:
    """SHA-256 of the U-Net's config and weights."""
    config = {k: v for k, v in unet.config.items() if k[0] != "_"}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name, tensor in sorted(unet.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def read_record(folder: Path) -> dict[str, Any] | None:
    """generation.json, or None where there is none of ours."""
    try:
        record = json.loads((folder / RECORD).read_text())
        return record if {"status", "num_images", "settings"} <= record.keys() else None
    except (FileNotFoundError, ValueError, AttributeError):
        return None


def write_record(folder: Path, status: str, args: GenerationArguments, settings, **more: Any) -> None:
    """Store what is known of this run beside what an earlier run into the same folder has left."""
    new = {"status": status, "num_images": args.num_images, "settings": settings, **more}
    record = (read_record(folder) or {}) | new
    write_atomically(folder / RECORD, lambda file: file.write((json.dumps(record, indent=2) + "\n").encode()))


def check_folder(folder: Path, overwrite: bool) -> None:
    """Refuse a folder with files of others, or at least with files that could be taken for ours."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output_dir {folder} is a file")
    names = sorted(set(os.listdir(folder)) - {RECORD + ".tmp"}) if folder.exists() else []
    if not names or read_record(folder) is not None:
        return
    if not overwrite:
        raise ValueError(
            f"--output_dir {folder} is not empty ({names[0]}, ...) and has no {RECORD} of ours: "
            "choose another folder, or give --overwrite_output_dir, which leaves foreign files alone"
        )
    if clash := [name for name in names if OURS.fullmatch(name) and not name.endswith(".tmp")]:
        raise ValueError(
            f"--output_dir {folder} has a {clash[0]} that generate.py did not write (no {RECORD} of ours) "
            "and would have to replace: choose another folder"
        )


def prepare_folder(folder: Path, args: GenerationArguments, settings, files: "Files") -> list[range]:
    """Store the settings, clear what a killed run left half done, and return the blocks still to sample."""
    folder.mkdir(parents=True, exist_ok=True)
    record = read_record(folder)
    if record is not None and (differ := differences(args, settings, record)):
        if not args.overwrite_output_dir:
            raise ValueError(
                f"--output_dir {folder} holds images made otherwise: {'; '.join(differ)}. "
                "Choose another folder, or give --overwrite_output_dir to delete them"
            )
        for path in our_files(folder):
            if path.name != RECORD:  # a run killed here leaves a folder that is still known as ours
                path.unlink()
    write_record(folder, "running", args, settings)
    for path in our_files(folder):
        if path.name.endswith(".tmp") or files.is_stale(path.name):
            path.unlink()
    return files.missing()


def differences(args: GenerationArguments, settings, record: dict[str, Any]) -> list[str]:
    """What keeps a run from going on in a folder with this record, in words."""
    old = record["settings"]
    differ = [f"{k} was {old.get(k)!r}, now {v!r}" for k, v in settings.items() if old.get(k) != v]
    if args.num_images < record["num_images"]:
        differ.append(f"num_images was {record['num_images']}, now {args.num_images}")
    return differ


def our_files(folder: Path) -> list[Path]:
    return [folder / name for name in sorted(os.listdir(folder)) if OURS.fullmatch(name)]


def finish_folder(
    folder: Path, args: GenerationArguments, settings, files: "Files", more: dict[str, Any]
) -> None:
    """Merge shards, draw the grid, and mark the folder complete."""
    files.finish()
    if args.grid_images > 0:
        grid = make_grid_image(files.read(min(args.grid_images, args.num_images)))
        write_atomically(folder / "grid.png", lambda file: grid.save(file, format="PNG"))
    else:
        (folder / "grid.png").unlink(missing_ok=True)
    write_record(folder, "complete", args, settings, **more)


def hardware(state: PartialState) -> dict[str, Any]:
    kind = state.device.type
    return {
        "hardware": torch.cuda.get_device_name() if kind == "cuda" else f"{kind}, {os.cpu_count()} cores",
        "num_processes": state.num_processes,
        "num_threads": torch.get_num_threads(),
        "versions": {module.__name__: module.__version__ for module in (torch, diffusers, accelerate)},
    }


# Writing

Write = Callable[[BinaryIO], Any]


def write_atomically(path: Path, write: Write) -> None:
    """Let `write` fill a temporary file, then rename it: `path` is complete whenever it exists."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
        os.replace(temporary, path)
    except OSError as error:
        message = f"cannot write {path}: {error}; finished images are kept, the same command goes on"
        raise OSError(message) from error


class Writer:
    """Writes files on threads while the next batch is sampled; the first error ends the run.

    At most `limit` files wait (of two blocks, say), so that a slow disk slows the sampling down rather than
    filling the memory.
    """

    def __init__(self, limit: int, threads: int = WRITER_THREADS):
        self.pool, self.limit = ThreadPoolExecutor(threads), limit
        self.waiting: deque[Future] = deque()

    def submit(self, path: Path, write: Write) -> None:
        while self.waiting and (self.waiting[0].done() or len(self.waiting) >= self.limit):
            self.waiting.popleft().result()
        self.waiting.append(self.pool.submit(write_atomically, path, write))

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind, *_) -> None:
        self.pool.shutdown(cancel_futures=kind is not None)
        if kind is None:
            for future in self.waiting:
                future.result()


# Formats


class Files:
    """Which files hold the images of a folder, block by block; a block is one batch's range of indices."""

    def __init__(self, folder: Path, num_images: int, batch_size: int):
        self.folder = folder
        starts = range(0, num_images, batch_size)
        self.blocks = [range(start, min(start + batch_size, num_images)) for start in starts]

    def names(self, block: range) -> list[str]:
        """The files that exist when the block is done."""
        raise NotImplementedError

    def parts(self, block: range, images: torch.Tensor) -> Iterator[tuple[Path, Write]]:
        """uint8 [B, C, H, W] on the CPU -> the block's files and what writes them."""
        raise NotImplementedError

    def read(self, count: int) -> torch.Tensor:
        """The first images, uint8 [count, C, H, W]; after `finish`."""
        raise NotImplementedError

    def missing(self) -> list[range]:
        present = set(os.listdir(self.folder))
        return [block for block in self.blocks if not present.issuperset(self.names(block))]

    def is_stale(self, name: str) -> bool:
        """Whether a file of ours is of no use any more."""
        return False

    def finish(self) -> None:
        """Called once, when no block is missing."""


class PngFiles(Files):
    """000000.png, 000001.png, ..."""

    def names(self, block):
        return [f"{i:06d}.png" for i in block]

    def parts(self, block, images):
        for name, image in zip(self.names(block), images, strict=True):
            yield self.folder / name, lambda file, image=image: to_pil(image).save(file, format="PNG")

    def read(self, count):
        return torch.stack([from_pil(Image.open(self.folder / f"{i:06d}.png")) for i in range(count)])


class Shards(Files):
    """One file a block, named by its first and last image: 000000-000255.npz, ..."""

    suffix: str

    def names(self, block):
        return [f"{block.start:06d}-{block.stop - 1:06d}.{self.suffix}"]

    def is_stale(self, name):  # the last block of a run that num_images has since extended
        return "-" in name and name not in {self.names(block)[0] for block in self.blocks}


class ParquetShards(Shards):
    """Shards with an `image` column: `load_dataset("parquet", data_files="OUT/*.parquet")`."""

    suffix = "parquet"

    def parts(self, block, images):
        import datasets  # slow to import, and only needed here

        datasets.disable_progress_bars()

        def write(file: BinaryIO) -> None:
            pictures = {"image": [to_pil(image) for image in images]}
            features = datasets.Features({"image": datasets.Image()})
            datasets.Dataset.from_dict(pictures, features=features).to_parquet(file)

        yield self.folder / self.names(block)[0], write

    def read(self, count):
        from pyarrow.parquet import read_table

        images = []
        for block in self.blocks[: len(range(0, count, len(self.blocks[0])))]:
            column = read_table(self.folder / self.names(block)[0])["image"].to_pylist()
            images += [from_pil(Image.open(io.BytesIO(row["bytes"]))) for row in column]
        return torch.stack(images[:count])


class NpzShards(Shards):
    """Shards that end up in one images.npz: key arr_0, uint8 [N, H, W, C], as ADM's evaluator reads it."""

    suffix = "npz"

    def parts(self, block, images):
        array = images.permute(0, 2, 3, 1).contiguous().numpy()
        yield self.folder / self.names(block)[0], lambda file: np.savez(file, array)

    def read(self, count):
        with np.load(self.folder / "images.npz") as arrays:
            return torch.from_numpy(arrays["arr_0"][:count]).permute(0, 3, 1, 2)

    def missing(self):
        merged = self.merged_shape()[0]
        return [block for block in super().missing() if block.stop > merged]

    def finish(self):
        """Copy the shards into images.npz, after the whole blocks it already has, and delete them."""
        merged = self.merged_shape()[0]
        if merged < self.blocks[-1].stop:
            write_atomically(self.folder / "images.npz", lambda file: self.merge(file, merged))
        for block in self.blocks:
            (self.folder / self.names(block)[0]).unlink(missing_ok=True)

    def merge(self, file: BinaryIO, merged: int) -> None:
        """What np.savez would write, one block at a time."""
        old = np.load(self.folder / "images.npz")["arr_0"] if merged else None
        with zipfile.ZipFile(file, "w") as archive, archive.open("arr_0.npy", "w", force_zip64=True) as out:
            for block in self.blocks:
                whole = block.stop <= merged
                rows = old[block.start : block.stop] if whole else self.load_shard(block)
                if block.start == 0:
                    shape = (self.blocks[-1].stop, *rows.shape[1:])
                    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                    np.lib.format.write_array_header_1_0(out, header)
                out.write(rows.tobytes())

    def load_shard(self, block: range) -> np.ndarray:
        with np.load(self.folder / self.names(block)[0]) as arrays:
            return arrays["arr_0"]

    def merged_shape(self) -> tuple[int, ...]:
        """Shape of the array in images.npz, from its header; (0,) when there is none."""
        if not (self.folder / "images.npz").exists():
            return (0,)
        with zipfile.ZipFile(self.folder / "images.npz") as archive, archive.open("arr_0.npy") as file:
            np.lib.format.read_magic(file)
            return np.lib.format.read_array_header_1_0(file)[0]


FORMATS = {"png": PngFiles, "npz": NpzShards, "parquet": ParquetShards}


def from_pil(picture: Image.Image) -> torch.Tensor:
    """A grey or RGB picture -> uint8 [1 or 3, H, W]."""
    array = np.array(picture)
    return torch.from_numpy(array if array.ndim == 3 else array[..., None]).permute(2, 0, 1)


if __name__ == "__main__":
    main()
