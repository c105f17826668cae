"""InfoNoise: the entropy rate of a Gaussian in closed form, and its averages by bin."""

from collections import deque

import numpy as np
import pytest
import torch
from sampler_helpers import (
    T,
    begin,
    falling_loss,
    make_sampler,
    random_images,
    residual_loss,
    scheduler,
    tables,
    total_variation,
    train_on,
)

from samplers import make_timestep_sampler, weightings
from samplers.info_noise import interpolate_missing
from samplers.loss_aware import NOTHING


def gaussian_channel_loss():
    """[T] the least epsilon-loss there is for images of unit variance: mmse / sigma^2 = 1 / (1 + sigma^2)."""
    return 1 / (1 + tables().sigma ** 2)


def information_density(mmse, weighting, pivot=0.15):
    """pi = rho / w with both of the loss of the denoised image, per unit of sigma; then per timestep."""
    sigma = tables().sigma.numpy()
    w = weighting.numpy() / sigma**2
    pi = mmse.double().numpy() / sigma**3 * sigma**3 / (sigma**3 + pivot**3) / w
    p = pi * np.gradient(sigma)
    return p / p.sum()


@pytest.mark.parametrize("pivot", [None, 0.15])
def test_info_noise_follows_the_entropy_rate_of_a_gaussian(pivot):
    sampler = begin(make_sampler("info_noise", "edm", warmup=100, gate_pivot=pivot))
    loss = gaussian_channel_loss().float()
    before = sampler.probabilities.clone()
    for _ in range(99):
        sampler.update(torch.arange(T), loss)
    assert torch.equal(sampler.probabilities, before)  # EDM's own until it is warm
    np.testing.assert_allclose(before, make_sampler("log_normal", "edm").probabilities)
    sampler.update(torch.arange(T), loss)
    sigma = tables().sigma.numpy()
    rate = loss.numpy() / sigma
    onset = max(s for s, r in zip(sigma, rate, strict=True) if r >= 0.002 * rate.max())
    expected = information_density(tables().sigma ** 2 * loss, weightings.edm(tables()), pivot or onset)
    assert total_variation(sampler.probabilities, torch.from_numpy(expected)) < 0.05
    assert (sampler.relative_weights() == sampler.loss_weights).all()  # the objective's weight stays


def test_info_noise_spends_nothing_on_the_noisy_end_of_a_real_network():
    """0.003 of the noise is left at sigma = 157, 75 of the image, and most of the noisy end is never drawn."""
    variance, sigma = 0.25, tables().sigma
    images = variance**0.5 * random_images()
    sampler = make_timestep_sampler(scheduler(), "info_noise", images=images, warmup=100)
    train_on(sampler, residual_loss(variance), num_updates=200, batch_size=1000)
    mmse = variance * sigma**2 / (variance + sigma**2)
    expected = torch.from_numpy(information_density(mmse, weightings.edm(tables())))
    assert total_variation(sampler.probabilities, expected) < 0.05
    assert float(sampler.probabilities[900:].sum()) < 1e-3
    trained_on, expected = sampler.probabilities * sampler.weights, expected * weightings.edm(tables())
    assert total_variation(trained_on / trained_on.sum(), expected / expected.sum()) < 0.05
    assert (sampler.mmse() <= sampler.data_variance).all()


def test_info_noise_bounds_the_mmse_by_the_variance_of_the_images():
    assert make_sampler("info_noise", images=3 * random_images()).data_variance == pytest.approx(9, rel=0.1)
    with pytest.raises(ValueError, match=r"no `images`, of which timestep_sampler 'info_noise' would be made"):
        make_timestep_sampler(scheduler(), "info_noise")


def test_info_noises_product_does_not_depend_on_the_weighting():
    products = []
    for weighting in ("none", "edm", "min_snr"):
        sampler = begin(make_sampler("info_noise", weighting, warmup=0, floor=1e-9))
        for _ in range(100):
            sampler.update(torch.arange(T), falling_loss(T))
        products.append(sampler.probabilities * sampler.weights)
    for product in products[1:]:
        torch.testing.assert_close(product / product.sum(), products[0] / products[0].sum(), rtol=1e-3, atol=1e-9)


def test_info_noise_averages_the_last_losses_of_each_bin():
    sampler = begin(make_sampler("info_noise", refresh_every=1, images=9 * random_images()))
    bin_of = sampler._bin_of_timestep
    t = int((bin_of == bin_of.mode().values).nonzero()[0])
    seen, average = deque(maxlen=256), None
    generator = torch.Generator().manual_seed(0)
    for _ in range(40):
        losses = torch.rand(10, generator=generator)
        sampler.update(torch.full((10,), t), losses)
        seen.extend((float(tables().sigma[t]) ** 2 * losses).tolist())  # of the denoised image
        if len(seen) >= 50:
            average = np.mean(seen) if average is None else 0.1 * average + 0.9 * np.mean(seen)
            assert float(sampler.bin_mmse[bin_of[t]]) == pytest.approx(average, rel=1e-4)
            assert float(sampler.mmse().min()) == pytest.approx(average, rel=1e-4)  # all that is known
        else:
            assert not sampler.mmse().isfinite().any()


def test_missing_bins_are_interpolated():
    n = NOTHING
    values = torch.tensor([n, n, 2.0, n, n, n, 6.0, 1.0, n])
    assert interpolate_missing(values).tolist() == [2, 2, 2, 3, 4, 5, 6, 1, 1]
