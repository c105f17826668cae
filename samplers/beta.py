"""B-TTDM, Beta-Tuned Timestep Diffusion Model (Zheng et al., ECCV 2024): timesteps from a Beta distribution."""

from typing import Any

import torch

from .base import TimestepSampler
from .checks import check_positive
from .schedule import NoiseSchedule


class BetaSampler(TimestepSampler):
    """t / T ~ Beta(alpha, beta): a density ∝ x^(alpha - 1) (1 - x)^(beta - 1). Touches p_t alone.

    The paper argues that the data's distribution changes most at the clean end of the forward process, and draws more
    there. Over the t-th of T equal intervals of (0, 1), each factor is integrated by itself, which is exact where alpha
    or beta is 1, and no factor's pole is lost. The density changes the objective: w_t is the loss weighting alone, and
    the paper's with this density is `none`.

    Sources: neither the paper's text nor code by its authors was at hand. A public port quotes its section 3.3 for
    alpha < 1 and beta = 1; that alpha is 0.8 is a choice made here.

    Args:
        alpha: positive; under 1 there is a pole at the clean end.
        beta: positive; under 1 there is one at the noisy end.
    """

    def __init__(
        self,
        schedule: NoiseSchedule,
        loss_weights: torch.Tensor | None = None,
        *,
        alpha: float = 0.8,
        beta: float = 1.0,
        **options: Any,
    ) -> None:
        check_positive(alpha=alpha, beta=beta)
        self.alpha, self.beta = alpha, beta
        super().__init__(schedule, loss_weights, **options)

    def initial_density(self, schedule: NoiseSchedule) -> torch.Tensor:
        x = torch.linspace(0, 1, schedule.num_train_timesteps + 1, dtype=torch.float64)
        return (x**self.alpha).diff() * -((1 - x) ** self.beta).diff()
