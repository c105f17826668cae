"""The spectral weighting: the data's component variances, and what an error at t does to a finished image."""

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from test_samplers import every_schedule, tables

from image_data import open_images
from samplers import component_variances, make_timestep_sampler, weightings


def digits(count=512):
    return open_images("digits", resolution=8).sample(count)


def test_components_of_stationary_images_are_their_principal_components():
    """White noise blurred on a torus, in three mixed channels: against the eigenvalues of the full covariance."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.tensor([[1.0, 0.5, 0.2], [0.0, 0.6, 0.3], [0.0, 0.0, 0.2]], dtype=torch.float64)
    white = torch.randn(4000, 3, 6, 6, generator=generator, dtype=torch.float64)
    images = torch.einsum("cd,ndhw->nchw", mixing, white + white.roll(1, 2) + 0.5 * white.roll(1, 3)) + 0.3
    variances = component_variances(images).sort().values
    principal = torch.linalg.eigvalsh(torch.cov(images.flatten(1).T))
    assert len(variances) == 3 * 6 * 6
    assert float(variances.sum()) == pytest.approx(float(principal.sum()), rel=1e-9)
    upper = slice(54, None)  # the smallest are lost in what 4,000 images say about them
    np.testing.assert_allclose(variances[upper], principal[upper], rtol=0.25)


def test_variances_add_up_to_the_images_variance_whatever_the_batching():
    images = digits()
    variances = component_variances(images)
    assert float(variances.sum()) == pytest.approx(float(images.double().var(0).sum()), rel=1e-9)
    torch.testing.assert_close(component_variances(images, batch_size=7), variances, rtol=1e-9, atol=1e-12)
    assert float(variances.min()) >= 0


@pytest.mark.parametrize(
    "images", [torch.zeros(1, 1, 8, 8), torch.ones(16, 3, 8, 8), torch.full((4, 1, 8, 8), float("nan"))]
)
def test_images_that_do_not_vary_are_refused(images):
    with pytest.raises(ValueError, match=r"do not vary.*--loss_weighting none"):
        component_variances(images)


def test_missing_or_flattened_images_are_refused():
    with pytest.raises(ValueError, match="'spectral' needs `images`"):
        make_timestep_sampler(DDPMScheduler(), "adaptive")
    with pytest.raises(ValueError, match=r"\[N, C, H, W\], not \[512, 64\]"):
        make_timestep_sampler(DDPMScheduler(), "adaptive", images=digits().flatten(1))


@every_schedule
def test_white_data_of_unit_variance_give_the_bell(schedule, T):
    c = weightings.spectral(tables(schedule, T), torch.ones(5))
    np.testing.assert_allclose(c, weightings.bell(tables(schedule, T), k=2.0), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("beta_schedule", ["linear", "squaredcos_cap_v2"])
def test_weight_is_the_square_of_what_an_error_does_to_the_finished_image(beta_schedule):
    """Against diffusers' own ancestral sampling of Gaussian data with the perfect network, and an error at one t: the
    finished image moves by R_i(t), and sum_i R_i^2 = (2 d log sigma / dt) c_t, up to one factor for all t."""
    T, s2 = 1000, torch.tensor([25.0, 4.0, 0.3, 0.02], dtype=torch.float64)
    scheduler = DDPMScheduler(T, beta_schedule=beta_schedule, clip_sample=False)
    abar = scheduler.alphas_cumprod.double()

    def finished(error_at):
        generator, x = torch.Generator().manual_seed(0), torch.ones(1, 4, dtype=torch.float64)
        for t in range(T - 1, -1, -1):
            eps = (1 - abar[t]).sqrt() * x / (s2 * abar[t] + 1 - abar[t]) + 1.0 * (t == error_at)
            x = scheduler.step(eps, t, x, generator=generator).prev_sample
        return x[0]

    undisturbed = finished(None)
    at = torch.tensor([30, 100, 250, 400, 550, 700, 850])
    moved = torch.stack([(finished(int(t)) - undisturbed).square().sum() for t in at])
    schedule = tables(beta_schedule, T)
    log_sigma_slope = torch.gradient(schedule.sigma.log())[0][at]
    ratio = moved / (weightings.spectral(schedule, s2)[at] * log_sigma_slope)
    np.testing.assert_allclose(ratio / ratio.mean(), np.ones(len(at)), atol=0.06)


def test_larger_images_move_the_weight_to_higher_noise():
    """A smooth field at twice the resolution has larger low-frequency components: they are decided at more noise."""
    generator = torch.Generator().manual_seed(0)
    frequencies = torch.fft.fftfreq(32) * 32
    amplitude = 1 / (1 + frequencies[:, None].square() + frequencies.square())
    large = torch.fft.ifft2(torch.fft.fft2(torch.randn(256, 1, 32, 32, generator=generator)) * amplitude).real
    large = large / large.std() / 2
    small = torch.nn.functional.avg_pool2d(large, 2)

    def centre(images):
        c = weightings.spectral(tables(), component_variances(images))
        return float((c * torch.arange(1000)).sum() / c.sum())

    assert centre(large) > centre(small) + 30


def test_a_batch_is_enough_of_the_data():
    a, b = (weightings.spectral(tables(), component_variances(digits(count))) for count in (64, 1797))
    assert float((a - b).abs().mean()) < 0.1  # of mean 1
