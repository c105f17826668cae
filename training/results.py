"""What a run makes of its averaged weights, outside of the training clock: the pipeline, sample grids, scores."""

from functools import partial
from typing import NamedTuple

from diffusers import AutoencoderKL, DDPMScheduler

from pipelines import Pipeline, make_grid_image, make_pipeline, null_label, sample_images

from .ema import averaged_network
from .evaluation import Evaluator
from .log import TrainingLog
from .metrics import bin_of_timestep
from .options import SampleOptions
from .output import OutputDir
from .saving import save_pipeline
from .state import TrainingState
from .stopping import StopCondition
from .validation import ValidationLoss

MOST_COLUMNS = 20


class PipelineParts(NamedTuple):
    """What a pipeline has beside its network.

    Attributes:
        id2label: {0: "airplane", ...}; None without classes.
        vae: of whose latents the network is; None for images.
    """

    noise_scheduler: DDPMScheduler
    id2label: dict[int, str] | None = None
    vae: AutoencoderKL | None = None


class Results:
    """Saves what there is of a run now. All processes must call its methods.

    Args:
        stop: whose signals end a grid or a score that is under way: nothing of the run depends on them.
        seed: of samples.
        evaluator, validation: None for no scores, or no validation loss.
    """

    def __init__(
        self,
        options: SampleOptions,
        state: TrainingState,
        parts: PipelineParts,
        output: OutputDir,
        log: TrainingLog,
        stop: StopCondition,
        seed: int,
        evaluator: Evaluator | None,
        validation: ValidationLoss | None,
    ):
        self.options, self.state, self.parts, self.output = options, state, parts, output
        self.log, self.stop, self.seed = log, stop, seed
        self.evaluator, self.validation = evaluator, validation
        self.accelerator, self.clock = state.accelerator, state.clock

    def save_pipeline(self) -> None:
        """Save the pipeline that people load."""
        with self.clock.phase("save"):
            pipeline = self._pipeline()
            if self.accelerator.is_main_process:
                save_pipeline(pipeline, self.output)

    def save_samples(self, name: str) -> None:
        """Save a grid of samples, `samples/{name}.png`."""
        if not self.options.eval_batch_size:
            return
        with self.clock.phase("preview"):
            pipeline = self._pipeline()
            if self.accelerator.is_main_process:
                pipeline.to(self.accelerator.device).set_progress_bar_config(desc="sampling", leave=False, disable=None)
                numbers, steps = range(self.options.eval_batch_size), self.options.ddpm_num_inference_steps
                images = self.stop.unless_signalled(partial(sample_images, pipeline, numbers, self.seed, steps))
                if images is not None:
                    self.log.save_grid(make_grid_image(images.cpu(), self._columns()), f"samples/{name}.png")
            self.accelerator.wait_for_everyone()

    def _columns(self) -> int | None:
        """Of a grid: one for each class, if there are few; image i is of class i mod N."""
        num_classes = len(self.parts.id2label or {})
        return num_classes if 1 < num_classes <= min(MOST_COLUMNS, self.options.eval_batch_size) else None

    def log_score(self) -> None:
        """Write a score of samples to the log."""
        with self.clock.phase("eval"):
            score = self.evaluator.score(self._pipeline(), self.stop.is_signalled)
            if score is not None:
                self.log.add({self.evaluator.name: score}, **self.evaluator.settings)

    def log_validation_loss(self, last: bool = False) -> None:
        """Write the loss on the validation images to the log, by timestep. last: as in `TrainingLog.write`."""
        with self.clock.phase("validation"):
            network = averaged_network(self.accelerator, self.state.network, self.state.ema)
            loss, by_timestep = self.validation.measure(
                network.to(self.accelerator.device), self.parts.noise_scheduler, null_label(network.config)
            )
            names = timestep_ranges(self.validation.num_train_timesteps, len(by_timestep))
            scalars = {f"validation_loss_by_timestep/{name}": v for name, v in zip(names, by_timestep, strict=True)}
            self.log.add({"validation_loss": loss}, scalars, last, validation_loss_by_timestep=by_timestep)

    def _pipeline(self) -> Pipeline:
        network = averaged_network(self.accelerator, self.state.network, self.state.ema)
        scheduler = DDPMScheduler.from_config(self.parts.noise_scheduler.config)
        return make_pipeline(network, scheduler, self.parts.id2label, self.parts.vae)


def timestep_ranges(num_train_timesteps: int, num_bins: int) -> list[str]:
    """[num_bins] "050-099": the timesteps of each bin, which sort as they read."""
    bins = bin_of_timestep(num_train_timesteps, num_bins)
    width = len(str(num_train_timesteps - 1))
    edges = [(bins == i).nonzero()[[0, -1], 0].tolist() for i in range(num_bins)]
    return [f"{first:0{width}}-{last:0{width}}" for first, last in edges]
