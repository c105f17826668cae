"""Ours: the density of least gradient variance for a given objective, learned from the run's own losses."""

import math
from typing import Any

import torch
import torch.nn.functional as F

from .loss_aware import LossAwareSampler
from .schedule import NoiseSchedule


class AdaptiveSampler(LossAwareSampler):
    """p_t ∝ c_t * sqrt(s_t E[l_t]), w_t = c_t / (T * p_t): variance-optimal importance sampling.

    Training minimises J = sum_t c_t E[l_t], where c_t is the loss weighting: `spectral` for the method `adaptive`, with
    l_t behind a `WienerFilter`. Any density with w_t = c_t / (T p_t) has the same expected gradient; its variance is
    sum_t c_t^2 G_t / p_t - |grad J|^2, with G_t the second moment of one example's gradient at t, and is least at
    p_t ∝ c_t sqrt(G_t). The gradient at the network's output stands in for the whole one's (Katharopoulos & Fleuret
    2018, arXiv 1803.00942, bound it by the last layer's). l_t = s_t |d|^2 is a squared error d of the output, with s_t
    the `epsilon_loss_scale` of what the network predicts (1 of eps); its gradient there, 2 s_t d, has a squared norm
    ∝ s_t l_t (behind a filter nearly so: its exact sum, of v_i^2 |e_i|^2, trained no better). So sqrt(s_t E[l_t]) is
    sqrt(G_t) up to a factor - the mean loss, not IDDPM's mean squared loss.

    E[l_t] is a running mean over the last part of the run, whatever its length, since losses fall like a power of
    time: sums and counts that decay with the number of draws, both smoothed over neighbouring timesteps by a Gaussian
    before they are divided. Where s_t < 1, it is E[l_t] / s_t that is smoothed, the loss of what the network predicts:
    near pure noise l_t falls to 0 within a few timesteps, and a c_t like 1 / s_t would make much of what its neighbours
    add to it. p_t is mixed with a little uniform, so that no timestep is starved and no weight explodes;
    until `warmup` draws per timestep were seen, p_t is uniform.

    Args:
        uniform_fraction: of the draws that are uniform, in (0, 1].
        warmup: draws per timestep before the density adapts.
        memory: the running mean's time constant, as a fraction of the draws so far, positive.
        smoothing: standard deviation of the Gaussian over timesteps, as a fraction of T.
        learn_until: draws per timestep after which the density stays; as many as `warmup` leave it at its first
            estimate.
        refresh_every: updates between two renewals of the density (of `LossAwareSampler`).
    """

    corrects_for_density = True
    state_names = (*LossAwareSampler.state_names, "sums", "draws_seen")

    def __init__(
        self,
        schedule: NoiseSchedule,
        loss_weights: torch.Tensor | None = None,
        *,
        uniform_fraction: float = 0.1,
        warmup: float = 5.0,
        memory: float = 0.2,
        smoothing: float = 0.005,
        learn_until: float = math.inf,
        **options: Any,
    ) -> None:
        if not 0 < uniform_fraction <= 1:
            raise ValueError(f"uniform_fraction must be in (0, 1], not {uniform_fraction}")
        if not memory > 0:
            raise ValueError(f"memory must be positive, not {memory}")
        super().__init__(schedule, loss_weights, **options)
        T = self.num_train_timesteps
        self.uniform_fraction = uniform_fraction
        self.memory = memory
        self.warmup_draws = warmup * T
        self.last_draws = learn_until * T
        self._kernel = self._table(gaussian_kernel(smoothing * T))
        self._smoothed_in = self._epsilon_loss_scale.clamp(1e-12, 1.0)  # not 0, as s_t of v at zero SNR
        self.sums = torch.zeros(2, T, device=self.device)  # decayed sum of losses; decayed count of draws
        self.draws_seen = torch.zeros((), device=self.device)

    def expected_loss(self) -> torch.Tensor:
        """[T] the current estimate of E[l_t]."""
        radius = len(self._kernel) // 2
        # Not a convolution: cuDNN may choose another algorithm on another process, and tables must be alike on all.
        sums = torch.stack([self.sums[0] / self._smoothed_in, self.sums[1]])
        windows = F.pad(sums, (radius, radius)).unfold(-1, len(self._kernel), 1)
        losses, draws = (windows * self._kernel).sum(-1)
        overall = sums[0].sum() / sums[1].sum().clamp_min(1.0)
        # As if the overall mean had been seen once: defined before any draw
        return self._smoothed_in * (losses + overall) / (draws + 1)

    def _renew(self, pending):
        draws = pending[1].sum()
        still_learns = self.draws_seen < self.last_draws
        self.draws_seen += draws
        forgotten = draws / (self.memory * self.draws_seen).clamp_min(1.0)
        self.sums.mul_(torch.exp(-forgotten)).add_(pending)
        optimal = self.loss_weights * (self._epsilon_loss_scale * self.expected_loss()).sqrt()
        ready = (self.draws_seen >= self.warmup_draws) & (optimal.sum() > 0)
        optimal = torch.where(ready, optimal / optimal.sum(), 1 / self.num_train_timesteps)
        f = self.uniform_fraction
        density = (1 - f) * optimal + f / self.num_train_timesteps
        self._set_density(torch.where(still_learns, density, self.probabilities))


def gaussian_kernel(std: float) -> torch.Tensor:
    """[2r + 1] a Gaussian of standard deviation `std` timesteps, cut at r = 3 std."""
    radius = math.ceil(3 * std)
    t = torch.arange(-radius, radius + 1)
    return torch.exp(-0.5 * (t / max(std, 1e-6)) ** 2)
