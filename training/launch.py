"""The processes of a run, as `accelerate launch` started them."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration, set_seed

from .folder_lock import folder_lock
from .options import TrainingOptions

logger = logging.getLogger(__name__)


def start_accelerator(options: TrainingOptions) -> Accelerator:
    """This process's `Accelerator`: on CUDA where there is any, else on the CPU, however it was launched.

    Sets, for the whole process: TF32, cuDNN's autotuning, the logging of warnings, and the seed of initial weights.

    Raises:
        ValueError: a precision that the device has not.
    """
    warn_of_missing_processes()
    log_dir = f"{options.output_dir}/{options.logging_dir}"
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),  # other accelerators are not supported
        gradient_accumulation_steps=options.gradient_accumulation_steps,
        mixed_precision=options.mixed_precision,
        log_with=None if options.logger == "none" else options.logger,
        project_config=ProjectConfiguration(options.output_dir, logging_dir=log_dir),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=2))],  # others wait while one draws samples
    )
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise ValueError("--mixed_precision fp16: needs a GPU; on a CPU choose bf16 or no")
    logging.basicConfig(level=logging.WARNING if accelerator.is_main_process else logging.ERROR, format="%(message)s")
    torch.set_float32_matmul_precision("high")  # TF32 where there is such a thing
    torch.backends.cudnn.benchmark = True
    set_seed(options.seed)
    return accelerator


@contextmanager
def held_output_dir(accelerator: Accelerator, folder: str) -> Iterator[None]:
    """Hold the output folder for this run: the main process locks it, the others wait until it has."""
    with folder_lock(folder) if accelerator.is_main_process else nullcontext():
        accelerator.wait_for_everyone()
        yield


def warn_of_missing_processes() -> None:
    """`accelerate launch --cpu --num_processes 2` prepares an address for two processes, and starts one."""
    if "MASTER_PORT" in os.environ and "RANK" not in os.environ:
        logger.warning(
            "accelerate launch started one process only; for several on a CPU, launch with "
            "--config_file accelerate_configs/cpu.yaml --num_processes N"
        )
