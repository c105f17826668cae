"""Loss weightings against their papers' formulas, and the conversion between prediction types."""

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_loss_weighting_for_sd3
from sampler_helpers import alphas_cumprod, every_schedule, every_schedule_with_signal, scheduler, tables

from samplers import NoiseSchedule, epsilon_loss_scale, weightings


@every_schedule
def test_none_is_ddpms_simple_loss(schedule, T):
    assert (weightings.none(tables(schedule, T)) == 1).all()


@every_schedule
@pytest.mark.parametrize("gamma", [5.0, 1.0])
def test_min_snr_for_each_prediction_type(schedule, T, gamma):
    """min(snr, gamma) on the x_0-loss, / snr on the epsilon-loss, / (snr + 1) on the v-loss (arXiv 2303.09556)."""
    snr = alphas_cumprod(schedule, T) / (1 - alphas_cumprod(schedule, T))
    c = weightings.min_snr(tables(schedule, T), gamma)
    has_signal = snr > 0
    expected = np.minimum(snr, gamma)[has_signal] / snr[has_signal]
    np.testing.assert_allclose(c[has_signal], expected, rtol=1e-9)
    assert (c[~has_signal] == 1).all()  # the limit
    on_v, on_x0 = (c * epsilon_loss_scale(tables(schedule, T), kind) for kind in ("v_prediction", "sample"))
    np.testing.assert_allclose(on_v, np.minimum(snr, gamma) / (snr + 1), rtol=1e-9)
    np.testing.assert_allclose(on_x0, np.minimum(snr, gamma), rtol=1e-9)


@every_schedule
def test_p2(schedule, T):
    snr = alphas_cumprod(schedule, T) / (1 - alphas_cumprod(schedule, T))
    np.testing.assert_allclose(weightings.p2(tables(schedule, T)), 1 / (1 + snr), rtol=1e-9)
    np.testing.assert_allclose(weightings.p2(tables(schedule, T), k=2.0, gamma=0.5), (2 + snr) ** -0.5, rtol=1e-9)


def perturbed(schedule, T):
    """x_0, eps and a wrong eps [64, 3, 4, 4] at 64 timesteps t with some signal, in float64."""
    generator = torch.Generator().manual_seed(0)
    x0, eps, error = (torch.randn(64, 3, 4, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    return x0, eps, eps + 0.1 * error, torch.linspace(0, T - 2, 64).long()


def mean_square(x):
    return x.square().mean((1, 2, 3))


@every_schedule
@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
def test_edm_is_its_own_loss_on_the_denoised_image(schedule, T, sigma_data):
    """E[(sigma^2 + sd^2) / (sigma sd)^2 |D(x_0 + sigma n) - x_0|^2], with D from the predicted epsilon."""
    x0, eps, predicted, t = perturbed(schedule, T)
    abar = tables(schedule, T).alphas_cumprod[t].view(-1, 1, 1, 1)
    sigma = ((1 - abar) / abar).sqrt()
    denoised = (x0 + sigma * eps) - sigma * predicted
    lambda_ = (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2
    c = weightings.edm(tables(schedule, T), sigma_data)[t]
    torch.testing.assert_close(c * mean_square(predicted - eps), lambda_.flatten() * mean_square(denoised - x0),
                               rtol=1e-6, atol=0)  # fmt: skip


@every_schedule_with_signal
def test_a_network_of_v_is_edms_with_a_sigma_data_of_1(schedule, T):
    """D(x; sigma) = c_skip x + c_out F(c_in x) (arXiv 2206.00364, table 1) with F = -v, and so is its weighted loss."""
    x0, eps, _, t = perturbed(schedule, T)
    abar = tables(schedule, T).alphas_cumprod[t].view(-1, 1, 1, 1)
    sigma, x = ((1 - abar) / abar).sqrt(), x0 + ((1 - abar) / abar).sqrt() * eps
    c_skip, c_out, c_in = 1 / (sigma**2 + 1), sigma / (sigma**2 + 1).sqrt(), 1 / (sigma**2 + 1).sqrt()
    ddpm = DDPMScheduler.from_config(scheduler(schedule, T).config, prediction_type="v_prediction", clip_sample=False)
    v = torch.sin(3 * ddpm.add_noise(x0, eps, t))  # of some network
    denoised = c_skip * x + c_out * -torch.sin(3 * c_in * x)
    for i in range(0, 64, 8):
        theirs = ddpm.step(v[i], int(t[i]), ddpm.add_noise(x0, eps, t)[i]).pred_original_sample
        torch.testing.assert_close(denoised[i], theirs, rtol=1e-3, atol=1e-4)
    lambda_ = ((sigma**2 + 1) / sigma**2).flatten()
    of_v = mean_square(v - ddpm.get_velocity(x0, eps, t))
    torch.testing.assert_close(lambda_ * mean_square(denoised - x0), of_v, rtol=1e-3, atol=0)
    v_scale = epsilon_loss_scale(tables(schedule, T), "v_prediction")
    torch.testing.assert_close(weightings.edm(tables(schedule, T), sigma_data=1.0) * v_scale, torch.ones_like(v_scale))
    published = weightings.edm(tables(schedule, T)) * v_scale  # a sigma_data of 0.5: level but for a factor of 4
    assert 1 <= published.min() <= published.max() <= 4 + 1e-9


@every_schedule
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_epsilon_loss_scale_converts_each_prediction_types_loss(schedule, T, prediction_type):
    x0, eps, predicted_eps, t = perturbed(schedule, T)
    ddpm = scheduler(schedule, T)
    noisy = ddpm.add_noise(x0, eps, t)
    abar = ddpm.alphas_cumprod[t].double().view(-1, 1, 1, 1)
    predicted_x0 = (noisy - (1 - abar).sqrt() * predicted_eps) / abar.sqrt()  # the same network's, at the same x_t
    target, prediction = {
        "epsilon": (eps, predicted_eps),
        "sample": (x0, predicted_x0),
        "v_prediction": (ddpm.get_velocity(x0, eps, t), ddpm.get_velocity(predicted_x0, predicted_eps, t)),
    }[prediction_type]
    scale = epsilon_loss_scale(tables(schedule, T), prediction_type)[t]
    torch.testing.assert_close(scale * mean_square(prediction - target), mean_square(predicted_eps - eps),
                               rtol=1e-5, atol=0)  # fmt: skip


def test_epsilon_loss_scale_refuses_other_prediction_types_by_name():
    with pytest.raises(ValueError, match="score"):
        epsilon_loss_scale(tables(), "score")


def bell_where_there_is_signal(schedule, T, k):
    """[T - 1] without the last timestep: for k < 2 the weight at abar = 0 is infinite."""
    return weightings.bell(NoiseSchedule(tables(schedule, T).alphas_cumprod[:-1]), k).numpy()


@every_schedule
@pytest.mark.parametrize("k", [1.0, 2.0, 3.0])
def test_bell_has_its_mass_per_unit_of_log_sigma(schedule, T, k):
    """The share of sum_t c_t in each stretch of timesteps = that of the integral over its stretch of log sigma."""
    abar = alphas_cumprod(schedule, T)[:-1]  # the last may have infinite sigma
    log_sigma = 0.5 * np.log((1 - abar) / abar)
    grid = np.linspace(-12, 30, 400001)
    integral = np.cumsum((1 / (np.exp(grid) + np.exp(-grid))) ** k)  # sigma / (1 + sigma^2)
    edges = np.linspace(0, T - 2, 11).astype(int)
    expected = np.diff(np.interp(log_sigma[edges], grid, integral))
    c = bell_where_there_is_signal(schedule, T, k)
    cumulative = np.cumsum(c) - c / 2  # half of a timestep's mass lies below it
    share = np.diff(cumulative[edges])
    np.testing.assert_allclose(share / share.sum(), expected / expected.sum(), atol=4e-3 if T > 50 else 2e-2)


@every_schedule
def test_bell_closed_forms(schedule, T):
    abar = alphas_cumprod(schedule, T)
    noise_gained = -np.gradient(abar)  # k = 2: c_t ∝ -d abar / dt
    np.testing.assert_allclose(weightings.bell(tables(schedule, T)), noise_gained / noise_gained.mean(), rtol=1e-6)
    assert float(weightings.bell(tables(schedule, T)).mean()) == pytest.approx(1)
    turned = np.gradient(np.arccos(np.sqrt(abar[:-1])))[1:-1]  # k = 1: uniform in the angle
    c = bell_where_there_is_signal(schedule, T, 1.0)[1:-1]
    curved = np.abs(c / c.mean() / (turned / turned.mean()) - 1)
    assert np.quantile(curved, 0.9) < 0.02  # the two finite differences differ where the schedule bends most


@pytest.mark.parametrize("ceiling", [0.6, 0.8])
def test_change_aware_range(ceiling):
    c = weightings.change_aware(tables(), ceiling)
    change = np.gradient(1 - alphas_cumprod())
    assert float(c[:700].max()) == pytest.approx(ceiling)
    assert int(c[:700].argmax()) == int(np.argmax(change))
    lowest = 1 - ceiling + (2 * ceiling - 1) * (change[699] - min(change)) / (max(change) - min(change))
    assert float(c[:700].min()) == pytest.approx(min(lowest, float(c[0])))
    assert (c[700:] == 1).all()


@every_schedule
def test_debiased_for_each_prediction_type(schedule, T):
    """1 / sqrt(snr) on the epsilon-loss, sqrt(snr) on the x_0-loss, sqrt(snr) / (1 + snr) on the v-loss."""
    snr = alphas_cumprod(schedule, T) / (1 - alphas_cumprod(schedule, T))
    has_signal = snr > 0
    c = weightings.debiased(tables(schedule, T))
    for kind, expected in {
        "epsilon": 1 / np.sqrt(snr[has_signal]),
        "sample": np.sqrt(snr[has_signal]),
        "v_prediction": np.sqrt(snr[has_signal]) / (1 + snr[has_signal]),
    }.items():
        converted = (c * epsilon_loss_scale(tables(schedule, T), kind))[has_signal]
        np.testing.assert_allclose(converted, expected, rtol=1e-9)


@every_schedule_with_signal
def test_v_is_the_plain_loss_of_a_network_of_v(schedule, T):
    x0, eps, predicted_eps, t = perturbed(schedule, T)
    ddpm = scheduler(schedule, T)
    abar = ddpm.alphas_cumprod[t].view(-1, 1, 1, 1).double()
    x = abar.sqrt() * x0 + (1 - abar).sqrt() * eps
    predicted_x0 = (x - (1 - abar).sqrt() * predicted_eps) / abar.sqrt()  # the same network's, at the same x_t
    v_losses = mean_square(ddpm.get_velocity(predicted_x0, predicted_eps, t) - ddpm.get_velocity(x0, eps, t))
    weights = weightings.v(tables(schedule, T))[t]
    torch.testing.assert_close(weights * mean_square(predicted_eps - eps), v_losses, rtol=1e-5, atol=0)


def flow_losses(schedule, T):
    """(t, s, velocity losses, epsilon-losses) of 64 timesteps and the times s of a straight flow with as much noise."""
    x0, eps, predicted_eps, t = perturbed(schedule, T)
    sigma = tables(schedule, T).sigma[t].view(-1, 1, 1, 1)
    s = sigma / (1 + sigma)
    x = (1 - s) * x0 + s * eps
    predicted_x0 = (x - s * predicted_eps) / (1 - s)
    velocity_losses = mean_square((predicted_eps - predicted_x0) - (eps - x0))
    return t, s.flatten(), velocity_losses, mean_square(predicted_eps - eps)


@every_schedule_with_signal
def test_flow_is_the_plain_loss_of_a_straight_flows_velocity(schedule, T):
    t, _, velocity_losses, losses = flow_losses(schedule, T)
    torch.testing.assert_close(weightings.flow(tables(schedule, T))[t] * losses, velocity_losses, rtol=1e-6, atol=0)


@every_schedule_with_signal
def test_cosmap_is_diffusers_weighting_of_the_flows_loss(schedule, T):
    t, s, velocity_losses, losses = flow_losses(schedule, T)
    expected = compute_loss_weighting_for_sd3("cosmap", s) * velocity_losses
    torch.testing.assert_close(weightings.cosmap(tables(schedule, T))[t] * losses, expected, rtol=1e-6, atol=0)
