"""IDDPM's resampler by the second moment of the loss, against its authors' algorithm with lists."""

from collections import deque

import numpy as np
import pytest
import torch
from sampler_helpers import T, adapt, assert_same_state, begin, falling_loss, make_sampler, squares, state_bits

from samplers.loss_aware import NOTHING, latest, push


def test_push_is_a_deque_for_each_row():
    generator = torch.Generator().manual_seed(0)
    history = torch.full((5, 4), NOTHING)
    deques = [deque(maxlen=4) for _ in range(5)]
    for batch_size in (1, 3, 30, 7, 0, 100, 2):
        rows = torch.randint(5, (batch_size,), generator=generator)
        values = torch.rand(batch_size, generator=generator)
        usable = torch.rand(batch_size, generator=generator) < 0.8
        history = push(history, rows, values, usable)
        for row, value in zip(rows[usable].tolist(), values[usable], strict=True):
            deques[row].append(value)
        for row, expected in zip(history, deques, strict=True):
            assert row.tolist() == [NOTHING] * (4 - len(expected)) + [float(value) for value in expected]


def test_latest_keeps_the_order():
    n = NOTHING
    rows = torch.tensor([[n, 1, 2, n, n, 3], [n, n, n, n, n, n], [1, 2, 3, 4, 5, 6]])
    assert latest(rows, 3).tolist() == [[1, 2, 3], [n, n, n], [4, 5, 6]]


class ResamplerByHand:
    """IDDPM's resampler as its authors describe it, with lists."""

    def __init__(self):
        self.losses = [[] for _ in range(T)]

    def update(self, timesteps, losses):
        for t, loss in zip(timesteps.tolist(), losses.tolist(), strict=True):
            self.losses[t] = [*self.losses[t], loss][-10:]

    def density(self):
        if min(map(len, self.losses)) < 10:
            return np.full(T, 1 / T)
        second_moment = np.array([np.mean(np.square(history)) for history in self.losses])
        return 0.999 * np.sqrt(second_moment) / np.sqrt(second_moment).sum() + 0.001 / T


@pytest.mark.parametrize("refresh_every", [1, 7])
def test_loss_second_moment_is_iddpms_resampler(refresh_every):
    generator = torch.Generator().manual_seed(0)
    sampler = begin(make_sampler("loss_second_moment", refresh_every=refresh_every))
    by_hand = ResamplerByHand()
    warmed_up = 0
    for _ in range(126):
        timesteps = torch.randint(T, (400,), generator=generator)
        timesteps[:15] = timesteps[0]  # more than a history holds
        losses = falling_loss(T)[timesteps] * squares(generator, 400)
        by_hand.update(timesteps, losses)
        sampler.update(timesteps, losses)
        if sampler.updates % refresh_every == 0:
            np.testing.assert_allclose(sampler.probabilities, by_hand.density(), rtol=1e-4)
        warmed_up += bool((sampler.probabilities != sampler.probabilities[0]).any())
    assert 10 < warmed_up < 100
    np.testing.assert_allclose(sampler.weights * sampler.probabilities * T, 1, rtol=1e-5)


def test_a_broken_loss_is_not_kept_in_a_history():
    clean, dirty = make_sampler("loss_second_moment"), make_sampler("loss_second_moment")
    adapt(clean)
    adapt(dirty)
    for sampler, bad in ((clean, torch.nan), (dirty, torch.inf)):
        adapt(sampler, torch.where(torch.arange(T) % 3 == 0, bad, falling_loss(T)))
    assert_same_state(state_bits(clean), state_bits(dirty))
