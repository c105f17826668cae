"""Which timestep samplers, weightings and schedules go together, and what is refused by name."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDPMScheduler
from sampler_helpers import (
    RIVALS,
    SCHEDULES_AND_LENGTHS,
    alphas_cumprod,
    images_of,
    make_adapted,
    make_sampler,
    never_converges,
    random_images,
    scheduler,
    tables,
    weighting_table,
)

from samplers import (
    FROM_IMAGES,
    LOSS_WEIGHTINGS,
    METHODS,
    NOISE_COUPLINGS,
    PARTS,
    TIMESTEP_SAMPLERS,
    AdaptiveSampler,
    NoiseSchedule,
    UniformSampler,
    WienerFilter,
    make_timestep_sampler,
    weightings,
)


def combinations():
    """(name, weighting, schedule, T): every sampler with every weighting, on noise schedules that take turns, so that
    each of the two sees all of them."""
    for (i, name), (j, weighting) in itertools.product(enumerate(TIMESTEP_SAMPLERS), enumerate(LOSS_WEIGHTINGS)):
        yield name, weighting, *SCHEDULES_AND_LENGTHS[(i + j) % len(SCHEDULES_AND_LENGTHS)]


@pytest.mark.parametrize(("name", "weighting", "schedule", "T"), list(combinations()))
def test_a_combination_works_or_is_refused_by_name(name, weighting, schedule, T):
    culprits = set()
    if never_converges(schedule, T):
        culprits |= {"speed", "change_aware"} & {name, weighting}
    if alphas_cumprod(schedule, T)[-1] == 0:
        culprits |= {"edm", "debiased", "v", "flow", "cosmap"} & {weighting}
    if culprits:
        with pytest.raises(ValueError, match="|".join(culprits)):
            make_adapted(name, schedule, T, weighting)
        return
    sampler = make_adapted(name, schedule, T, weighting)
    p, w = sampler.probabilities, sampler.weights
    assert p.shape == w.shape == (T,)
    assert p.isfinite().all()
    assert p.min() > 0
    assert abs(float(p.double().sum()) - 1) < 1e-5
    assert w.isfinite().all()
    assert w.min() >= 0
    assert w.max() > 0


@pytest.mark.parametrize("method", METHODS)
def test_published_methods_are_built_by_name(method):
    sampler = make_timestep_sampler(scheduler(), method, images=random_images())
    name, weighting, error_filter, noise_coupling = METHODS[method]
    assert type(sampler) is TIMESTEP_SAMPLERS[name]
    assert torch.allclose(sampler.loss_weights.double(), weighting_table(weighting, tables()))
    assert isinstance(sampler.error_filter, WienerFilter) == error_filter.startswith("wiener")
    assert sampler.noise_coupling is NOISE_COUPLINGS[noise_coupling]


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, registry in PARTS.items() for name in registry])
def test_parts_that_are_made_from_images_and_no_others_need_them(kind, name):
    if name in FROM_IMAGES[kind]:
        with pytest.raises(ValueError, match=f"no `images`, of which {kind} '{name}' would be made"):
            make_timestep_sampler(scheduler(), "ddpm", **{kind: name})
    else:
        make_timestep_sampler(scheduler(), "ddpm", **{kind: name})


def test_methods_pair_the_rivals_as_published():
    assert METHODS["loss_second_moment"] == ("loss_second_moment", "none", "none", "independent")
    assert METHODS["info_noise"] == ("info_noise", "edm", "none", "independent")
    assert METHODS["kim"] == ("kim", "none", "none", "independent")
    assert list(METHODS)[-1] == list(TIMESTEP_SAMPLERS)[-1] == "adaptive"


def test_uniform_is_uniform_and_adaptive_begins_so():
    for kind in (UniformSampler, AdaptiveSampler):
        assert torch.allclose(kind(tables()).probabilities, torch.tensor(1e-3))


@pytest.mark.parametrize("kind", ["method", *PARTS])
def test_unknown_names_are_refused_with_the_known_ones(kind):
    with pytest.raises(ValueError, match=f"{kind} .*'nonsense'"):
        make_timestep_sampler(scheduler(), **{kind: "nonsense"})


@pytest.mark.parametrize(
    ("method", "option", "own"),
    [("ddpm", "horizons", []), ("edm", "mu", ["floor", "p_mean", "p_std"]), ("immiscible", "k", ["num_candidates"])],
)
def test_an_option_that_a_sampler_does_not_have_is_refused_with_those_that_it_has(method, option, own):
    common = ["gradient_accumulation_steps", "low_discrepancy", "seed"]
    message = rf"^timestep_sampler '\w+' has no option '{option}': it has {', '.join(sorted(common + own))}$"
    with pytest.raises(ValueError, match=message):
        make_timestep_sampler(scheduler(), method, **{option: 3})


def test_weighting_and_filter_take_options_of_their_own():
    made = make_timestep_sampler(
        scheduler(),
        loss_weighting="min_snr",
        loss_weighting_options={"gamma": 1.0},
        error_filter_options={"plain_fraction": 0.25, "exponent": 2},
        images=images_of(16),
    )
    schedule = NoiseSchedule.from_scheduler(scheduler())
    torch.testing.assert_close(made.loss_weights, weightings.min_snr(schedule, gamma=1.0).float())
    assert (made.error_filter.plain_fraction, made.error_filter.exponent) == (0.25, 2)
    assert make_timestep_sampler(scheduler(), images=images_of(16)).error_filter.exponent == 1


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"loss_weighting_options": {"sigma": 1}}, "loss_weighting 'none' has no option 'sigma': it has none"),
        (
            {"loss_weighting": "p2", "loss_weighting_options": {"K": 1}},
            "loss_weighting 'p2' has no option 'K': it has gamma, k",
        ),
        ({"error_filter_options": {"power": 1}}, "error_filter 'none' has no option 'power': it has none"),
        (
            {"error_filter": "wiener_ode", "error_filter_options": {"device": 1}},
            "error_filter 'wiener_ode' has no option 'device': it has exponent, plain_fraction, power",
        ),
        (
            {"loss_weighting": "p2", "loss_weighting_options": {"k": 1e-9, "gamma": 1e9}},
            r"loss_weighting 'p2' {'k': 1e-09, 'gamma': 1000000000.0} cannot be used .* the weight is inf",
        ),
    ],
)
def test_options_that_weighting_or_filter_cannot_use_are_refused(parts, message):
    with pytest.raises(ValueError, match=message):
        make_timestep_sampler(scheduler(), "ddpm", images=images_of(16), **parts)


def test_what_the_function_decides_itself_is_no_option():
    with pytest.raises(ValueError, match=r"'kim' has no option 'made_of': it has (?!.*(made_of|device|error_filter))"):
        make_timestep_sampler(scheduler(), "kim", made_of=3)


@pytest.mark.parametrize("make_config", [dict, lambda **fields: SimpleNamespace(**fields)])
def test_what_the_network_predicts_is_read_off_any_config(make_config):
    plain = SimpleNamespace(alphas_cumprod=scheduler().alphas_cumprod)
    for config, expected in ((make_config(prediction_type="v_prediction"), "v_prediction"), (make_config(), "epsilon")):
        plain.config = config
        assert make_timestep_sampler(plain, "ddpm").state_dict()["prediction_type"] == expected
    del plain.config
    assert make_timestep_sampler(plain, "ddpm").state_dict()["prediction_type"] == "epsilon"


def test_schedulers_without_a_discrete_schedule_are_refused_by_name():
    with pytest.raises(ValueError, match="SimpleNamespace has neither `alphas_cumprod` nor `sigmas`"):
        make_timestep_sampler(SimpleNamespace())
    with pytest.raises(ValueError, match="num_train_timesteps"):
        make_timestep_sampler(DDPMScheduler(num_train_timesteps=1))


@pytest.mark.parametrize("table", [[0.1, 0.5, 0.9], [1.2, 0.5, 0.1], [0.9, 0.5, -0.1], [0.9, float("nan"), 0.1]])
def test_tables_that_are_no_noise_schedule_are_refused(table):
    """Such as one in the order of sampling."""
    with pytest.raises(ValueError, match=rf"alphas_cumprod must fall .* within \[0, 1\], not from {table[0]}"):
        make_timestep_sampler(SimpleNamespace(alphas_cumprod=torch.tensor(table)), "ddpm")


@pytest.mark.parametrize("method", METHODS)
def test_weights_beyond_float32_are_refused_by_name(method):
    almost_no_signal = DDPMScheduler(num_train_timesteps=10000)  # abar_T = 3e-44: EDM's weight is 1e44
    try:
        sampler = make_timestep_sampler(almost_no_signal, method, images=random_images())
    except ValueError as error:
        assert any(name in str(error) for name in METHODS[method])  # noqa: PT017
    else:
        assert sampler.weights.isfinite().all()


@pytest.mark.parametrize("name", ["loss_second_moment", "adaptive_log_snr"])
def test_a_density_without_a_floor_is_refused(name):
    option = {"loss_second_moment": "uniform_prob", "adaptive_log_snr": "uniform_fraction"}[name]
    with pytest.raises(ValueError, match=option):
        make_sampler(name, **{option: 0.0})


@pytest.mark.parametrize("name", RIVALS)
def test_renewing_never_is_refused(name):
    with pytest.raises(ValueError, match="refresh_every"):
        make_sampler(name, refresh_every=0)


def test_a_network_that_is_not_trained_where_no_signal_is_left_is_warned_of(caplog):
    noise_scheduler = DDPMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction")
    make_timestep_sampler(noise_scheduler, "ddpm")
    assert "no signal is left at the last timestep (zero terminal SNR)" in caplog.text
    caplog.clear()
    make_timestep_sampler(noise_scheduler, "ddpm", max_timestep=998)
    make_timestep_sampler(noise_scheduler, "ddpm", prediction_type="epsilon")
    assert not caplog.text


def test_without_any_noise_errors_of_the_image_have_no_weight_that_is_finite():
    schedule = NoiseSchedule(torch.tensor([1.0, 0.5, 0.1], dtype=torch.float64))
    with pytest.raises(ValueError, match=r"abar from 1 to 0.1, of a network that predicts sample: .* inf"):
        make_timestep_sampler(schedule, "ddpm", prediction_type="sample")
    assert make_timestep_sampler(schedule, "ddpm").weights.isfinite().all()
