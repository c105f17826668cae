"""CLTS, a curriculum learning based timestep schedule (Xu et al. 2024, "Towards Faster Training of Diffusion Models: An
Inspiration of A Consistency Phenomenon", arXiv 2404.07946): from uniform to a Gaussian over t."""

from typing import Any

import torch

from .base import TimestepSampler
from .checks import check_counts, check_fractions, check_positive
from .schedule import NoiseSchedule


class CLTSSampler(TimestepSampler):
    """p_t = (1 - lambda) U(t) + lambda N(t; mu, sigma^2), lambda = min(n / N, 1) at update n. Touches p_t alone.

    Easier timesteps, the noisy ones, are drawn less and less often. The density changes the objective: w_t is the loss
    weighting alone (`none` with this method). Nothing is learned from the run; n counts updates.

    Sources, and where this departs from them: no code by the authors was found. The mixture, mu = 0.3 T and N = 50,000
    are as in SpeeD's comparison (github.com/NUS-HPC-AI-Lab/SpeeD, `clts`); that mu = 0.3 was found best is also in the
    public reviews of the paper. No source at hand states sigma: 0.3 T is a choice made here. SpeeD's code has
    exp(-(t - mu)^2 / 2 * T^2), which is a point mass at mu, with the normaliser of sigma = T, which is hardly a change
    from uniform; nor does it normalise the Gaussian over the T timesteps, as is done here. Beyond N updates lambda
    stays at 1. The paper's momentum decay (MDLRC) belongs to the optimiser and is left out.

    Args:
        mu: the Gaussian's mean, as a fraction of T, in [0, 1].
        sigma: its standard deviation, as a fraction of T.
        num_updates: N, the updates until lambda = 1, 1 or more.
        refresh_every: updates between two renewals of the density.

    Raises:
        ValueError: a mu that is no fraction, a sigma that is not positive, or no updates.
    """

    def __init__(
        self,
        schedule: NoiseSchedule,
        loss_weights: torch.Tensor | None = None,
        *,
        mu: float = 0.3,
        sigma: float = 0.3,
        num_updates: int = 50_000,
        refresh_every: int = 100,
        **options: Any,
    ) -> None:
        check_fractions(mu=mu)
        check_positive(sigma=sigma)
        check_counts(num_updates=num_updates, refresh_every=refresh_every)
        self.mu, self.sigma = mu, sigma
        self.num_updates, self.refresh_every = num_updates, refresh_every
        super().__init__(schedule, loss_weights, **options)
        T = self.num_train_timesteps
        t = torch.arange(T, dtype=torch.float64) / T
        gaussian = torch.exp(-0.5 * ((t - mu) / sigma) ** 2)
        self._gaussian = self._table(gaussian / gaussian.sum())

    def _begin_update(self, update: int) -> None:
        if update % self.refresh_every == 0:
            progress = min(update / self.num_updates, 1.0)
            self._set_density((1 - progress) / self.num_train_timesteps + progress * self._gaussian)
