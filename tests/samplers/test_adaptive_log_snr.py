"""VDM++'s adaptive density over log-SNR, one loss after the other."""

import numpy as np
import pytest
import torch
from sampler_helpers import (
    T,
    adapt,
    alphas_cumprod,
    begin,
    falling_loss,
    make_sampler,
    residual_loss,
    tables,
    total_variation,
    train_on,
)

from samplers import weightings


def test_adaptive_log_snr_keeps_an_average_of_the_loss_by_bin():
    """One loss after the other, bin by bin, as a public port of VDM++ does; then corrected as Adam's averages are."""
    generator = torch.Generator().manual_seed(0)
    sampler = begin(make_sampler("adaptive_log_snr", "p2", refresh_every=1))
    p2 = weightings.p2(tables()).numpy()
    np.testing.assert_allclose(sampler.probabilities, 0.999 * p2 / p2.sum() + 0.001 / T, rtol=1e-4)
    log_snr = np.log(alphas_cumprod() / (1 - alphas_cumprod()))
    edges = np.linspace(log_snr[-1], log_snr[0], 101)
    bins = (np.searchsorted(edges, log_snr, side="right") - 1).clip(0, 99)
    averages, counts = np.zeros(100), np.zeros(100)
    for _ in range(200):
        t = int(torch.randint(T, (), generator=generator))
        losses = torch.full((5,), float(torch.rand((), generator=generator)))
        sampler.update(torch.full((5,), t), losses)
        for loss in losses.tolist():
            averages[bins[t]] = 0.999 * averages[bins[t]] + 0.001 * loss
            counts[bins[t]] += 1
    shares, seen = 1 - 0.999**counts, counts > 0
    assert 20 < seen.sum() < 90
    means = np.where(seen, averages / np.where(seen, shares, 1), averages.sum() / shares.sum())
    np.testing.assert_allclose(sampler.expected_loss(), means[bins], rtol=1e-3)
    expected = p2 * means[bins]
    np.testing.assert_allclose(sampler.probabilities, 0.999 * expected / expected.sum() + 0.001 / T, rtol=2e-3)
    product = sampler.probabilities * sampler.weights * T
    torch.testing.assert_close(product, torch.from_numpy(p2 / p2.mean()).float(), rtol=1e-4, atol=0)


def test_adaptive_log_snr_adapts_within_the_first_hundred_updates():
    """An average that starts at 1 is still far above a loss of 0.003 then."""
    sampler, loss = make_sampler("adaptive_log_snr"), residual_loss()
    train_on(sampler, loss, num_updates=100, batch_size=64)
    assert total_variation(sampler.probabilities, loss / loss.sum()) < 0.1


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
