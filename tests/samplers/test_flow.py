"""Flow matching: the same samplers on a scheduler of sigmas, in its order, for a network that predicts the velocity."""

import numpy as np
import pytest
import torch
from diffusers import (
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from sampler_helpers import T, adapt, draws, falling_loss, images_of, total_variation
from scipy import stats

from samplers import (
    METHODS,
    NoiseSchedule,
    Spectrum,
    WienerFilter,
    epsilon_loss_scale,
    make_timestep_sampler,
    weightings,
)


def flow(**options):
    return FlowMatchEulerDiscreteScheduler(**options)


def tables(**options):
    return NoiseSchedule.from_scheduler(flow(**options))


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_noise_level_of_a_flow_is_its_ratio_of_noise_to_signal(shift):
    s = flow(shift=shift).sigmas.double().flip(0)[:-1]
    torch.testing.assert_close(tables(shift=shift).sigma[:-1], s / (1 - s), rtol=1e-9, atol=0)


def test_where_nothing_is_left_of_the_image_the_middle_to_the_neighbour_stands_for_it():
    assert float(flow().sigmas[0]) == 1
    assert float(tables().sigma[-1]) == pytest.approx(0.9995 / 0.0005, rel=1e-4)


def test_an_error_of_the_velocity_is_one_of_epsilon():
    """x = (1 - s) x_0 + s eps and u = eps - x_0 given: eps = x + (1 - s) u."""
    generator = torch.Generator().manual_seed(0)
    x0, eps, error = torch.randn(3, T, 5, generator=generator, dtype=torch.float64)
    s = flow().sigmas.double().flip(0)[:, None]
    x, velocity = (1 - s) * x0 + s * eps, eps - x0 + 0.1 * error
    of_epsilon = (x + (1 - s) * velocity - eps).square()
    scale = epsilon_loss_scale(tables(), "flow")
    torch.testing.assert_close(scale[:-1, None] * (0.1 * error[:-1]).square(), of_epsilon[:-1], rtol=1e-6, atol=1e-15)


def test_draws_are_indices_into_the_schedulers_own_tables():
    """SD3's density by its sampler: logit(sigma) ~ N(0, 1)."""
    scheduler = flow()
    timesteps = draws(make_timestep_sampler(scheduler, "logit_normal"), 64, 200).flatten()
    sigmas = scheduler.sigmas[timesteps].double()
    assert stats.kstest(sigmas.logit().numpy(), "norm").statistic < 0.01
    assert scheduler.timesteps[timesteps].shape == (64 * 200,)


def test_what_is_learned_is_learned_of_the_timesteps_that_were_drawn():
    scheduler = flow()
    options = {"loss_weighting": "none", "error_filter": "none", "uniform_fraction": 0.01}
    sampler = make_timestep_sampler(scheduler, "adaptive", **options)
    adapt(sampler, falling_loss(T).flip(0))  # large at the last indices, where the image is clean
    s = scheduler.sigmas.double()
    target = ((1 - s).square() * falling_loss(T).flip(0)).sqrt()
    drawn = torch.bincount(draws(sampler, 1000, 50).flatten(), minlength=T).double()
    assert total_variation(drawn / drawn.sum(), target / target.sum()) < 0.05


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_a_flow(method):
    sampler = make_timestep_sampler(flow(), method, images=images_of(16))
    images = images_of(8)
    timesteps, weights = sampler.sample(8, images=images)
    losses = sampler.losses(torch.randn(8, 1, 8, 8), timesteps)
    sampler.update(timesteps, losses)
    assert (weights * losses).isfinite().all()
    mean_weight = sampler.probabilities * sampler.weights * epsilon_loss_scale(tables(), "flow")
    assert float(mean_weight.sum()) == pytest.approx(1, rel=1e-3)  # on the velocity's own loss


def test_the_plain_loss_of_the_velocity_is_uniform_with_the_weighting_flow():
    sampler = make_timestep_sampler(flow(), "ddpm", loss_weighting="flow")
    errors = torch.randn(T, 1, 4, 4)
    timesteps = torch.arange(T)
    weighted = sampler.weights.flip(0) * sampler.losses(errors, timesteps)
    torch.testing.assert_close(weighted, errors.square().mean((1, 2, 3)), rtol=2e-3, atol=0)


def gaussian_velocity(variances, s):
    """E[eps - x_0 | x] / x of components of these variances."""
    return (s - (1 - s) * variances) / ((1 - s) ** 2 * variances + s**2)


def euler(scheduler, variances, error_at):
    """diffusers' own steps of the ODE, with an error of 1 in the velocity at one of them."""
    scheduler.set_timesteps(T)
    x = torch.ones(1, len(variances), dtype=torch.float64)
    for i, t in enumerate(scheduler.timesteps):
        velocity = gaussian_velocity(variances, scheduler.sigmas[i].double()) * x + 1.0 * (i == error_at)
        x = scheduler.step(velocity, t, x).prev_sample.double()
    return x[0]


def ancestral(scheduler, variances, error_at):
    """Draws of x at the next s, given x and the x_0 that the velocity says: DDPM's posterior, of x = (1 - s) x_0 + s
    eps. Its noise, the same with an error and without, is left out."""
    s = torch.cat([scheduler.sigmas.double(), torch.zeros(1)])
    x = torch.ones(len(variances), dtype=torch.float64)
    for i in range(1, T):  # at s = 1 nothing is known of x_0
        velocity = gaussian_velocity(variances, s[i]) * x + 1.0 * (i == error_at)
        x0, a, next_a = x - s[i] * velocity, 1 - s[i], 1 - s[i + 1]
        kept = (s[i + 1] / s[i]) ** 2 * a / next_a
        x = next_a * x0 + kept * (x - a * x0)
    return x


@pytest.mark.parametrize(
    ("sample", "error_filter", "weighting"),
    [(euler, "wiener_ode", "spectral_ode"), (ancestral, "wiener", "spectral")],
)
def test_filter_and_weighting_count_what_an_error_of_the_velocity_does_to_the_finished_image(
    sample, error_filter, weighting
):
    """Of Gaussian data, sampled by the ODE or the SDE with the perfect velocity but for one error. Of two components at
    the same noise, an error's square counts its share; of two noise levels, what it moves in all components, where
    errors of epsilon are equal: an error of 1 in u is one of 1 - s."""
    images = torch.randn(256, 1, 8, 8, generator=torch.Generator().manual_seed(0)).cumsum(2).cumsum(3) / 8
    spectrum, scheduler = Spectrum.of(images), flow()
    at, s = [100, 400, 700, 900], flow().sigmas.double()
    variances = spectrum.variances.flatten()
    undisturbed = sample(flow(), variances, None)
    moved = torch.stack([sample(flow(), variances, i) - undisturbed for i in at]).square()

    exponent = 1.0 if error_filter == "wiener_ode" else 2.0
    sampler = make_timestep_sampler(scheduler, images=images, error_filter=error_filter, loss_weighting=weighting)
    sampler.error_filter = WienerFilter(tables(), spectrum, plain_fraction=1e-9, exponent=exponent)
    chosen = [(0, 0), (0, 1), (2, 2)]
    counts = []
    for frequency in chosen:
        component = torch.zeros(1, 1, 8, 8, dtype=torch.complex128)
        component[0, 0, frequency[0], frequency[1]] = 1
        wave = torch.fft.ifft2(component, norm="ortho").real
        wave = (wave / wave.square().sum().sqrt()).float().expand(len(at), -1, -1, -1)
        counts.append(sampler.losses(wave, torch.tensor(at)))
    theirs = torch.stack([moved[:, 8 * row + column] for row, column in chosen], 1)
    ours, theirs = (values / values.sum(1, keepdim=True) for values in (torch.stack(counts, 1).double(), theirs))
    np.testing.assert_allclose(ours, theirs, rtol=0.05, atol=1e-6)

    # sum_i R_i^2 for errors of 1 in eps is c_t d log sigma / dt, up to one factor for all t
    of_epsilon = moved.sum(1) / (1 - s[at]) ** 2
    slope = torch.gradient(tables().sigma.log())[0].flip(0)[at]
    ratio = of_epsilon / (sampler.loss_weights.double().flip(0)[at] * slope)
    np.testing.assert_allclose(ratio / ratio.mean(), np.ones(len(at)), atol=0.05)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_logit_normal_objective_is_the_velocitys_loss_by_sd3s_density_whatever_the_tables(shift):
    """pi(s; 0, 1) of arXiv 2403.03206, eq. 19, times how far s goes from a timestep to the next."""
    s = flow(shift=shift).sigmas.double().flip(0)[:-1]
    on_velocity = weightings.logit_normal(tables(shift=shift)) * epsilon_loss_scale(tables(shift=shift), "flow")
    density = torch.as_tensor(stats.norm.pdf(s.logit().numpy())) / (s * (1 - s))
    tables_of = (on_velocity[:-1], density * torch.gradient(s)[0])
    ours, expected = (values[20:-20] / values[20:-20].sum() for values in tables_of)
    torch.testing.assert_close(ours, expected, rtol=2e-2, atol=0)


def test_the_objective_about_the_datas_variance_is_sd3s_of_data_divided_by_their_deviation():
    variances = torch.tensor([1.7, 0.5, 0.05, 0.01], dtype=torch.float64)
    schedule, s = tables(), 0.7
    relative = schedule.sigma / variances.mean().sqrt()
    divided = NoiseSchedule(1 / (1 + relative**2))
    bell = weightings.logit_normal(divided, s=s)
    ours = weightings.scaled_logit_normal(schedule, variances, s, noise_fraction=0.2)
    torch.testing.assert_close(ours, 0.8 * bell / bell.mean() + 0.2 * (1 - divided.alphas_cumprod))


@pytest.mark.parametrize("deviation", [0.5, 1.0, 4.0])
def test_on_the_loss_of_the_scaled_datas_velocity_the_objective_is_a_bell_about_the_datas_deviation(deviation):
    """Per unit of log sigma: its largest value, and half of it at s sqrt(2 log 2) on either side."""
    schedule, s = NoiseSchedule.from_scheduler(DDPMScheduler()), 0.7
    variances = torch.full((3,), deviation**2, dtype=torch.float64)
    on_velocity = (1 + schedule.sigma / deviation) ** -2
    bell = weightings.scaled_logit_normal(schedule, variances, s, 0.0) * on_velocity / schedule.log_sigma_slope
    level = schedule.sigma.log()
    assert float(level[bell.argmax()]) == pytest.approx(np.log(deviation), abs=0.02)
    half = s * np.sqrt(2 * np.log(2))
    at = np.interp(np.log(deviation) + np.array([-half, half]), level, bell / bell.max())
    np.testing.assert_allclose(at, 0.5, atol=0.01)


@pytest.mark.parametrize(
    ("bounds", "left"), [({"clip_sample": False}, 0.3), ({}, 0.0), ({"clip_sample": False, "thresholding": True}, 0.0)]
)
def test_where_sampling_begins_the_objective_has_a_part_unless_each_image_is_clipped_there(bounds, left):
    c = make_timestep_sampler(DDPMScheduler(**bounds), images=images_of(16)).loss_weights
    assert float(c[-1]) == pytest.approx(left, abs=1e-3)
    assert float(c[0]) < 2e-3
    assert 0.9 < float(c.mean()) <= 1.00001


@pytest.mark.parametrize(("prediction_type", "share"), [("epsilon", 0.26), ("v_prediction", 0.1)])
def test_what_the_second_part_is_of_the_objective_in_the_networks_own_loss(prediction_type, share):
    """Of data with a deviation of 1/2; of v it is next to nothing where sampling begins."""
    schedule, variances = NoiseSchedule.from_scheduler(DDPMScheduler()), torch.tensor([0.25])
    weights = [weightings.scaled_logit_normal(schedule, variances, noise_fraction=f) for f in (0.0, 0.3)]
    bell, both = (c * epsilon_loss_scale(schedule, prediction_type) for c in weights)
    second = both - 0.7 * bell
    assert float(second.sum() / both.sum()) == pytest.approx(share, abs=0.02)
    if prediction_type == "v_prediction":
        assert float(second[-1]) < 1e-4


def test_images_beyond_what_sampling_would_clip_are_taken_for_latents(caplog):
    scheduler, images = DDPMScheduler(), images_of(16)
    pixels, latents = (make_timestep_sampler(scheduler, images=scale * images) for scale in (1.0, 5.0))
    assert "reach 5" in caplog.text
    assert float(pixels.loss_weights[-1]) < 1e-3
    unclipped = make_timestep_sampler(DDPMScheduler(clip_sample=False), images=5.0 * images)
    assert torch.equal(latents.loss_weights, unclipped.loss_weights)
    part = NoiseSchedule.from_scheduler(scheduler).between(500)
    assert torch.equal(make_timestep_sampler(part, images=5.0 * images).loss_weights, latents.loss_weights[500:])


def test_the_objective_of_a_part_is_that_of_the_whole():
    whole, part = (
        make_timestep_sampler(flow(), images=images_of(16), min_timestep=low).loss_weights for low in (None, 875)
    )
    torch.testing.assert_close(part, whole[-len(part) :])


def test_the_logit_normal_objective_of_a_part_is_that_of_the_whole_and_without_any_signal_it_is_0():
    whole, part = (
        make_timestep_sampler(flow(), "ddpm", loss_weighting="logit_normal", min_timestep=low).loss_weights
        for low in (None, 875)
    )
    torch.testing.assert_close(part, whole[-len(part) :])
    no_signal = DDPMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    c = make_timestep_sampler(no_signal, "ddpm", loss_weighting="logit_normal").loss_weights
    assert c[-1] == 0
    assert c[:-1].min() > 0


def test_without_the_parts_that_are_made_from_images_a_flow_needs_none():
    with pytest.raises(ValueError, match="no `images`, of which loss_weighting 'scaled_logit_normal' and error_filter"):
        make_timestep_sampler(flow())
    make_timestep_sampler(flow(), loss_weighting="logit_normal", error_filter="none").sample(4)


def test_a_noise_level_counts_the_same_along_a_flow_as_in_ddpms_process():
    """Per unit of log sigma, whatever the tables, up to one factor; but for the noise's part."""
    levels, variances = np.linspace(-2, 2, 9), torch.tensor([0.5, 0.1], dtype=torch.float64)
    counts = [
        np.interp(levels, schedule.sigma.log(), weightings.scaled_logit_normal(schedule, variances, 0.7, 0.0) / slope)
        for schedule in (NoiseSchedule.from_scheduler(DDPMScheduler()), tables(), tables(shift=3.0))
        for slope in [schedule.log_sigma_slope]
    ]
    shares = [values / values.sum() for values in counts]
    np.testing.assert_allclose(shares[1:], shares[:1] * 2, rtol=0.01)


def test_on_the_velocitys_own_loss_the_objective_for_the_ode_is_a_bell_over_the_flows_time():
    """Of white data of unit variance: s (1 - s) / (s^2 + (1 - s)^2)."""
    s = flow().sigmas.double().flip(0)[:-2]
    on_velocity = weightings.spectral_ode(tables(), torch.ones(3)) * epsilon_loss_scale(tables(), "flow")
    bell = s * (1 - s) / (s**2 + (1 - s) ** 2)
    ours, expected = (values[20:-20] / values[20:-20].sum() for values in (on_velocity[:-2], bell))
    torch.testing.assert_close(ours, expected, rtol=5e-3, atol=0)


@pytest.mark.parametrize("weighting", ["spectral", "spectral_ode"])
def test_the_objective_of_the_same_scene_at_twice_the_width_is_shifted_as_sd3_shifts(weighting):
    """Its components are four times as strong; SD3's shift for four times the pixels is 2 (arXiv 2403.03206, eq. 23):
    by the same index, the objective says the same of the large images in the shifted table and of the small ones."""
    small = torch.tensor([30.0, 4.0, 0.5, 0.02], dtype=torch.float64)
    large = torch.cat([4 * small, torch.zeros(12)])  # with nothing finer in it
    c_small = getattr(weightings, weighting)(tables(shift=1.0), small)
    c_large = getattr(weightings, weighting)(tables(shift=2.0), large)
    torch.testing.assert_close(c_large[:-2], c_small[:-2], rtol=2e-3, atol=1e-6)


def test_a_scheduler_that_shifts_by_resolution_is_read_before_any_shift():
    """So one table holds for images of all sizes; what sampling makes of it is refused."""
    scheduler = flow(use_dynamic_shifting=True, shift=3.0)
    torch.testing.assert_close(
        NoiseSchedule.from_scheduler(scheduler).alphas_cumprod, tables(shift=1.0).alphas_cumprod, rtol=0, atol=0
    )
    scheduler.set_timesteps(T, mu=1.15)
    with pytest.raises(ValueError, match="make the timestep sampler before that, or from a copy"):
        make_timestep_sampler(scheduler, "ddpm")


@pytest.mark.parametrize("kind", [UniPCMultistepScheduler, DPMSolverMultistepScheduler])
def test_samplers_of_flows_with_the_table_of_another_process_are_refused(kind):
    """As diffusers' Wan pipelines have them."""
    scheduler = kind(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    with pytest.raises(ValueError, match=rf"{kind.__name__} with use_flow_sigmas .* give FlowMatchEulerDiscrete"):
        make_timestep_sampler(scheduler, "ddpm", prediction_type="flow")


@pytest.mark.parametrize(
    ("sigmas", "message"),
    [
        ([1.0, 0.5, 0.0], r"sigmas must be in \(0, 1\].*set_timesteps"),
        ([80.0, 1.0, 0.1], r"must be in \(0, 1\].*not 80. Is it the schedule of a straight flow\?"),
        ([0.1, 0.5, 0.9], "must fall"),
        ([1.0], "at least 2, not 1"),
    ],
)
def test_sigmas_that_are_no_flow_are_refused(sigmas, message):
    scheduler = flow()
    scheduler.sigmas = torch.tensor(sigmas)
    with pytest.raises(ValueError, match=message):
        make_timestep_sampler(scheduler, "ddpm")


@pytest.mark.parametrize(("predicted", "said"), [("epsilon", True), ("v_prediction", True), ("flow", False)])
def test_what_a_flows_network_hardly_predicts_is_said(predicted, said, caplog):
    make_timestep_sampler(flow(), "ddpm", prediction_type=predicted)
    assert (f"predict its velocity, not {predicted}" in caplog.text) == said


def test_schedulers_of_sampling_and_of_another_process_are_refused():
    scheduler = flow()
    scheduler.set_timesteps(20)
    with pytest.raises(ValueError, match=r"FlowMatchEulerDiscreteScheduler.*set_timesteps"):
        make_timestep_sampler(scheduler, "ddpm")
    with pytest.raises(ValueError, match="EDMEulerScheduler"):
        make_timestep_sampler(EDMEulerScheduler(), "ddpm")
