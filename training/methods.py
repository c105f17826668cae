"""The timestep sampler of a method, from options."""

import json
from collections.abc import Callable

import torch
from diffusers import DDPMScheduler

from samplers import PARTS, Method, NoiseSchedule, TimestepSampler, make_timestep_sampler, resolve_method

from .options import MethodOptions


def method_parts(options: MethodOptions) -> dict[str, str | None]:
    """{part: name, or None for the method's own} of a method, as `samplers.make_timestep_sampler` takes them."""
    return {name: getattr(options, name) for name in PARTS}


def method_of(options: MethodOptions) -> Method:
    """The method, with the parts that replace its own."""
    return resolve_method(options.method, **method_parts(options))


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
    of_all = {"timestep_sampler_options": given, **of_others}
    flag = f"--method {options.method}" + "".join(
        f" --{name} {json.dumps(some)}" for name, some in of_all.items() if some
    )
    for name in given.keys() & {"seed", "device", "images", "low_discrepancy", *PARTS, *of_others}:
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
