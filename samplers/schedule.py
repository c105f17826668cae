"""The noise schedule as every sampler and weighting sees it: tables over the training timesteps."""

from dataclasses import dataclass
from typing import Literal

import torch

PredictionType = Literal["epsilon", "v_prediction", "sample"]  # what a network predicts, as diffusers names it


@dataclass(frozen=True)
class NoiseSchedule:
    """Tables of x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps, for t = 0 .. T-1.

    Args:
        alphas_cumprod: [T] float64 on the CPU, abar_t, decreasing in (0, 1]; the last may be 0 (zero terminal SNR).
    """

    alphas_cumprod: torch.Tensor

    @classmethod
    def from_scheduler(cls, noise_scheduler: object) -> "NoiseSchedule":
        """Read the schedule of a diffusers scheduler that has one (DDPM, DDIM, DPM-Solver, ...).

        Raises:
            ValueError: the scheduler has no `alphas_cumprod` (flow matching, for instance), or T < 2.
        """
        alphas_cumprod = getattr(noise_scheduler, "alphas_cumprod", None)
        if alphas_cumprod is None:
            raise ValueError(
                f"{type(noise_scheduler).__name__} has no `alphas_cumprod`: timestep samplers need a scheduler with a "
                "discrete variance-preserving schedule, such as DDPMScheduler"
            )
        if len(alphas_cumprod) < 2:
            raise ValueError(f"num_train_timesteps must be at least 2, not {len(alphas_cumprod)}")
        return cls(torch.as_tensor(alphas_cumprod).detach().cpu().double())

    @property
    def num_train_timesteps(self) -> int:
        """T."""
        return len(self.alphas_cumprod)

    @property
    def snr(self) -> torch.Tensor:
        """[T] signal-to-noise ratio, abar_t / (1 - abar_t)."""
        return self.alphas_cumprod / (1 - self.alphas_cumprod)

    @property
    def sigma(self) -> torch.Tensor:
        """[T] noise level relative to the signal, 1 / sqrt(snr_t): EDM's sigma. Infinite where the SNR is zero."""
        return self.snr.rsqrt()

    @property
    def alphas_cumprod_slope(self) -> torch.Tensor:
        """[T] d(abar_t)/dt, per timestep; negative."""
        return torch.gradient(self.alphas_cumprod)[0]


def epsilon_loss_scale(schedule: NoiseSchedule, prediction_type: PredictionType) -> torch.Tensor:
    """[T] the factor that turns the mean squared error of a network's prediction into its epsilon-loss.

    With x_t given, an error in v or x_0 is one in eps: d eps = sqrt(abar) dv = -sqrt(snr) dx_0.

    Raises:
        ValueError: `prediction_type` is not epsilon, v_prediction or sample.
    """
    scales = {
        "epsilon": torch.ones_like(schedule.alphas_cumprod),
        "v_prediction": schedule.alphas_cumprod,
        "sample": schedule.snr,
    }
    if prediction_type not in scales:
        raise ValueError(f"prediction_type must be one of {', '.join(scales)}, not {prediction_type!r}")
    return scales[prediction_type]
