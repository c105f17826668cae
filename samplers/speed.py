"""SpeeD (Wang et al. 2024, arXiv 2405.17403): draw the nearly converged noisy end less often."""

from typing import Any, NamedTuple

import torch

from .base import TimestepSampler
from .checks import check_positive
from .schedule import NoiseSchedule


class SpeeDSampler(TimestepSampler):
    """p_t = k / Z for t < tau and 1 / Z above; half of a batch is the mirror image of the other half.

    The mirror image of t is m - t below m and t - m above it, as in the authors' code, so the density that results
    (`probabilities`) is not k : 1 exactly. tau and m are those of `boundaries`. In the authors' batches of n, n / 2 + 1
    are drawn and n / 2 - 1 are their mirror images. Of a part of the schedule, a timestep whose mirror image is outside
    is its own.
    The density changes the objective: w_t is the loss weighting alone (the paper's is `change_aware`).

    Its state holds k, tau and m: a resumed run draws as it began, whatever a version makes of the boundaries.

    Args:
        k: how many times as often a timestep below tau is drawn.

    Raises:
        ValueError: the schedule never converges in this sense, so it has no tau.
    """

    state_names = ("k", "tau", "mirror")

    def __init__(
        self, schedule: NoiseSchedule, loss_weights: torch.Tensor | None = None, *, k: float = 5.0, **options: Any
    ) -> None:
        check_positive(k=k)
        self.k = k
        super().__init__(schedule, loss_weights, **options)

    def initial_density(self, schedule: NoiseSchedule) -> torch.Tensor:
        self.tau, self.mirror = boundaries(schedule.whole, "timestep sampler 'speed'")
        return self._density()

    def _density(self):
        return torch.where(self._timesteps() < self.tau, self.k, 1.0)

    def _timesteps(self):
        return self._schedule.first + torch.arange(self.num_train_timesteps)

    def _set_density(self, density):
        t, m = self._timesteps(), self.mirror
        mirrored = torch.where(t < m, m - t, t - m)
        self._mirror_of = (torch.where((mirrored < t[0]) | (mirrored > t[-1]), t, mirrored) - t[0]).to(self.device)
        asymmetric = self._table(density / density.sum())
        mirrored = torch.zeros_like(asymmetric).index_add_(0, self._mirror_of, asymmetric)
        self.probabilities = (asymmetric + mirrored) / 2
        self._draw_from(asymmetric)

    def _restore_density(self, probabilities):
        self._set_density(self._density())  # of which `probabilities` are one half

    def _draw(self, num_draws, generator):
        half = super()._draw((num_draws + 1) // 2, generator)
        both = torch.cat([half, self._mirror_of[half]])
        kept = torch.rand(len(both), generator=generator, device=self.device).argsort()[:num_draws]
        return both[kept].sort().values


class Boundaries(NamedTuple):
    """Where density and weights change, and where timesteps are mirrored."""

    tau: int
    mirror: int


def boundaries(schedule: NoiseSchedule, needed_by: str) -> Boundaries:
    """The first timestep from which sqrt(1 - abar_t), the noise's standard deviation, rises by less than 0.1 / T.

    That is the paper's rule, 1e-4 for its T = 1000, and both boundaries are the same timestep: 641 on DDPM's schedule.
    The authors' code has others there, which are taken over for that schedule: tau is set to 700 in its configurations
    (github.com/NUS-HPC-AI-Lab/SpeeD), and what the rule finds there, plus one, mirrors alone.

    Raises:
        ValueError: there is no such timestep; the message names `needed_by`.
    """
    if is_ddpms(schedule):
        return Boundaries(tau=700, mirror=642)
    T = schedule.num_train_timesteps
    slope = torch.gradient((1 - schedule.alphas_cumprod).sqrt())[0]
    rising = slope >= 0.1 / T
    if rising[-1] or not rising.any():
        raise ValueError(
            f"{needed_by} cannot be used with this noise schedule: its noise level rises by at most "
            f"{float(slope.max()) * T:.3g} / T and at the last timestep by {float(slope[-1]) * T:.3g} / T, so SpeeD's "
            "boundary tau, where that falls under 0.1 / T, does not exist"
        )
    tau = int(rising.nonzero().max()) + 1
    return Boundaries(tau, mirror=tau)


def is_ddpms(schedule: NoiseSchedule) -> bool:
    """Whether it is DDPM's own (arXiv 2006.11239, section 4): beta from 1e-4 to 0.02 in 1000 equal steps."""
    ddpms = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)
    return len(ddpms) == schedule.num_train_timesteps and torch.allclose(schedule.alphas_cumprod, ddpms, rtol=1e-3)
