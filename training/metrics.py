"""What a run measures of itself: losses summed on the device, and the log they are written to."""

import json
import logging
import platform
from importlib.metadata import version

import numpy as np
import torch
from tqdm.auto import tqdm

from .output import SUMMARY_FILE
from .saving import replace_file, write_json

logger = logging.getLogger(__name__)

NUM_BINS = 20  # of timesteps, in the log
METRICS_FILE = "metrics.jsonl"


class LossMeter:
    """Running sums of the loss, its gradient's norm, and the loss by timestep bin; on the device until read.

    Args:
        num_train_timesteps: T.
        device: of the losses.
    """

    def __init__(self, num_train_timesteps, device):
        self.num_bins = min(NUM_BINS, num_train_timesteps)
        self.bin_of_timestep = bin_of_timestep(num_train_timesteps, self.num_bins).to(device)
        self.loss = torch.zeros(2, device=device)  # sum of weighted losses, number of examples
        self.norm = torch.zeros(2, device=device)  # sum of gradient norms, number of updates
        self.bins = torch.zeros(2, self.num_bins, device=device)  # sum of epsilon-losses, number of examples

    def add_losses(self, timesteps, losses, epsilon_losses):
        """timesteps, losses as trained on (weighted and filtered) and epsilon_losses (the plain mean squares, which can
        be compared from one method to another): [B], detached. Examples whose losses are not finite are left out."""
        finite = losses.isfinite() & epsilon_losses.isfinite()
        self.loss += torch.stack([torch.where(finite, losses, 0.0).sum(), finite.sum()])
        bins = self.bin_of_timestep[timesteps]
        self.bins[0].index_add_(0, bins, torch.where(finite, epsilon_losses, 0.0))
        self.bins[1].index_add_(0, bins, finite.float())

    def add_gradient_norm(self, norm):
        """norm: 0-d tensor, before clipping."""
        finite = norm.isfinite()
        self.norm += torch.stack([torch.where(finite, norm, 0.0), finite.float()])

    def read(self, accelerator):
        """(mean weighted loss, mean gradient norm, [bins] mean epsilon-losses) over all processes since the last
        call; None where nothing was added. Waits for the device."""
        sums = torch.cat([torch.stack([self.loss, self.norm], dim=1), self.bins], dim=1)
        totals, counts = accelerator.reduce(sums, "sum").tolist()
        loss, norm, *bins = [total / count if count else None for total, count in zip(totals, counts, strict=True)]
        for sums in (self.loss, self.norm, self.bins):
            sums.zero_()
        return loss, norm, [None if value is None else round(value, 6) for value in bins]

    def state_dict(self):
        """The sums, on the CPU."""
        return {name: getattr(self, name).cpu().clone() for name in ("loss", "norm", "bins")}

    def load_state_dict(self, state):
        """Restore the sums."""
        for name, value in state.items():
            getattr(self, name).copy_(value)


def bin_of_timestep(num_train_timesteps, num_bins):
    """[T] the bin of each timestep, of equal widths."""
    return torch.arange(num_train_timesteps) * num_bins // num_train_timesteps


def by_bin(table, num_bins=NUM_BINS):
    """A table over timesteps [T], averaged in bins: a list of floats."""
    table = table.detach().float().cpu()
    num_bins = min(num_bins, len(table))
    bins = bin_of_timestep(len(table), num_bins)
    sums = torch.zeros(num_bins).index_add_(0, bins, table)
    return [float(f"{value:.6g}") for value in (sums / torch.bincount(bins)).tolist()]


class TrainingLog:
    """A run's log: `metrics.jsonl`, one JSON object a line; the trackers of accelerate; the progress bar; samples.

    Files are written by the main process alone.

    Args:
        options: the run's.
        output: the run's `OutputDir`.
        max_steps: updates in all, or None where only time is limited: the bar then counts seconds.
        step, images_seen: where the run begins, or goes on: later records of an earlier life are dropped, because
            they will be made again.
        clock: the run's `PhaseClock`.
    """

    def __init__(self, accelerator, options, output, max_steps, step, images_seen, clock):
        self.accelerator, self.options, self.output, self.clock = accelerator, options, output, clock
        self.path = output.folder / METRICS_FILE
        self.images_seen, self.seconds = images_seen, clock.seconds("train")  # at the last record
        self.last_record, self.skipped_images = {}, 0
        if accelerator.is_main_process:
            output.path(METRICS_FILE)
            kept = drop_records_after(self.path, step) if self.path.exists() else []
            self.last_record = next((record for record in reversed(kept) if "loss" in record), {})
        if options.logger != "none":
            purge = {"tensorboard": {"purge_step": step + 1}} if options.logger == "tensorboard" else {}
            before = output.present(options.logging_dir)
            accelerator.init_trackers("adaptive-ddpm", init_kwargs=purge)
            if accelerator.is_main_process:
                output.add_present(options.logging_dir, before)
        self.by_time = by_time = max_steps is None
        self.progress = tqdm(
            total=options.max_train_seconds if by_time else max_steps,
            initial=round(self.seconds, 1) if by_time else step,
            unit="s" if by_time else "step",
            bar_format="{l_bar}{bar}| {n:.0f}/{total:.0f} s{postfix}" if by_time else None,
            dynamic_ncols=True,
            disable=not accelerator.is_local_main_process,
        )

    def advance(self, step):
        """Move the progress bar."""
        now = min(self.clock.seconds("train"), self.options.max_train_seconds) if self.by_time else step
        self.progress.update(now - self.progress.n)

    def write(self, step, images_seen, meter, guard, lr_scheduler, sampler, skipped_images, last=False):
        """Write a record. All processes must call it.

        Args:
            skipped_images: found unreadable so far, by this process.
            last: the run ends here, between two regular records; a resumed run drops this one.
        """
        loss, grad_norm, loss_by_timestep = meter.read(self.accelerator)
        skipped = guard.check()
        seconds = self.clock.seconds("train")
        rate = (images_seen - self.images_seen) / max(seconds - self.seconds, 1e-9)
        self.images_seen, self.seconds = images_seen, seconds
        record = {
            "step": step,
            "images": images_seen,
            "train_seconds": round(seconds, 3),
            "loss": loss,
            "lr": lr_scheduler.get_last_lr()[0],
            "grad_norm": grad_norm,
            "images_per_second": round(rate, 2),
            "skipped_updates": skipped,
            "skipped_images": skipped_images,
        }
        if skipped_images > self.skipped_images:
            logger.warning(f"step {step:,}: {skipped_images:,} unreadable images so far; others took their place")
        self.skipped_images = skipped_images
        self.accelerator.log({name: value for name, value in record.items() if value is not None}, step=step)
        self.progress.set_postfix(loss="none" if loss is None else f"{loss:.4f}", images_per_s=f"{rate:.0f}")
        record["loss_by_timestep"] = loss_by_timestep
        record["density"] = by_bin(sampler.probabilities)
        record["weight"] = by_bin(sampler.weights)
        if last:
            record["last"] = True
        self.last_record = record
        self._append(record)

    def write_score(self, step, images_seen, name, value):
        """Write a record of a score of samples."""
        self.accelerator.log({name: value}, step=step)
        self._append(
            {
                "step": step,
                "images": images_seen,
                "train_seconds": round(self.clock.seconds("train"), 3),
                name: value,
                "eval_num_images": self.options.eval_num_images,
                "eval_num_inference_steps": self.options.eval_num_inference_steps,
            }
        )

    def _append(self, record):
        if self.accelerator.is_main_process:
            with self.path.open("a") as file:
                file.write(json.dumps(record) + "\n")

    def close(self):
        """End the progress bar."""
        self.progress.close()

    def save_grid(self, image, name, step):
        """Write a PIL image under the output folder, and to the tracker."""
        path = self.output.path(name)
        path.parent.mkdir(exist_ok=True)
        replace_file(path, image.save)
        for tracker in self.accelerator.trackers:
            if tracker.name == "tensorboard":
                tracker.log_images({"samples": np.asarray(image.convert("RGB"))[None]}, step=step, dataformats="NHWC")
            elif tracker.name == "wandb":
                tracker.log_images({"samples": [image]}, step=step)

    def summary(self, step, images_seen, num_parameters, reason, data, skipped_images):
        """Write `training_summary.json`, and return it.

        Args:
            reason: why the run ended.
            data: what `ImageDataset.contents` says of the images.
            skipped_images: of them, found unreadable.
        """
        summary = {
            "steps": step,
            "images": images_seen,
            "parameters": num_parameters,
            "stopped_by": reason,
            "seconds": self.clock.report(),
            "loss": self.last_record.get("loss"),
            "skipped_updates": self.last_record.get("skipped_updates"),
            "skipped_images": skipped_images,
            "data": data,
            "processes": self.accelerator.num_processes,
            "device": device_name(self.accelerator.device),
            "mixed_precision": self.accelerator.mixed_precision,
            "versions": library_versions(),
        }
        write_json(summary, self.output.path(SUMMARY_FILE))
        return summary


def drop_records_after(path, step):
    """Cut a `metrics.jsonl` back to what a run that reached `step` had written on its way; returns those records."""
    kept = [record for record in read_metrics(path) if record["step"] <= step and not record.get("last")]
    text = "".join(json.dumps(record) + "\n" for record in kept)
    replace_file(path, lambda partial: partial.write_text(text))
    return kept


def library_versions():
    """{package: version} of what decides speed and numbers."""
    return {name: version(name) for name in ("torch", "diffusers", "accelerate")}


def device_name(device):
    """The processor as a person would name it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()} CPU, {torch.get_num_threads()} threads"


def read_metrics(path):
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
