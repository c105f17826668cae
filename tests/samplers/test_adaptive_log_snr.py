"""VDM++'s adaptive density over log-SNR, one loss after the other."""

import numpy as np
import pytest
import torch
from sampler_helpers import T, adapt, alphas_cumprod, falling_loss, make_sampler, tables, total_variation

from samplers import weightings


def test_adaptive_log_snr_keeps_an_average_of_the_weighted_loss_by_bin():
    """One loss after the other, bin by bin, as a public port of VDM++ does."""
    generator = torch.Generator().manual_seed(0)
    sampler = make_sampler("adaptive_log_snr", "p2", refresh_every=1)
    log_snr = np.log(alphas_cumprod() / (1 - alphas_cumprod()))
    width = np.abs(np.gradient(log_snr))
    per_lambda = weightings.p2(tables()).numpy() / width  # w(lambda)
    edges = np.linspace(log_snr[-1], log_snr[0], 101)
    bins = (np.searchsorted(edges, log_snr, side="right") - 1).clip(0, 99)
    average = np.array([per_lambda[bins == b].mean() if (bins == b).any() else 0 for b in range(100)])
    np.testing.assert_allclose(sampler.bin_losses, average, rtol=1e-3)
    np.testing.assert_allclose(average[bins] * width * 1000, 1000 * weightings.p2(tables()).numpy(), rtol=0.3)
    for _ in range(200):
        t = int(torch.randint(T, (), generator=generator))
        losses = torch.full((5,), float(torch.rand((), generator=generator)))
        sampler.update(torch.full((5,), t), losses)
        for loss in losses.tolist():
            average[bins[t]] = 0.999 * average[bins[t]] + 0.001 * per_lambda[t] * loss
    expected = average[bins] * width
    np.testing.assert_allclose(sampler.probabilities, 0.999 * expected / expected.sum() + 0.001 / T, rtol=2e-3)
    product = sampler.probabilities * sampler.weights * T
    p2 = weightings.p2(tables())
    torch.testing.assert_close(product, (p2 / p2.mean()).float(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("weighting", ["none", "bell", "min_snr"])
def test_adaptive_log_snr_ends_where_every_draw_contributes_the_same(weighting):
    sampler = make_sampler("adaptive_log_snr", weighting, ema_rate=0.99)
    for _ in range(50):
        adapt(sampler)
    contribution = sampler.weights * falling_loss(T)
    spread = contribution[sampler.probabilities > 1e-5].log()
    assert float(spread.quantile(0.95) - spread.quantile(0.05)) < 0.25
    target = weightings.none(tables()) if weighting == "none" else getattr(weightings, weighting)(tables())
    target = target * falling_loss(T)
    assert total_variation(sampler.probabilities, target / target.sum()) < 0.03
