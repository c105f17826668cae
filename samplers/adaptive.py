"""Ours: the density of least gradient variance for a given objective, learned from the run's own losses."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from .checks import check_positive, check_shares
from .loss_aware import LossAwareSampler
from .precision import widest_float
from .schedule import NoiseSchedule


class AdaptiveSampler(LossAwareSampler):
    """p_t ∝ c_t * sqrt(s_t E[l_t]), w_t = c_t / (T * p_t): variance-optimal importance sampling.

    Training minimises J = sum_t c_t E[l_t], where c_t is the loss weighting: for the method `adaptive`
    `scaled_logit_normal`, with l_t behind a `WienerFilter`. Any density with w_t = c_t / (T p_t) has the same
    expected gradient. The variance of independent draws is sum_t c_t^2 G_t / (T^2 p_t), less a constant, with G_t
    the second moment of one example's gradient at t, and is least at p_t ∝ c_t sqrt(G_t). The gradient at the
    network's output stands in for the whole one's (Katharopoulos & Fleuret 2018, arXiv 1803.00942, bound it by the
    last layer's). l_t = s_t |d|^2 is a squared error d of the output, with s_t the `epsilon_loss_scale` of what the
    network predicts (1 of eps); its gradient there, 2 s_t d, has a squared norm ∝ s_t l_t (behind a filter nearly
    so: its exact sum, of v_i^2 |e_i|^2, trained no better). So sqrt(s_t E[l_t]) is sqrt(G_t) up to a factor - the
    mean loss, not IDDPM's mean squared loss.

    E[l_t] is a running mean over the last part of the run, whatever its length, since losses fall like a power of
    time: sums and counts that decay with the number of draws, but over a draw a timestep at the least. At t the mean is
    over the draws made nearest to it, a number of them and not of timesteps: a hundred draws are enough to begin with,
    and many tell neighbouring timesteps apart. A mean over neighbours is too large where losses fall steeply. So l_t is
    divided by what it should be before the mean is taken, and the mean multiplied by that again (Linton & Nielsen 1994,
    "A multiplicative bias reduction method for nonparametric regression"): first by s_t, where s_t < 1, as l_t then
    falls to 0 near pure noise, where a c_t like 1 / s_t would make much of what its neighbours add to it; and then, a
    second time, by the estimate that comes of this. p_t is mixed with a little uniform, so that no timestep is starved
    and no weight explodes.

    The density is uniform until the first renewal. These are `refresh_every` updates apart, and closer at first, an
    eighth of the updates so far or less, but one at the least: with many batches for each update, twenty updates are a
    thousand draws.

    Args:
        uniform_fraction: of the draws that are uniform, in (0, 1].
        memory: the running mean's time constant, as a fraction of the draws so far, positive.
        learn_until: draws per timestep after which the density stays as it is.
        refresh_every: updates between two renewals of the density, at most.
    """

    corrects_for_density = True
    state_names = (*LossAwareSampler.state_names, "sums", "draws_seen")

    def __init__(
        self,
        schedule: NoiseSchedule,
        loss_weights: torch.Tensor | None = None,
        *,
        uniform_fraction: float = 0.1,
        memory: float = 0.2,
        learn_until: float = math.inf,
        **options: Any,
    ) -> None:
        check_shares(uniform_fraction=uniform_fraction)
        check_positive(memory=memory)
        if not learn_until >= 0:
            raise ValueError(f"learn_until must not be negative, as {learn_until} is")
        super().__init__(schedule, loss_weights, **options)
        T = self.num_train_timesteps
        self.uniform_fraction = uniform_fraction
        self.memory = memory
        self.last_draws = learn_until * T
        self.sums = torch.zeros(2, T, device=self.device)  # decayed sum of losses; decayed count of draws
        self.draws_seen = torch.zeros((), device=self.device)

    def expected_loss(self) -> torch.Tensor:
        """[T] the current estimate of E[l_t]."""
        return mean_losses(self._epsilon_loss_scale.clamp(max=1.0), self.sums)

    def _is_due(self, update):
        return update % min(self.refresh_every, 2 ** max(update.bit_length() - 4, 0)) == 0

    def _renew(self, pending):
        T, f = self.num_train_timesteps, self.uniform_fraction
        draws = pending[1].sum()
        still_learns = self.draws_seen < self.last_draws
        self.draws_seen += draws
        forgotten = draws / (self.memory * self.draws_seen).clamp_min(T)
        self.sums.mul_(torch.exp(-forgotten)).add_(pending)
        optimal = self.loss_weights * (self._epsilon_loss_scale * self.expected_loss()).sqrt()
        optimal = torch.where(optimal.sum() > 0, optimal / optimal.sum(), 1 / T)
        self._set_density(torch.where(still_learns, (1 - f) * optimal + f / T, self.probabilities))


def refined(estimate: torch.Tensor, sums: torch.Tensor, smooth: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """[T] mean losses, of `sums` [2, T] of losses and of draws, over what `smooth` makes of these. What varies over
    neighbouring timesteps as `estimate` [T] does, they leave as it is."""
    estimate = estimate.clamp_min(1e-20)  # s_t of v is 0 at zero SNR
    relative = torch.stack([sums[0] / estimate, sums[1]])
    losses, draws = smooth(relative)
    overall = relative[0].sum() / relative[1].sum().clamp_min(1.0)
    return estimate * (losses + overall) / (draws + 1)  # as if that had been seen once: defined before any draw


def sums_of_nearest(sums: torch.Tensor, share: float = 0.01, least: float = 20.0) -> torch.Tensor:
    """[2, T] of `sums` [2, T] of losses and of draws, those of the draws nearest to each timestep, in the order of
    their timesteps: on either side this share of all, or so many; fewer at the ends. Draws of one timestep are alike.
    What share and number are the defaults, benchmarks/density_learning.py has measured."""
    # Of two rows: CUDA's cumsum of a single one adds in no fixed order, and tables must be alike on all processes
    up_to = F.pad(sums.to(widest_float(sums.device)).cumsum(-1), (1, 0))
    draws = up_to[1].contiguous()
    reach = (share * draws[-1]).clamp_min(least)
    middle = (draws[1:] + draws[:-1]) / 2
    ends = torch.stack([middle - reach, middle + reach]).clamp_min(0.0).minimum(draws[-1])
    after = torch.searchsorted(draws, ends, right=True).clamp_(1, sums.shape[1])
    part = (ends - draws[after - 1]) / (draws[after] - draws[after - 1]).clamp_min(1e-20)
    first, last = torch.lerp(up_to[:, after - 1], up_to[:, after], part.clamp(0.0, 1.0)).unbind(1)
    return (last - first).clamp_min(0.0).float()  # not below 0, by rounding


def mean_losses(
    expected: torch.Tensor,
    sums: torch.Tensor,
    smooth: Callable[[torch.Tensor], torch.Tensor] = sums_of_nearest,
    times: int = 2,
) -> torch.Tensor:
    """[T] the mean loss at each timestep, of `sums` [2, T] of losses and of draws, by its shape as `expected` [T] at
    first and so many times `refined`, by `sums_of_nearest` or another `smooth`."""
    for _ in range(times):
        expected = refined(expected, sums, smooth)
    return expected
