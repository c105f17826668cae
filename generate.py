"""A pipeline in, a folder of images out: OUT/images/ (or OUT/images.npz), OUT/grid.png and OUT/generation.json.

accelerate launch generate.py --pipeline DIR_OR_HUB_ID --num_images 10000 --output_dir OUT
accelerate launch --config_file accelerate_configs/cpu.yaml --num_processes 2 generate.py ...   # several on a CPU

Image i depends on the weights, the seed, i and its class, not on how many processes share the work. A killed run goes
on where it stopped when the same command is given again, and ends with the same files; a larger --num_images extends
the folder. With another batch size or device the network rounds differently, so these are settings that a folder keeps.

A class-conditional model samples its classes in turn, or those of --class_labels. Which one an image is of stands in
images/metadata.jsonl, in the column `label` of the parquet files, or in arr_1 of images.npz.
"""

import gc
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, parse_flag_from_env
from diffusers import DiffusionPipeline

from generation.folder import check_folder, finish_folder, prepare_folder
from generation.formats import FORMATS, GeneratedFiles
from generation.labels import ImageLabels
from generation.options import DTYPES, GenerationOptions, read_options
from generation.records import describe_run, describe_settings
from generation.stopping import exit_when_stopped, report_when_stopped
from generation.writing import Writer
from pipelines import EVERYWHERE, SCHEDULERS, choose_kernels, load_pipeline, network_of, sample_images
from progress import progress_bar
from recipes import one_line_errors
from training.folder_lock import folder_lock


def main(argv: Sequence[str] | None = None) -> None:
    # Without a GPU, processes find each other only when told that they are on the CPU. One may finish long before
    # another: the default timeout of ten minutes would end the run.
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    state = PartialState(cpu=cpu, timeout=timedelta(days=1))

    # Refuse what cannot work before any weights are read
    options, labels = on_main(state, lambda: read_options(argv, state.device))
    with ExitStack() as held:
        on_main(state, lambda: held.enter_context(folder_lock(options.output_dir)))
        generate(options, labels, state)
    state.destroy_process_group()


def generate(options: GenerationOptions, labels: ImageLabels | None, state: PartialState) -> None:
    """Sample what is missing in a folder that this run holds."""
    files = FORMATS[options.format](Path(options.output_dir), options.num_images, options.batch_size, labels)
    allowed = {"draws_grid": options.grid_images > 0, "overwrite": options.overwrite_output_dir}
    on_main(state, lambda: check_folder(files, **allowed))

    # The model. The main process first: it may download, and what is wrong is said once
    pipeline = on_main(state, lambda: load_weights(options), share=False)
    with one_line_errors(ValueError):
        pipeline = (pipeline or load_weights(options)).to(state.device)
    pipeline.scheduler = SCHEDULERS[options.sampler].from_config(pipeline.scheduler.config)
    # Blocks are all of one shape: a GPU can replay the network's kernels as a CUDA graph
    choose_kernels(network_of(pipeline), state.device, options.mixed_precision, options.compile, mode="reduce-overhead")

    todo = on_main(state, lambda: prepare_folder(files, describe_settings(options, pipeline, labels), **allowed))
    start = time.perf_counter()
    with one_line_errors(OSError, FloatingPointError, torch.OutOfMemoryError), report_when_stopped(files):
        sample_blocks(pipeline, options, files, todo, state)
        state.wait_for_everyone()
        seconds, new = time.perf_counter() - start, sum(map(len, todo))
        on_main(state, lambda: finish_folder(files, options.grid_images, describe_run(state, new, seconds)))
    state.print(f"{options.num_images} images in {files.output_dir} ({new} new in {seconds:.1f} s)")


def load_weights(options: GenerationOptions) -> DiffusionPipeline:
    """The pipeline with its weights; ValueError, which names the option, where they cannot be loaded."""
    try:
        return load_pipeline(options.pipeline, options.variant)
    except (ValueError, OSError) as error:
        raise ValueError(f"--pipeline {error}") from error


def sample_blocks(
    pipeline: DiffusionPipeline,
    options: GenerationOptions,
    files: GeneratedFiles,
    todo: list[range],
    state: PartialState,
) -> None:
    """Sample this process's share of the blocks `todo`: every n-th one, written while the next one is sampled."""
    is_main, dtype = state.is_main_process, DTYPES[options.mixed_precision]
    done = options.num_images - sum(map(len, todo))
    bar = progress_bar(total=options.num_images, initial=done, unit="image", disable=not is_main, desc="generating")
    pipeline.set_progress_bar_config(leave=False, position=1, disable=not is_main or not sys.stderr.isatty())
    with bar, Writer(limit=2 * len(files.names(files.blocks[0]))) as writer:
        for block in todo[state.process_index :: state.num_processes]:
            # Always a whole block, the next images of the series being the padding: the network's rounding depends
            # on the shape of its batch, so an image must not depend on whether it is among the last.
            indices = range(block.start, block.start + options.batch_size)
            with torch.autocast(state.device.type, dtype=dtype, enabled=dtype is not None):
                images = sample_images(
                    pipeline,
                    indices,
                    options.seed,
                    options.num_inference_steps,
                    options.eta,
                    options.skip_schedule,
                    files.labels and files.labels.of(indices),
                    options.guidance_scale,
                    options.guidance_interval or EVERYWHERE,
                    options.guidance_channels,
                )
            for path, write in files.parts(block, images[: len(block)].cpu()):
                writer.submit(path, write)
            bar.update(min(len(block) * state.num_processes, bar.total - bar.n))  # the others go at about this pace


def on_main(state: PartialState, function: Callable[[], Any], share: bool = True) -> Any:
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


if __name__ == "__main__":
    gc.freeze()  # all that was imported: looking through it when the process ends would take a second and more
    with exit_when_stopped():
        main()
