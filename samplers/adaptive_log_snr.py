"""VDM++ (Kingma & Gao 2023, arXiv 2303.00848, "adaptive noise schedule"): sample log-SNR where the weighted loss is."""

from typing import Any

import torch

from .loss_aware import LossAwareSampler
from .schedule import NoiseSchedule


class AdaptiveLogSNRSampler(LossAwareSampler):
    """p(lambda) ∝ E[w(lambda) ‖eps - eps_hat‖^2], by bins of lambda = log snr. Touches p_t; w_t corrects for it.

    The objective is L_w = 1/2 E_{lambda ~ p}[w(lambda) / p(lambda) ‖eps - eps_hat(x_lambda; lambda)‖^2] whatever
    p(lambda) is. With p proportional to the weighted loss, an exponential moving average of which is kept for each of
    100 evenly spaced bins, every draw contributes about the same to it. On a discrete schedule c_t = w(lambda_t)
    |dlambda/dt|, so that p_t ∝ c_t E[L_t], where the average is over a bin: the first power of the loss, where the
    least gradient variance is at its square root.

    Where this departs from the paper: no code by the authors was found. The number of bins and the average's rate of
    0.999 a draw are those of a public port (ddm_dynamical's `BinarizedScheduler`, which cites the paper); the range of
    lambda is the noise schedule's own; p is constant within a bin, begins as if every loss were 1, an untrained
    network's, and is mixed with a little uniform, so that no weight is without bound. The paper's loss weightings (of
    lambda, monotonic) are not part of the density: pass them as `loss_weights`.

    Args:
        num_bins: of log snr.
        ema_rate: share of a bin's average that is left after one more loss in it.
        uniform_fraction: of the draws that are uniform in t, in (0, 1].
        refresh_every: updates between two renewals of the density.
    """

    corrects_for_density = True
    state_names = (*LossAwareSampler.state_names, "bin_losses")

    def __init__(
        self,
        schedule: NoiseSchedule,
        loss_weights: torch.Tensor | None = None,
        *,
        num_bins: int = 100,
        ema_rate: float = 0.999,
        uniform_fraction: float = 0.001,
        **options: Any,
    ) -> None:
        if not 0 < uniform_fraction <= 1:
            raise ValueError(f"uniform_fraction must be in (0, 1], not {uniform_fraction}")
        self.num_bins, self.ema_rate, self.uniform_fraction = num_bins, ema_rate, uniform_fraction
        super().__init__(schedule, loss_weights, **options)

    def initial_density(self, schedule: NoiseSchedule) -> torch.Tensor:
        log_snr = schedule.snr.log()
        if not log_snr[-1].isfinite():  # zero terminal SNR
            log_snr[-1] = log_snr[-2] - 1
        low, high = log_snr.aminmax()
        bins = ((log_snr - low) / (high - low) * self.num_bins).long().clamp_(max=self.num_bins - 1)
        self._bins = bins.to(self.device)
        self._width = self._table(torch.gradient(log_snr)[0].abs())  # |dlambda/dt|
        every_loss_is_one = torch.ones(2, schedule.num_train_timesteps, device=self.device)
        self.bin_losses = self._bin_means(every_loss_is_one)[0]
        return self._density()

    def _bin_means(self, pending):
        """[num_bins] the mean weighted loss, per unit of lambda, and the number of losses."""
        losses, draws = torch.zeros(2, self.num_bins, device=self.device)
        losses.index_add_(0, self._bins, self.loss_weights / self._width * pending[0])
        draws.index_add_(0, self._bins, pending[1])
        return losses / draws.clamp_min(1.0), draws

    def _renew(self, pending):
        means, draws = self._bin_means(pending)
        self.bin_losses = torch.lerp(means, self.bin_losses, self.ema_rate**draws)
        self._set_density(self._density())

    def _density(self):
        T, f = self.num_train_timesteps, self.uniform_fraction
        density = self.bin_losses[self._bins] * self._width
        total = density.sum()
        return (1 - f) * torch.where(total > 0, density / total, 1 / T) + f / T
