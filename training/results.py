"""What a run makes of its averaged weights, outside of the training clock: the pipeline, sample grids, scores."""

from functools import partial

from diffusers import DDPMPipeline

from pipelines import ClassConditionalPipeline, make_grid_image, sample_images

from .denoiser import Denoiser
from .ema import averaged_pipeline
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
        denoiser: Denoiser,
        output: OutputDir,
        log: TrainingLog,
        stop: StopCondition,
        seed: int,
        evaluator: Evaluator | None,
        validation: ValidationLoss | None,
    ):
        self.options, self.state, self.denoiser, self.output = options, state, denoiser, output
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
        classes = self.denoiser.classes or []
        return len(classes) if 1 < len(classes) <= min(MOST_COLUMNS, self.options.eval_batch_size) else None

    def log_score(self) -> None:
        """Write a score of samples to the log."""
        with self.clock.phase("eval"):
            score = self.evaluator.score(self._pipeline(), self.stop.is_signalled)
            if score is not None:
                self.log.add({self.evaluator.name: score}, **self.evaluator.settings)

    def log_validation_loss(self, last: bool = False) -> None:
        """Write the loss on the validation images to the log, by timestep. last: as in `TrainingLog.write`."""
        with self.clock.phase("validation"):
            network, denoiser = self._pipeline().unet.to(self.accelerator.device), self.denoiser
            loss, by_timestep = self.validation.measure(network, denoiser.noise_scheduler, denoiser.classes)
            names = timestep_ranges(self.validation.num_train_timesteps, len(by_timestep))
            scalars = {f"validation_loss_by_timestep/{name}": v for name, v in zip(names, by_timestep, strict=True)}
            self.log.add({"validation_loss": loss}, scalars, last, validation_loss_by_timestep=by_timestep)

    def _pipeline(self) -> DDPMPipeline | ClassConditionalPipeline:
        denoiser = self.denoiser
        return averaged_pipeline(
            self.accelerator, denoiser.network, self.state.ema, denoiser.noise_scheduler, denoiser.classes
        )


def timestep_ranges(num_train_timesteps: int, num_bins: int) -> list[str]:
    """[num_bins] "050-099": the timesteps of each bin, which sort as they read."""
    bins = bin_of_timestep(num_train_timesteps, num_bins)
    width = len(str(num_train_timesteps - 1))
    edges = [(bins == i).nonzero()[[0, -1], 0].tolist() for i in range(num_bins)]
    return [f"{first:0{width}}-{last:0{width}}" for first, last in edges]
