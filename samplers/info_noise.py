"""InfoNoise (Raya et al. 2026, arXiv 2602.18647): train where noisy observations tell most about the clean image."""

from typing import Any

import torch

from .checks import check_counts, check_finite, check_positive, check_shares
from .log_normal import LogNormalSampler
from .loss_aware import NOTHING, LossHistorySampler
from .schedule import NoiseSchedule


class InfoNoiseSampler(LossHistorySampler, LogNormalSampler):
    """pi(sigma) ∝ rho(sigma) / w(sigma), rho ∝ m(sigma) / sigma^3 * g(sigma), g = sigma^n / (sigma^n + c^n). Touches
    p_t alone: the loss weighting stays, and the density makes their product follow the conditional entropy rate.

    By I-MMSE, d H[x_0 | x_sigma] / d sigma = mmse(sigma) / sigma^3 (eqs. 10-13). m is a running estimate of the mmse
    from the training losses; the gate g (eq. 14) holds back the noise-free end, where 1 / sigma^3 would take over;
    the fixed weight w of the loss of the denoised image is divided out (eq. 15). On the loss of the noise, that of the
    denoised image is sigma^2 L_t and w is c_t / sigma^2, so per timestep p_t ∝ m g(sigma_t) |d log sigma_t / dt| / c_t.
    The paper trains with EDM's weighting (`edm`).

    n = 3; c = 0.15, what the paper is said to report for CIFAR-10. With `gate_pivot=None` it is the largest sigma at
    which m / sigma^3 is still 0.002 of its maximum (the onset rule of appendix B.6); the maximum is at the least sigma
    of all, which is 0.002 for EDM and 0.01 for DDPM, so that the rule gives a several times larger c here. Until
    `warmup` updates the density is EDM's log-normal, the paper's baseline.

    Where this departs from the paper: m is bounded by the data's variance, which no mmse exceeds. The paper's network
    is EDM's, whose denoised image is nearly the data's mean where noise is all there is, so that its loss keeps to this
    bound. A network of the noise does not: a small error in eps of 0.003 is one of 75 in the image at sigma = 157, and
    rho would lie at the noisy end, where there is nothing to learn. Where no loss was seen, m is interpolated between
    bins, and flat beyond them.

    No code by the authors was found, and of the paper (second version, May 2026, under the title "Noise Scheduling as
    Information-Guided Allocation in Diffusion Training") the abstract could be read, not the text. This is after two
    public re-implementations that quote it and agree on the entropy rate, the gate and the onset rule. One, which
    follows the second version, divides by w, and finds no values in it for the rest. The other, which follows the first
    and does not divide by w, has 64 bins uniform in log sigma, the mean of a bin's last 256 losses, averaged at each
    renewal (every 100 updates) as (1 - beta) old + beta new with beta = 0.9, 50 losses in a bin at the least, and a
    warm-up of 20 % of the run; so here, but that bins with too few losses hold nothing up and that the length of the
    run is not known here: set `warmup`. A floor keeps every p_t positive; see `log_normal`.

    Args:
        data_variance: of the images' pixels about their mean image; `make_timestep_sampler` reads it off the images.
        p_mean, p_std: of log sigma during warm-up.
        num_bins: of log sigma.
        bin_history: losses kept of each bin.
        min_bin_count: losses that a bin's mean needs.
        beta: weight of the new mean at each renewal.
        gate_exponent: n.
        gate_pivot: c; None for the onset rule.
        onset: the rule's share of the maximum.
        warmup: updates before the density adapts; meant to be 20 % of the run's.
        refresh_every: updates between two renewals of the density.
    """

    needs_data_variance = True
    state_names = (*LossHistorySampler.state_names, "bin_mmse", "data_variance")

    settled_options = frozenset({"history_length", "bin_of_timestep"})

    def __init__(
        self,
        schedule: NoiseSchedule,
        loss_weights: torch.Tensor | None = None,
        *,
        data_variance: float,
        num_bins: int = 64,
        bin_history: int = 256,
        min_bin_count: int = 50,
        beta: float = 0.9,
        gate_exponent: float = 3.0,
        gate_pivot: float | None = 0.15,
        onset: float = 0.002,
        warmup: int = 2000,
        refresh_every: int = 100,
        **options: Any,
    ) -> None:
        check_counts(num_bins=num_bins, bin_history=bin_history, min_bin_count=min_bin_count)
        check_counts(0, warmup=warmup)
        if min_bin_count > bin_history:
            raise ValueError(f"min_bin_count must not exceed bin_history ({bin_history}), as {min_bin_count} does")
        check_finite(gate_exponent=gate_exponent)
        check_shares(beta=beta, onset=onset)
        check_positive(data_variance=data_variance, **({} if gate_pivot is None else {"gate_pivot": gate_pivot}))
        self.data_variance = data_variance
        self.min_bin_count, self.beta, self.warmup = min_bin_count, beta, warmup
        self.gate_exponent, self.gate_pivot, self.onset = gate_exponent, gate_pivot, onset
        log_sigma = schedule.sigma.log()
        log_sigma = log_sigma.clamp(max=float(log_sigma[log_sigma.isfinite()].max()) + 1)  # zero terminal SNR
        bins = (log_sigma - log_sigma[0]) / (log_sigma[-1] - log_sigma[0]) * num_bins
        super().__init__(
            schedule,
            loss_weights,
            history_length=bin_history,
            bin_of_timestep=bins.long().clamp_(max=num_bins - 1),
            refresh_every=refresh_every,
            **options,
        )
        self._sigma = log_sigma.exp().to(self.device)
        self._width = torch.gradient(log_sigma)[0].to(self.device)  # d log sigma / dt
        self._floor = self._table(self.floor / self.num_train_timesteps / self.loss_weights.clamp_min(1.0))
        self.bin_mmse = torch.full((num_bins,), NOTHING, device=self.device)

    def mmse(self) -> torch.Tensor:
        """[T] m, the current estimate of the mmse; not finite until one bin has enough losses."""
        return interpolate_missing(self.bin_mmse)[self._bin_of_timestep]

    def _collect(self, timesteps, losses, usable):
        super()._collect(timesteps, self._sigma[timesteps].square().float() * losses, usable)  # of the denoised image

    def _renew(self, pending):
        seen = self.history != NOTHING
        enough = seen.sum(1) >= self.min_bin_count
        means = torch.where(seen, self.history, 0.0).sum(1) / seen.sum(1).clamp_min(1)
        means = means.clamp(max=self.data_variance)
        means = torch.where(self.bin_mmse == NOTHING, means, torch.lerp(self.bin_mmse, means, self.beta))
        self.bin_mmse = torch.where(enough, means, self.bin_mmse)
        if self.network_updates < self.warmup:
            return
        mmse, sigma = self.mmse().double(), self._sigma
        rate = mmse / sigma**3
        pivot = self.gate_pivot
        if pivot is None:
            pivot = torch.where(rate >= self.onset * rate.max(), sigma, 0.0).max()
        gate = 1 / (1 + (pivot / sigma) ** self.gate_exponent)
        weights = self.loss_weights.double()
        density = torch.where(weights > 0, mmse * gate * self._width / weights, 0.0)
        total = density.sum()
        density = torch.where((total > 0) & total.isfinite(), density / total, self.probabilities.double())
        self._set_density(density + self._floor)


def interpolate_missing(values: torch.Tensor) -> torch.Tensor:
    """[K] with NOTHING replaced by the line between the nearest neighbours; beyond the last of these, by that one."""
    K = len(values)
    i = torch.arange(K, device=values.device)
    left = torch.where(values == NOTHING, -1, i).cummax(0).values
    right = torch.where(values == NOTHING, K, i).flip(0).cummin(0).values.flip(0)
    left, right = torch.where(left < 0, right, left), torch.where(right == K, left, right)
    left, right = left.clamp(0, K - 1), right.clamp(0, K - 1)
    return torch.lerp(values[left], values[right], (i - left) / (right - left).clamp_min(1))
