"""What measures the averaged weights during training: a Fréchet distance of their samples, and a validation loss."""

from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator, PartialState

from images import ImageDataset, LatentDataset, training_batches
from pipelines import Pipeline, sample_images

from .clock import PhaseClock
from .data import labels_of
from .options import ScoreOptions, TrainingOptions
from .validation import ValidationLoss

MIN_REFERENCE = 10_000  # training images to compare with, if there are as many


def build_evaluator(
    options: TrainingOptions, accelerator: Accelerator, dataset: ImageDataset, clock: PhaseClock
) -> "Evaluator | None":
    """What scores samples during training, if the options want it. The global random state stays as it is.

    Raises:
        ValueError: of `Evaluator`.
    """
    if not options.eval_steps and not options.eval_seconds:
        return None
    with clock.phase("eval"), torch.random.fork_rng(devices=[]):
        evaluator = Evaluator(options, dataset, accelerator, options.seed, options.train_batch_size)
        evaluator.add_reference()
    return evaluator


def build_validation(
    options: TrainingOptions,
    accelerator: Accelerator,
    validation_images: ImageDataset | LatentDataset | None,
    classes: list[str] | None,
) -> ValidationLoss | None:
    """What measures the loss on held-out images, if there are any.

    Raises:
        ValueError: they cannot be read.
    """
    if validation_images is None:
        return None
    labels = labels_of(options, validation_images, classes)
    return ValidationLoss(validation_images, labels, options.ddpm_num_steps, options.train_batch_size, accelerator)


class Evaluator:
    """Scores samples against the training set; each process draws, and looks at, its share of the images.

    Args:
        options: how many images to draw, and how to look at them.
        dataset: the training set, of which 10,000 images (or `eval_num_images`, if that is more) are the reference.
        accelerator: whose processes share the work.
        seed: of the samples, and of the choice of the reference.
        batch_size: images at a time.

    Raises:
        ValueError: an unknown feature extractor, or one with more features than there are images to draw.
    """

    def __init__(
        self,
        options: ScoreOptions,
        dataset: ImageDataset,
        accelerator: Accelerator | PartialState,
        seed: int,
        batch_size: int,
    ):
        self.options, self.dataset, self.device = options, dataset, accelerator.device
        self.seed, self.batch_size = seed, batch_size
        self.rank, self.world_size = accelerator.process_index, accelerator.num_processes
        self.metric = load_metric(options, self.device)
        num_features = self.metric.inception.num_features
        if options.eval_num_images <= num_features:
            raise ValueError(
                f"--eval_num_images {options.eval_num_images}: must exceed the extractor's {num_features} features"
            )
        self.name = self.metric.inception.score_name
        self.has_reference = False

    @property
    def feature_extractor(self) -> dict[str, Any]:
        """{"name", "weights_sha256", "num_features"} of what looks at the images."""
        inception = self.metric.inception
        name, weights = (inception.description[key] for key in ("model", "weights_sha256"))
        return {"name": name, "weights_sha256": weights, "num_features": inception.num_features}

    @property
    def settings(self) -> dict[str, Any]:
        """What the score depends on, for a record of it."""
        return {name: getattr(self.options, name) for name in ("eval_num_images", "eval_num_inference_steps")}

    def score(self, pipeline: Pipeline, is_abandoned: Callable[[], bool] = lambda: False) -> float | None:
        """The Fréchet distance of `eval_num_images` samples; all processes must call it.

        Args:
            is_abandoned: asked by all processes before each batch; once it is true, there is no score (None).
        """
        pipeline.to(self.device).set_progress_bar_config(disable=True)
        steps = self.options.eval_num_inference_steps
        return self.score_of(lambda indices: sample_images(pipeline, indices, self.seed, steps), is_abandoned)

    def score_of(
        self, draw: Callable[[range], torch.Tensor], is_abandoned: Callable[[], bool] = lambda: False
    ) -> float | None:
        """The same of `eval_num_images` images that `draw` makes: uint8 [B, C, H, W] of the numbers of B images."""
        if not self.has_reference:
            self.add_reference()
        for indices in self._shares(self.options.eval_num_images):
            if is_abandoned():
                self.metric.reset()
                return None
            if indices:
                self.metric.update(draw(indices), real=False)
        score = self.metric.compute().item()
        self.metric.reset()  # but for the reference
        return score

    def add_reference(self) -> None:
        """Look at the reference images, once; all processes must call it. The first score does, if nobody has."""
        shares = self._shares(min(len(self.dataset), max(self.options.eval_num_images, MIN_REFERENCE)))
        batches = training_batches(
            self.dataset,
            self.batch_size,
            seed=self.seed,
            rank=self.rank,
            world_size=self.world_size,
            device=self.device,
            placement="stream",
        )
        for share, images in zip(filter(len, shares), batches, strict=False):  # the batches never end
            self.metric.update(images[: len(share)], real=True)
        self.has_reference = True

    def _shares(self, count: int) -> list[range]:
        """This process's part of the numbers 0 .. count-1, in as many batches as all others; empty ones last."""
        share, batch_size = range(self.rank, count, self.world_size), self.batch_size
        return [share[i : i + batch_size] for i in range(0, -(-count // self.world_size), batch_size)]


def load_metric(options: ScoreOptions, device: torch.device) -> Any:
    """The distance by the feature extractor that the options name. Raises ValueError."""
    from scoring.frechet_metric import make_frechet_metric  # here: it takes seconds to import, and few runs need it

    try:
        return make_frechet_metric(options.eval_feature_extractor, options.eval_feature_extractor_weights, device)
    except ValueError as error:
        raise ValueError(str(error).replace("--feature_extractor", "--eval_feature_extractor")) from error
