"""VDM++ (Kingma & Gao 2023, arXiv 2303.00848, "adaptive noise schedule"): sample log-SNR where the weighted loss is."""

from typing import Any

import torch

from .checks import check_counts, check_shares
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
    0.999 a draw are those of a public port (ddm_dynamical's `BinarizedScheduler`, which cites the paper). There the
    average is of the weighted loss and starts at 1, of which 0.999^n is left after n losses in a bin: more than a loss
    of 0.003 at the noisy end until the bin has seen some 6,000, so that a short run hardly leaves uniform. Here the
    average is of the loss, which the weighting is multiplied to, and is corrected for its start as Adam's are: divided
    by 1 - 0.999^n. A bin without a loss yet has the mean over all others'. The range of lambda is the noise schedule's
    own, and p is mixed with a little uniform, so that no weight is without bound. The paper's loss weightings (of
    lambda, monotonic) are not part of the density: pass them as `loss_weights`.

    Args:
        num_bins: of log snr.
        ema_rate: share of a bin's average that is left after one more loss in it.
        uniform_fraction: of the draws that are uniform in t, in (0, 1].
        refresh_every: updates between two renewals of the density.
    """

    corrects_for_density = True
    state_names = (*LossAwareSampler.state_names, "averages")

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
        check_counts(num_bins=num_bins)
        check_shares(uniform_fraction=uniform_fraction)
        if not 0 <= ema_rate < 1:
            raise ValueError(f"ema_rate must be in [0, 1), not {ema_rate}")
        self.num_bins, self.ema_rate, self.uniform_fraction = num_bins, ema_rate, uniform_fraction
        super().__init__(schedule, loss_weights, **options)

    def initial_density(self, schedule: NoiseSchedule) -> torch.Tensor:
        log_snr = schedule.snr.log()
        if not log_snr[-1].isfinite():  # zero terminal SNR
            log_snr[-1] = log_snr[-2] - 1
        low, high = log_snr.aminmax()
        bins = ((log_snr - low) / (high - low) * self.num_bins).long().clamp_(max=self.num_bins - 1)
        self._bins = bins.to(self.device)
        self.averages = torch.zeros(2, self.num_bins, device=self.device)  # of losses, and of 1: 1 - ema_rate^n
        return self._density()

    def expected_loss(self) -> torch.Tensor:
        """[T] the current estimate of E[L_t], its bin's; before any loss 1, as of an untrained network."""
        losses, share = self.averages
        overall = torch.where(share.sum() > 0, losses.sum() / share.sum(), 1.0)
        return torch.where(share > 0, losses / share, overall)[self._bins]

    def _renew(self, pending):
        losses, draws = torch.zeros_like(self.averages).index_add_(1, self._bins, pending)
        means = torch.stack([losses / draws.clamp_min(1.0), torch.ones_like(losses)])
        self.averages = torch.lerp(means, self.averages, self.ema_rate**draws)
        self._set_density(self._density())

    def _density(self):
        T, f = self.num_train_timesteps, self.uniform_fraction
        density = self.loss_weights * self.expected_loss()
        total = density.sum()
        return (1 - f) * torch.where(total > 0, density / total, 1 / T) + f / T
