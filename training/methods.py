"""The timestep sampler of a method, from options."""

import json
from collections.abc import Callable

import torch
from diffusers import DDPMScheduler

from samplers import PARTS, Method, NoiseSchedule, TimestepSampler, make_timestep_sampler, resolve_method

from .options import MethodOptions

WITH_OPTIONS = ("timestep_sampler", "loss_weighting", "error_filter")  # the parts that have a flag for them


def method_parts(options: MethodOptions) -> dict[str, str | None]:
    """{part: name, or None for the method's own} of a method, as `samplers.make_timestep_sampler` takes them."""
    return {name: getattr(options, name) for name in PARTS}


def method_of(options: MethodOptions) -> Method:
    """The method, with the parts that replace its own."""
    return resolve_method(options.method, **method_parts(options))


def flags_of_parts(options: MethodOptions) -> list[str]:
    """The options of a method's parts, as flags; none of those that are as the parts have them."""
    given = {f"{name}_options": getattr(options, f"{name}_options") for name in WITH_OPTIONS}
    return [f"--{name} {json.dumps(dict(some))}" for name, some in given.items() if some]


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
    given = dict(options.timestep_sampler_options)
    of_others = {name: dict(getattr(options, name)) for name in ("loss_weighting_options", "error_filter_options")}
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
