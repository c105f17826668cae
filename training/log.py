"""What a run tells of itself while it goes on: metrics.jsonl, the tracker, the progress bar."""

import json
import logging
import sys
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from .metrics import by_bin
from .options import LogOptions
from .output import OutputDir
from .saving import replace_file
from .state import TrainingState
from .stopping import Budget

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"


class TrainingLog:
    """`metrics.jsonl`, one JSON object a line; the tracker; and a progress bar, or, where the output is no terminal, a
    line for each record.

    Files are written by the main process alone.

    Args:
        options: which tracker, and where.
        state: of the run. Later records of an earlier life are dropped, because they will be made again.
        output: the run's `OutputDir`.
        budget: of the run; where only time is limited, the bar counts seconds.
    """

    def __init__(self, options: LogOptions, state: TrainingState, output: OutputDir, budget: Budget):
        self.state, self.accelerator, self.output, self.budget = state, state.accelerator, output, budget
        self.path = output.folder / METRICS_FILE
        self.images, self.seconds = state.images, state.clock.seconds("train")  # at the last record
        self.last_record, self.skipped_images = {}, 0
        if self.accelerator.is_main_process:
            output.path(METRICS_FILE)
            kept = drop_records_after(self.path, state.step) if self.path.exists() else []
            self.last_record = next((record for record in reversed(kept) if "loss" in record), {})
        if options.logger != "none":
            self._start_tracker(options.logger, options.logging_dir)
        by_time = budget.max_steps is None
        self.progress = tqdm(
            total=budget.max_seconds if by_time else budget.max_steps,
            initial=round(self.seconds, 1) if by_time else state.step,
            unit="s" if by_time else "step",
            bar_format="{l_bar}{bar}| {n:.0f}/{total:.0f} s{postfix}" if by_time else None,
            dynamic_ncols=True,
            disable=None if self.accelerator.is_local_main_process else True,  # None: where there is no terminal
        )

    def _start_tracker(self, name: str, logging_dir: str) -> None:
        purge = {"tensorboard": {"purge_step": self.state.step + 1}} if name == "tensorboard" else {}
        before = self.output.present(logging_dir)
        self.accelerator.init_trackers("adaptive-ddpm", init_kwargs=purge)
        if self.accelerator.is_main_process:
            self.output.add_present(logging_dir, before)

    def advance(self) -> None:
        """Move the progress bar."""
        by_time = self.budget.max_steps is None
        now = min(self.state.clock.seconds("train"), self.budget.max_seconds) if by_time else self.state.step
        self.progress.update(now - self.progress.n)

    def write(self, skipped_images: int, last: bool = False) -> None:
        """Write a record of the training since the last one. All processes must call it.

        Args:
            skipped_images: found unreadable so far, by this process.
            last: the run ends here, between two regular records; a resumed run drops this one.

        Raises:
            FloatingPointError: too many updates in a row were not finite.
        """
        state = self.state
        means = state.meter.read(self.accelerator)
        seconds = state.clock.seconds("train")
        rate = (state.images - self.images) / max(seconds - self.seconds, 1e-9)
        self.images, self.seconds = state.images, seconds
        scalars = {
            "loss": means.loss,
            "lr": state.lr_scheduler.get_last_lr()[0],
            "grad_norm": means.grad_norm,
            "grad_norm_clipped": means.grad_norm_clipped,
            "images_per_second": round(rate, 2),
            "skipped_updates": state.guard.check(),
            "skipped_images": skipped_images,
        }
        if skipped_images > self.skipped_images:
            logger.warning(f"step {state.step:,}: {skipped_images:,} unreadable images so far; others took their place")
        self.skipped_images = skipped_images
        self._show(means.loss, rate)
        self.last_record = self.add(
            scalars,
            tracked={"images": state.images, "train_seconds": seconds},
            loss_by_timestep=means.loss_by_timestep,
            density=by_bin(state.sampler.probabilities),
            weight=by_bin(state.sampler.weights),
            last=last,
        )

    def add(
        self,
        scalars: dict[str, float | None],
        tracked: dict[str, float | None] | None = None,
        last: bool = False,
        **further: Any,
    ) -> dict[str, Any]:
        """Write a record of where the run stands, and return it.

        Args:
            scalars: for the record and the tracker, which has no place for None.
            tracked: for the tracker alone.
            last: as in `write`.
            further: for the record alone.
        """
        state = self.state
        seconds = round(state.clock.seconds("train"), 3)
        position = {"step": state.step, "images": state.images, "train_seconds": seconds}
        numbers = {name: value for name, value in {**scalars, **(tracked or {})}.items() if value is not None}
        self.accelerator.log(numbers, step=state.step)
        record = {**position, **scalars, **further, **({"last": True} if last else {})}
        if self.accelerator.is_main_process:
            with self.path.open("a") as file:
                file.write(json.dumps(record) + "\n")
        return record

    def _show(self, loss: float | None, images_per_second: float) -> None:
        shown = {"loss": "none" if loss is None else f"{loss:.4f}", "images_per_s": f"{images_per_second:.0f}"}
        self.progress.set_postfix(shown)
        if self.progress.disable and self.accelerator.is_local_main_process:
            of_all = f"/{self.budget.max_steps:,}" if self.budget.max_steps is not None else ""
            of_time = f" of {self.budget.max_seconds:.0f} s" if self.budget.max_seconds is not None else ""
            time = f"{timedelta(seconds=round(self.seconds))}{of_time}"
            details = ", ".join(f"{name} {value}" for name, value in shown.items())
            print(f"step {self.state.step:,}{of_all}, {time}: {details}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """End the progress bar."""
        self.progress.close()

    def save_grid(self, image: Image.Image, name: str) -> None:
        """Write a picture under the output folder, and to the tracker."""
        path = self.output.path(name)
        path.parent.mkdir(exist_ok=True)
        replace_file(path, image.save)
        for tracker in self.accelerator.trackers:
            pixels = np.asarray(image.convert("RGB"))[None]
            if tracker.name == "tensorboard":
                tracker.log_images({"samples": pixels}, step=self.state.step, dataformats="NHWC")
            elif tracker.name == "wandb":
                tracker.log_images({"samples": [image]}, step=self.state.step)


def drop_records_after(path: Path, step: int) -> list[dict[str, Any]]:
    """Cut a `metrics.jsonl` back to what a run that reached `step` had written on its way; returns those records."""
    kept = [record for record in read_metrics(path) if record["step"] <= step and not record.get("last")]
    text = "".join(json.dumps(record) + "\n" for record in kept)
    replace_file(path, lambda partial: partial.write_text(text))
    return kept


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a `metrics.jsonl`; lines that were cut short or damaged are left out, and counted in a warning."""
    records, damaged = [], 0
    for line in path.read_bytes().splitlines():
        try:
            record = json.loads(line)
            int(record["step"])
            records.append(record)
        except (ValueError, TypeError, KeyError):
            damaged += 1
    if damaged:
        logger.warning(f"{path}: {damaged} damaged line(s) left out")
    return records


def has_numbers(record: dict[str, Any], names: Iterable[str], count: int) -> bool:
    """Whether a record has whole tables of `count` numbers under these names: a line of the log may be damaged and
    still be JSON."""
    tables = [record.get(name) for name in names]
    return all(isinstance(table, list) and len(table) == count for table in tables)
