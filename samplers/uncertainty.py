"""EDM2 (Karras et al. 2024, arXiv 2312.02696, eqs. 14-16 and 21): weights by a learned uncertainty."""

import math
from typing import Any

import torch

from .adam import adam_step
from .checks import check_counts, check_positive
from .log_normal import LogNormalSampler
from .loss_aware import LossAwareSampler
from .schedule import NoiseSchedule


class UncertaintySampler(LossAwareSampler, LogNormalSampler):
    """L(D; sigma) = lambda(sigma) / e^u(sigma) ‖D - y‖^2 + u(sigma), minimised over the network and over u, with
    log sigma ~ N(P_mean, P_std^2). Touches both: p_t is the log-normal, w_t = c_t / e^u(sigma_t).

    On the loss of the noise, ‖D - y‖^2 = sigma^2 ‖eps - eps_theta‖^2 = sigma^2 L_t, so c_t = sigma^2 lambda. At the
    minimum e^u = c_t E[L_t]: every noise level contributes 1 wherever it is drawn, and which c_t was given no longer
    matters. It matters for the way there. The paper's lambda = (sigma^2 + sigma_data^2) / (sigma sigma_data)^2 makes
    the loss of its untrained network 1 at every noise level, so that u may start at 0. For a network that predicts the
    noise it is c_t = 1 that does so, the loss weighting `none`, which the method `edm2` therefore has. With the paper's
    lambda, c_t = 1 + (sigma/sigma_data)^2, the loss weighting `edm`, it starts at up to 1e5 at the noisy end, and until
    u has followed, rare draws there rule the gradient, and above all a clipped one.

    u is linear in 128 random Fourier features of log(sigma) / 4, as in the authors' code (github.com/NVlabs/edm2), and
    trained by Adam with betas (0.9, 0.99) at rate 0.01, as there.

    P_mean = -0.8 and P_std = 1.6 are the paper's for pixels (ImageNet-64); for latents it has -0.4 and 1.0.

    Where this departs from that code:
    - lambda, as said; for a network that predicts v the loss weighting `edm` comes closest to the paper's;
    - u has a weight vector of its own rather than one of the network's parameters, starts at 0 rather than at a random
      function, and its weights are not normalised to unit length, because E[L_t] comes to span more octaves than such a
      u can follow: without the paper's preconditioning, it is far below 1 at the noisy end;
    - its rate neither ramps up nor decays with the network's;
    - as many steps as there were updates are made on the pooled losses at each renewal, so that all processes learn
      the same u;
    - a floor keeps every p_t positive; see `log_normal`.

    Args:
        p_mean, p_std: of log sigma.
        num_features: Fourier features.
        learning_rate: of u.
        refresh_every: updates between two renewals of the weights.
    """

    state_names = (*LossAwareSampler.state_names, "coefficients", "moments", "steps")

    def __init__(
        self,
        schedule: NoiseSchedule,
        loss_weights: torch.Tensor | None = None,
        *,
        p_mean: float = -0.8,
        p_std: float = 1.6,
        num_features: int = 128,
        learning_rate: float = 0.01,
        **options: Any,
    ) -> None:
        check_counts(num_features=num_features)
        check_positive(learning_rate=learning_rate)
        self.num_features, self.learning_rate = num_features, learning_rate
        super().__init__(schedule, loss_weights, p_mean=p_mean, p_std=p_std, **options)

    def initial_density(self, schedule: NoiseSchedule) -> torch.Tensor:
        log_sigma = schedule.sigma.log()
        log_sigma = log_sigma.clamp(max=float(log_sigma[log_sigma.isfinite()].max()) + 1)  # zero terminal SNR
        generator = torch.Generator().manual_seed(0)  # the same features in every run
        frequencies = torch.randn(self.num_features, generator=generator, dtype=torch.float64)
        phases = torch.rand(self.num_features, generator=generator, dtype=torch.float64)
        angles = 2 * math.pi * (log_sigma[:, None] / 4 * frequencies + phases)
        features = math.sqrt(2) * angles.cos() / math.sqrt(self.num_features)
        self._features = features.to(self.device)  # [T, num_features] float64: c_t may span 9 decades
        self.coefficients = torch.zeros(self.num_features, dtype=torch.float64, device=self.device)
        self.moments = torch.zeros(2, self.num_features, dtype=torch.float64, device=self.device)
        self.steps = 0
        return super().initial_density(schedule)

    @property
    def log_uncertainty(self) -> torch.Tensor:
        """[T] u(sigma_t)."""
        return self._features @ self.coefficients

    def relative_weights(self) -> torch.Tensor:
        return (self.loss_weights * torch.exp(-self.log_uncertainty)).float()

    def _renew(self, pending):
        losses, draws = (self.loss_weights * pending[0]).double(), pending[1].double()
        for _ in range(self.refresh_every):
            self.steps += 1
            # of sum_t (losses_t e^-u_t + draws_t u_t) / sum_t draws_t
            slope = (draws - losses * torch.exp(-self.log_uncertainty)) / draws.sum().clamp_min(1.0)
            adam_step(self.coefficients, slope @ self._features, self.moments, self.steps, self.learning_rate,
                      betas=(0.9, 0.99))  # fmt: skip
        self._draw_from(self.probabilities)
