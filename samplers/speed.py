"""SpeeD (Wang et al. 2024, arXiv 2405.17403): draw the nearly converged noisy end less often."""

from typing import Any

import torch

from .base import TimestepSampler
from .schedule import NoiseSchedule


class SpeeDSampler(TimestepSampler):
    """p_t = k / Z for t < tau and 1 / Z above; half of a batch is the mirror image of the other half.

    tau is where the process "converges": sqrt(1 - abar_t), the noise's standard deviation, rises by less than 1e-4 a
    timestep from there on (for T = 1000; 0.1 / T in general). The mirror image of t is tau - t below tau and t - tau
    above it, as in the authors' code, so the density that results (`probabilities`) is not k : 1 exactly.
    The density changes the objective: w_t is the loss weighting alone (the paper's is `change_aware`).

    Args:
        k: how many times as often a timestep below tau is drawn.

    Raises:
        ValueError: the schedule never converges in this sense, so it has no tau.
    """

    def __init__(
        self, schedule: NoiseSchedule, loss_weights: torch.Tensor | None = None, *, k: float = 5.0, **options: Any
    ) -> None:
        self.k = k
        super().__init__(schedule, loss_weights, **options)

    def initial_density(self, schedule: NoiseSchedule) -> torch.Tensor:
        t = torch.arange(schedule.num_train_timesteps)
        tau = convergence_boundary(schedule, "timestep sampler 'speed'")
        self._mirror = torch.where(t < tau, tau - t, t - tau).to(self.device)
        return torch.where(t < tau, self.k, 1.0)

    def _set_density(self, density):
        asymmetric = self._table(density / density.sum())
        mirrored = torch.zeros_like(asymmetric).index_add_(0, self._mirror, asymmetric)
        self.probabilities = (asymmetric + mirrored) / 2
        self._draw_from(asymmetric)

    def _restore_density(self, probabilities):
        """Nothing to restore: the density is the schedule's."""

    def _draw(self, num_draws, generator):
        half = super()._draw((num_draws + 1) // 2, generator)
        return torch.cat([half, self._mirror[half]])


def convergence_boundary(schedule: NoiseSchedule, needed_by: str) -> int:
    """tau: the first timestep from which d sqrt(1 - abar_t) / dt stays under 0.1 / T.

    Raises:
        ValueError: there is no such timestep; the message names `needed_by`.
    """
    T = schedule.num_train_timesteps
    slope = torch.gradient((1 - schedule.alphas_cumprod).sqrt())[0]
    rising = slope >= 0.1 / T
    if rising[-1] or not rising.any():
        raise ValueError(
            f"{needed_by} cannot be used with this noise schedule: its noise level rises by at most "
            f"{float(slope.max()) * T:.3g} / T and at the last timestep by {float(slope[-1]) * T:.3g} / T, so SpeeD's "
            "boundary tau, where that falls under 0.1 / T, does not exist"
        )
    return int(rising.nonzero().max()) + 1
