"""IDDPM (Nichol & Dhariwal 2021, arXiv 2102.09672, section 3.3, eq. 18): importance sampling by E[L_t^2]."""

from typing import Any

import torch

from .checks import check_counts, check_shares
from .loss_aware import LossHistorySampler
from .schedule import NoiseSchedule


class LossSecondMomentSampler(LossHistorySampler):
    """p_t ∝ sqrt(E[L_t^2]), sum_t p_t = 1, L = E_{t ~ p_t}[L_t / p_t]. Touches p_t; w_t corrects for it.

    E[L_t^2] is the mean square over the last 10 losses of each t; until every t has 10, p_t is uniform; 0.1 % of the
    draws stay uniform. L_t includes the loss weighting, as it would in the authors' code (`LossSecondMomentResampler`
    of github.com/openai/improved-diffusion), which the paper uses on L_vlb; `none` leaves L_simple.

    Where this departs from that code:
    - histories are tensors on the device rather than lists on the host, and processes exchange them at each renewal,
      not at every step: within one interval the processes' losses then follow each other process by process;
    - p_t is renewed every `refresh_every` updates; 1 is the authors' behaviour exactly, on one process;
    - a loss that is not finite, or exploded, is left out (there it would stay for 10 draws of its t).

    Args:
        history_per_term: losses kept of each timestep.
        uniform_prob: of the draws that are uniform, in (0, 1].
        refresh_every: updates between two renewals of the density.
    """

    corrects_for_density = True
    settled_options = frozenset({"history_length"})

    def __init__(
        self,
        schedule: NoiseSchedule,
        loss_weights: torch.Tensor | None = None,
        *,
        history_per_term: int = 10,
        uniform_prob: float = 0.001,
        **options: Any,
    ) -> None:
        check_counts(history_per_term=history_per_term)
        check_shares(uniform_prob=uniform_prob)
        self.uniform_prob = uniform_prob
        super().__init__(schedule, loss_weights, history_length=history_per_term, **options)

    def _renew(self, pending):
        density = self.loss_weights * self.history.square().mean(1).sqrt()  # infinite while one is missing
        total = density.sum()
        density = torch.where((total > 0) & total.isfinite(), density / total, 1 / self.num_train_timesteps)
        self._set_density((1 - self.uniform_prob) * density + self.uniform_prob / self.num_train_timesteps)
