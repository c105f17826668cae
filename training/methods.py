"""The timestep sampler of a method, from options."""

import json
from collections.abc import Callable
from typing import Any

import torch
from diffusers import DDPMScheduler

from samplers import PARTS, Method, NoiseSchedule, TimestepSampler, make_timestep_sampler, resolve_method

from .options import MethodOptions

OPTIONS_OF_PARTS = ("timestep_sampler_options", "loss_weighting_options", "error_filter_options")


def method_parts(options: MethodOptions) -> dict[str, str | None]:
    """{part: name, or None for the method's own} of a method, as `samplers.make_timestep_sampler` takes them."""
    return {name: getattr(options, name) for name in PARTS}


def method_of(options: MethodOptions) -> Method:
    """The method, with the parts that replace its own."""
    return resolve_method(options.method, **method_parts(options))


def options_of_parts(options: MethodOptions) -> dict[str, dict[str, Any]]:
    """{name of the option: {name: value}, as given} of a method's parts."""
    return {name: dict(getattr(options, name)) for name in OPTIONS_OF_PARTS}


def flags_of_parts(options: MethodOptions) -> list[str]:
    """These as flags; none where nothing was given."""
    return [f"--{name} {json.dumps(given)}" for name, given in options_of_parts(options).items() if given]


def build_sampler(
    options: MethodOptions,
    schedule: NoiseSchedule | DDPMScheduler,
    sample_images: Callable[[], torch.Tensor],
    seed: int,
    device: torch.device | str,
) -> TimestepSampler:
    """The method's timestep sampler.

    Args:
        sample_images: makes a sample of the training data, [N, C, H, W] in [-1, 1], if the method needs one.

    Raises:
        ValueError: names or settings that cannot be used.
    """
    of_others = options_of_parts(options)
    given = of_others.pop("timestep_sampler_options")
    flag = " ".join([f"--method {options.method}", *flags_of_parts(options)])
    of_the_run = {"seed", "device", "images", "prediction_type", "gradient_accumulation_steps", "low_discrepancy"}
    for name in given.keys() & {*of_the_run, *PARTS, *of_others}:
        raise ValueError(f"{flag}: {name} is no setting of a sampler's class; it has a flag, or is the run's")
    images = sample_images() if method_of(options).needs_images else None
    try:
        return make_timestep_sampler(
            schedule,
            options.method,
            **method_parts(options),
            images=images,
            low_discrepancy=options.low_discrepancy,
            seed=seed,
            device=device,
            **of_others,
            **given,
        )
    except Exception as error:  # the classes check ranges, not types
        raise ValueError(f"{flag}: {error}") from error
