"""Numbers given to samplers: what a sampler cannot use is refused by the option's name."""

import inspect
import math

import pytest
from diffusers import DDPMScheduler
from sampler_helpers import images_of

from samplers import TIMESTEP_SAMPLERS, make_timestep_sampler


def numeric_options(kind):
    """{name: default} of the numbers that a sampler's class and those above it take."""
    found = {}
    for above in kind.__mro__:
        for parameter in inspect.signature(above.__init__).parameters.values():
            is_number = isinstance(parameter.default, int | float) and not isinstance(parameter.default, bool)
            if parameter.kind is parameter.KEYWORD_ONLY and is_number and parameter.name != "seed":
                found.setdefault(parameter.name, parameter.default)
    return found


MAY_BE_0 = {"warmup": {"info_noise"}, "num_updates": {"curriculum"}}
CASES = [
    (sampler, name, value)
    for sampler, kind in TIMESTEP_SAMPLERS.items()
    for name, default in numeric_options(kind).items()
    for value in ([-1, 2.5, math.nan] if isinstance(default, int) else [math.nan])
    + ([0] if isinstance(default, int) and sampler not in MAY_BE_0.get(name, ()) else [])
]


@pytest.mark.parametrize(("sampler", "name", "value"), CASES)
def test_a_number_that_no_sampler_can_use_is_refused_by_name(sampler, name, value):
    with pytest.raises(ValueError, match=rf"\b{name}\b"):
        make_timestep_sampler(DDPMScheduler(), "ddpm", timestep_sampler=sampler, images=images_of(8), **{name: value})


def test_what_would_never_have_an_effect_is_refused():
    with pytest.raises(ValueError, match=r"min_bin_count must not exceed bin_history \(8\), as 9 does"):
        make_timestep_sampler(DDPMScheduler(), "info_noise", images=images_of(8), bin_history=8, min_bin_count=9)
    with pytest.raises(ValueError, match="queue_length must be an integer of at least 2, not 1"):
        make_timestep_sampler(DDPMScheduler(), "kim", queue_length=1)
