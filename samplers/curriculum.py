"""Curriculum Sampling (Sun 2026, arXiv 2603.12517): a flow's middle times first, then all alike."""

from typing import Any

import torch

from .checks import check_counts
from .logit_normal import LogitNormalSampler
from .schedule import NoiseSchedule


class CurriculumSampler(LogitNormalSampler):
    """logit(s) ~ N(m, std^2) for the first `num_updates` updates, then s ~ U(0, 1), carried to the discrete schedule.

    s is the time of a straight flow, x = (1 - s) x_0 + s eps, as for `logit_normal`. Its middle teaches structure soon;
    the ends, which a logit-normal neglects, decide the details. The density changes the objective: w_t is the loss
    weighting alone, and the paper's is the flow's loss, `flow`. Nothing is learned from the run. A resumed run
    follows its own options: given another number of updates, it switches then.

    Sources: of the paper's text, its abstract was at hand, and m = 0.8, std = 1 and the 60,000 updates, which are 40 %
    of its 150,000 on CIFAR-10, as a public repository quotes them; its best FID is reported after 100,000. A run of
    another length needs another number.

    Args:
        num_updates: of the first phase, 0 or more.
        m, s: location and scale of the first phase, as `logit_normal`'s.
    """

    def __init__(
        self,
        schedule: NoiseSchedule,
        loss_weights: torch.Tensor | None = None,
        *,
        num_updates: int = 60_000,
        m: float = 0.8,
        s: float = 1.0,
        **options: Any,
    ) -> None:
        check_counts(0, num_updates=num_updates)
        self.num_updates = num_updates
        super().__init__(schedule, loss_weights, m=m, s=s, **options)
        self._second_phase = self._uniform()

    def _begin_update(self, update: int) -> None:
        if update == self.num_updates:
            self._set_density(self._second_phase)

    def _restore_density(self, probabilities):
        self._second_phase = self._uniform()  # its floor goes by the weights, which may be the saved ones now
        is_second_phase = self.num_draws > self.num_updates * self.gradient_accumulation_steps
        self._set_density(self._second_phase if is_second_phase else self.initial_density(self._schedule))

    def _uniform(self):
        return self._table(self._masses(self._schedule, torch.sigmoid))  # sigmoid(log sigma) = s
