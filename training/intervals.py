"""When something is due between two updates."""

from typing import NamedTuple

from .options import TrainingOptions
from .state import TrainingState
from .stopping import agreed_maximum


class Interval:
    """Tells when something is due that comes each so many steps, images or seconds of training.

    Args:
        state: of the run; what was due before it stands where it does is past.
        steps, images, seconds: between two times; None or 0 for never.
    """

    def __init__(
        self,
        state: TrainingState,
        *,
        steps: int | None = None,
        images: int | None = None,
        seconds: float | None = None,
    ):
        self.state, self.steps, self.images, self.seconds = state, steps, images, seconds
        self.times = self._times()

    def is_due(self) -> bool:
        """Whether it is due after the update just made. With seconds a collective: all processes must call it."""
        state = self.state
        by_steps = bool(self.steps) and state.step % self.steps == 0
        by_images = bool(self.images) and (
            state.images // self.images > (state.images - state.images_per_step) // self.images
        )
        if not self.seconds:
            return by_steps or by_images
        by_seconds = bool(agreed_maximum(state.accelerator, state.step, int(self._times() > self.times)))
        self.times = max(self.times, self._times()) if by_seconds else self.times
        return by_steps or by_images or by_seconds

    def _times(self) -> int:
        return int(self.state.clock.seconds("train") // self.seconds) if self.seconds else 0


class Intervals(NamedTuple):
    """Of what a run does between two updates."""

    log: Interval
    samples: Interval
    score: Interval
    validation: Interval
    pipeline: Interval
    checkpoint: Interval


def plan_intervals(options: TrainingOptions, state: TrainingState, images_per_epoch: int) -> Intervals:
    """As the options say."""
    return Intervals(
        log=Interval(state, steps=options.logging_steps),
        samples=Interval(state, images=(options.save_images_epochs or 0) * images_per_epoch),
        score=Interval(state, steps=options.eval_steps, seconds=options.eval_seconds),
        validation=Interval(state, steps=options.validation_steps),
        pipeline=Interval(state, images=(options.save_model_epochs or 0) * images_per_epoch),
        checkpoint=Interval(state, steps=options.checkpointing_steps),
    )
