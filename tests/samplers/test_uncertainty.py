"""EDM2's learned uncertainty, against the paper's loss and Adam's own steps on it."""

import numpy as np
import pytest
import torch
from sampler_helpers import (
    T,
    adapt,
    falling_loss,
    log_sigma_edges,
    make_sampler,
    residual_loss,
    scheduler,
    squares,
    tables,
    train_on,
)
from scipy import stats

from samplers import make_timestep_sampler, weightings


def test_uncertainty_weighs_the_denoised_image_as_edm2_does():
    """lambda(sigma) / e^u ‖D - y‖^2 = w_t ‖eps - eps_theta‖^2."""
    sampler = adapt(make_timestep_sampler(scheduler(), "edm2", loss_weighting="edm"))
    generator = torch.Generator().manual_seed(0)
    t = torch.arange(0, T, 37)
    image, noise, error = torch.randn(3, len(t), 48, generator=generator, dtype=torch.float64)
    sigma = tables().sigma[t, None]
    denoised = (image + sigma * noise) - sigma * (noise + 0.1 * error)
    lambda_ = (sigma**2 + 0.5**2) / (sigma * 0.5) ** 2
    edm2 = lambda_ / sampler.log_uncertainty[t, None].exp() * (denoised - image) ** 2
    ours = sampler.relative_weights()[t, None].double() * (0.1 * error) ** 2
    torch.testing.assert_close(ours, edm2, rtol=1e-5, atol=0)


def test_uncertainty_density_is_edm2s_for_pixels():
    mass = np.diff(stats.norm.cdf(log_sigma_edges("linear", T), loc=-0.8, scale=1.6))
    np.testing.assert_allclose(make_sampler("uncertainty").probabilities, mass / mass.sum(), rtol=2e-4, atol=1e-7)


def test_uncertainty_takes_the_steps_that_adam_takes_on_edm2s_loss():
    generator = torch.Generator().manual_seed(0)
    sampler = make_sampler("uncertainty", "edm", refresh_every=1)
    features = sampler._features
    v = torch.zeros(128, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([v], lr=0.01, betas=(0.9, 0.99))
    c = weightings.edm(tables()).float().double()
    for _ in range(30):
        t = sampler.sample(64).timesteps
        losses = falling_loss(T)[t] * squares(generator, 64)
        sampler.update(t, losses)
        u = (features @ v)[t]
        adam.zero_grad()
        (c[t] * losses.double() / u.exp() + u).mean().backward()
        adam.step()
    torch.testing.assert_close(sampler.coefficients, v.detach(), rtol=1e-4, atol=1e-6)
    assert float(features.square().sum(1).mean()) == pytest.approx(1, rel=0.1)  # unit variance, as EDM2's


def test_edm2_weighs_every_noise_level_alike_from_the_untrained_network_on():
    sampler = make_timestep_sampler(scheduler(), "edm2")
    torch.testing.assert_close(sampler.weights, torch.ones(T))  # times a loss of 1
    for num_updates in (100, 400):
        train_on(sampler, residual_loss(), num_updates, batch_size=64)
        contributions = (sampler.weights * residual_loss())[sampler.probabilities > 1e-4]
        assert contributions.max() < 4 * contributions.median()


@pytest.mark.parametrize("weighting", ["edm", "none"])
def test_uncertainty_learns_the_expected_loss(weighting):
    """At the minimum of l / e^u + u every timestep's weighted loss is 1, whatever the weighting was."""
    generator = torch.Generator().manual_seed(0)
    sampler = make_sampler("uncertainty", weighting)
    for _ in range(1000):
        t = sampler.sample(128).timesteps
        sampler.update(t, falling_loss(T)[t] * squares(generator, 128))
    weighted = sampler.relative_weights() * falling_loss(T)
    often_drawn = sampler.probabilities > 1e-4
    assert float(weighted[often_drawn].log().abs().max()) < 0.6
    assert float((sampler.probabilities * weighted).sum()) == pytest.approx(1, abs=0.1)
    assert float(sampler.log_uncertainty[often_drawn].std()) > 0.5  # it had something to learn
