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
            is_own = parameter.kind is parameter.KEYWORD_ONLY and parameter.name not in kind.settled_options
            if is_own and is_number and parameter.name != "seed":
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
    with pytest.raises(ValueError, match=rf"^{name} must "):
        make_timestep_sampler(DDPMScheduler(), "ddpm", timestep_sampler=sampler, images=images_of(8), **{name: value})


@pytest.mark.parametrize(
    ("sampler", "location"), [("log_normal", "p_mean"), ("logit_normal", "m"), ("curriculum", "m"), ("laplace", "mu")]
)
def test_a_distribution_of_noise_levels_that_the_schedule_does_not_have_is_refused(sampler, location):
    """A location that was given as a timestep."""
    with pytest.raises(ValueError, match=r"has log sigma from -4\.8 to 5\.06, where the distribution .* has no mass"):
        make_timestep_sampler(DDPMScheduler(), "ddpm", timestep_sampler=sampler, **{location: 300})


@pytest.mark.parametrize(
    ("weighting", "option", "values"),
    [
        ("min_snr", "gamma", [0, -1, math.nan, math.inf]),
        ("p2", "k", [0, -1, math.nan]),
        ("p2", "gamma", [0, -1, math.nan]),
        ("change_aware", "ceiling", [-0.1, 1.1, math.nan]),
        ("edm", "sigma_data", [0, -1, math.nan]),
        ("logit_normal", "s", [0, -1, math.nan]),
        ("logit_normal", "sigma_data", [0, -1]),
        ("scaled_logit_normal", "s", [0, -0.7]),
        ("scaled_logit_normal", "noise_fraction", [-0.1, 1.05, math.nan]),
        ("bell", "k", [0, -1]),
        ("spectral", "power", [-1, 2, math.nan]),
        ("spectral_ode", "power", [-1, 2]),
    ],
)
def test_a_number_that_no_weighting_can_use_is_refused_by_name(weighting, option, values):
    for value in values:
        with pytest.raises(ValueError, match=f"^{option} must "):
            weighted(weighting, {option: value})


@pytest.mark.parametrize(("weighting", "option"), [("min_snr", "gamma"), ("scaled_logit_normal", "s")])
def test_an_option_of_another_type_is_refused_with_the_weighting(weighting, option):
    with pytest.raises(ValueError, match=f"options {{'{option}': 'x'}} of loss_weighting '{weighting}': "):
        weighted(weighting, {option: "x"})


def test_weights_of_which_none_is_positive_are_refused():
    with pytest.raises(ValueError, match=r"at timestep 0 the weight is 0\.0 .*, and nowhere above 0"):
        weighted("logit_normal", {"m": 1e6})


def weighted(weighting, options):
    return make_timestep_sampler(
        DDPMScheduler(), "ddpm", loss_weighting=weighting, loss_weighting_options=options, images=images_of(8)
    )


def test_what_would_never_have_an_effect_is_refused():
    with pytest.raises(ValueError, match=r"min_bin_count must not exceed bin_history \(8\), as 9 does"):
        make_timestep_sampler(DDPMScheduler(), "info_noise", images=images_of(8), bin_history=8, min_bin_count=9)
    with pytest.raises(ValueError, match="queue_length must be an integer of at least 2, not 1"):
        make_timestep_sampler(DDPMScheduler(), "kim", queue_length=1)
