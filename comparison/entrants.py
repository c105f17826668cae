"""Who takes part in a comparison: methods, and variants of them, by the options of training that are theirs alone."""

import json
from collections.abc import Iterable
from dataclasses import fields
from typing import Any, NamedTuple

from comparison.options import ComparisonOptions
from pipelines import SCHEDULERS, denoising_steps
from recipes import did_you_mean, read_options
from samplers import METHODS
from train_adaptive_ddpm import with_default_recipe
from training.methods import method_of
from training.noise_schedule import build_noise_scheduler
from training.options import DataOptions, ScoreOptions, TrainingOptions, ValidationOptions
from training.plan import plan_run

# Options of training that a comparison decides
OF_EACH_RUN = (
    "seed",
    "method",
    "output_dir",
    "max_train_seconds",
    "max_train_steps",
    "num_epochs",
    "overwrite_output_dir",
    "resume_from_checkpoint",
    "dry_run",
)
OF_ALL = (  # and those that all entrants share
    "config",
    *(field.name for group in (DataOptions, ScoreOptions, ValidationOptions) for field in fields(group)),
)


class Entrant(NamedTuple):
    """What is raced under a name.

    Attributes:
        options: of training, over those that all share; `method` is among them.
        parts: {"timestep_sampler": name, "loss_weighting": name, ...}, what the method is made of.
        images_per_step: in an update.
    """

    options: dict[str, Any]
    parts: dict[str, str]
    images_per_step: int


def check_training_flags(training_flags: list[str]) -> None:
    """Refuse flags of training that each run has its own of.

    Raises:
        ValueError: naming the flag.
    """
    # "--seed", "--seed=1" and the assignment "seed=1" alike
    words = [flag.lstrip("-").partition("=")[0] for flag in training_flags if flag.startswith("--") or "=" in flag]
    names = {word.replace("-", "_") for word in words}
    for name in OF_EACH_RUN:
        if name in names:
            raise ValueError(
                f"--{name}: is not for a comparison, which gives each run its own, by --methods, --variants, --seeds, "
                "--max_train_seconds and --score_at_images"
            )


def plan_entrants(options: ComparisonOptions, training_flags: list[str]) -> dict[str, Entrant]:
    """{name: entrant} of those that take part; all variants are checked.

    Raises:
        ValueError: naming the variant, or the method, that cannot be trained.
    """

    def plan(name, **more):
        try:
            return plan_entrant(name, options, training_flags, **more)
        except ValueError as error:
            raise ValueError(f"--{'variants' if name in options.variants else 'methods'} {name}: {error}") from error

    entrants = {name: plan(method, **more) for name, (method, more) in options.entrants.items()}
    for name in options.variants:
        if name not in options.methods:
            plan(name)
    return entrants


def plan_entrant(name: str, options: ComparisonOptions, training_flags: list[str], **more: Any) -> Entrant:
    """The entrant of that name, tried out on stand-ins for the data; with `more` options in place of its own. Raises
    ValueError."""
    variant = options.variants.get(name, {})
    if not isinstance(variant, dict):
        raise ValueError(f"{variant!r} must be a mapping of options of training")
    check_names(variant)
    own = {"method": name, **variant} if name in METHODS else variant
    if "method" not in own:
        raise ValueError(f"needs a method, of {', '.join(METHODS)}")
    own = {**own, **more}
    training, _ = read_options(TrainingOptions, with_default_recipe([*training_flags, *assignments(own)]))
    plan_run(training)
    check_stops(options, training)
    noise_scheduler = build_noise_scheduler(training)
    for sampler in options.score_samplers:
        scheduler = SCHEDULERS[sampler].from_config(noise_scheduler.config)
        denoising_steps(scheduler, training.eval_num_inference_steps)
    return Entrant(own, method_of(training)._asdict(), training.images_per_process)


def check_names(variant: Iterable[str]) -> None:
    """Refuse options of a variant that there are not, or that are not its own. Raises ValueError."""
    names = [field.name for field in fields(TrainingOptions)]
    for name in variant:
        if name not in names:
            raise ValueError(f"there is no option {name!r}{did_you_mean(name, names)}")
        if name != "method" and name in (*OF_EACH_RUN, *OF_ALL):
            raise ValueError(f"{name} is not a variant's: the comparison decides it")


def check_stops(options: ComparisonOptions, training: TrainingOptions) -> None:
    """Refuse training that cannot be stopped where it is to be scored, and then go on. Raises ValueError."""
    if not training.checkpointing_steps:
        raise ValueError("--checkpointing_steps 0: is not for a comparison, which goes on from checkpoints")
    if not training.lr_scheduler.startswith("constant") and sum(map(len, options.ladders.values())) > 1:
        raise ValueError(
            f"--lr_scheduler {training.lr_scheduler}: falls to the end of a run, and these go on from stop to stop; "
            "score them once (by --score_at 1 alone, or one number of --score_at_images alone), or let it be constant"
        )
    for images in options.score_at_images:
        if images % training.images_per_process:
            raise ValueError(
                f"--score_at_images {images}: must be a multiple of the {training.images_per_process} images of an "
                "update (--train_batch_size times --gradient_accumulation_steps)"
            )
        training.check_warmup(images // training.images_per_process)


def assignments(options: dict[str, Any]) -> list[str]:
    """Options of training as words of its command line."""
    return [f"{name}={json.dumps(value)}" for name, value in options.items()]
