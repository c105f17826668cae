"""The chain of denoising steps, from noise to image, as coefficients: DDPM's and DDIM's.

A scheduler's own `step` waits for the device several times. Here the coefficients of the whole chain are computed once,
from the scheduler, before the first step.
"""

import copy
import math
from typing import NamedTuple

import numpy as np
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from pipelines.checks import check_scheduler

SCHEDULERS = {"ddpm": DDPMScheduler, "ddim": DDIMScheduler}  # by the name of the chain
Coefficients = tuple[float | torch.Tensor, ...]  # each for all steps alike, or float32 [N]


class Step(NamedTuple):
    """One step of the chain. Python floats, not tensors: they travel with the kernel that uses them.

    x̂_0     = clip((x0_x · x_t + x0_output · output) / x0_scale)
    x_{t-1} = prev_x0 · x̂_0 + prev_x · x_t + sigma · noise
    """

    timestep: int
    x0_x: float
    x0_output: float
    x0_scale: float
    prev_x0: float
    prev_x: float
    sigma: float


def denoise_step(
    step: Step, x: torch.Tensor, output: torch.Tensor, noise: torch.Tensor | None, clip: float | None
) -> torch.Tensor:
    """x_t [B, C, H, W] and the network's output for it -> x_{t-1}; see `Step`."""
    x0 = (step.x0_x * x).add_(output, alpha=step.x0_output).div_(step.x0_scale)
    if clip is not None:
        x0.clamp_(-clip, clip)
    prev = x0.mul_(step.prev_x0).add_(x, alpha=step.prev_x)
    if noise is not None:
        prev.add_(noise, alpha=step.sigma)
    return prev


def denoising_steps(
    scheduler: DDPMScheduler | DDIMScheduler,
    num_inference_steps: int | None = None,
    eta: float = 0.0,
    skip_schedule: str = "uniform",
) -> list[Step]:
    """The whole chain that `scheduler.step` would walk, from noise to image, as coefficients.

    The tables are float32 and follow the scheduler's own order of operations: 1 - ᾱ_t/ᾱ_{t-1} cancels for
    small t, and in float64 the first steps would differ from diffusers by 1e-4.

    Raises:
        ValueError: a scheduler, a number of steps, an eta or a skip schedule that cannot be used, by name.
        NotImplementedError: thresholding or a learned variance.
    """
    check_scheduler(scheduler, eta)
    scheduler = copy.deepcopy(scheduler)  # a training loop may own it: leave its timesteps as they are
    timesteps, previous = inference_timesteps(scheduler, num_inference_steps, skip_schedule)
    table, ddim = scheduler.alphas_cumprod.cpu(), isinstance(scheduler, DDIMScheduler)
    last = scheduler.final_alpha_cumprod.cpu() if ddim else torch.ones(())
    alpha_bar = table[timesteps]
    if scheduler.config.prediction_type == "epsilon" and (alpha_bar == 0).any():
        raise ValueError(
            "prediction_type='epsilon' with a zero terminal SNR: x_0 would be divided by alphas_cumprod = 0"
        )
    alpha_bar_prev = torch.where(previous >= 0, table[previous.clamp(min=0)], last)
    x0 = predict_x0(scheduler.config.prediction_type, alpha_bar)
    if ddim:
        prev = ddim_previous(alpha_bar, alpha_bar_prev, eta)
    else:
        prev = ddpm_previous(scheduler.config.variance_type, alpha_bar, alpha_bar_prev, timesteps)
    columns = [torch.as_tensor(column).expand(len(timesteps)).tolist() for column in (*x0, *prev)]
    return [Step(*row) for row in zip(timesteps.tolist(), *columns, strict=True)]


def predict_x0(prediction_type: str, alpha_bar: torch.Tensor) -> Coefficients:
    """(x0_x, x0_output, x0_scale) of `Step`: DDPM eq. 15, or Salimans & Ho 2022 for a predicted v."""
    if prediction_type == "epsilon":
        return 1.0, -(1 - alpha_bar).sqrt(), alpha_bar.sqrt()
    if prediction_type == "v_prediction":
        return alpha_bar.sqrt(), -(1 - alpha_bar).sqrt(), 1.0
    return 0.0, 1.0, 1.0


def ddpm_previous(
    variance_type: str, alpha_bar: torch.Tensor, alpha_bar_prev: torch.Tensor, timesteps: torch.Tensor
) -> Coefficients:
    """(prev_x0, prev_x, sigma) of `Step`: DDPM eq. 7, which holds for a sub-sequence as well."""
    alpha = alpha_bar / alpha_bar_prev
    beta = 1 - alpha
    # For fixed_large_log, diffusers takes the square root of log(β_t), which is NaN; what is meant is β_t.
    large = variance_type in ("fixed_large", "fixed_large_log")
    variance = beta if large else ((1 - alpha_bar_prev) / (1 - alpha_bar) * beta).clamp(min=1e-20)
    prev_x0 = alpha_bar_prev.sqrt() * beta / (1 - alpha_bar)
    prev_x = alpha.sqrt() * (1 - alpha_bar_prev) / (1 - alpha_bar)
    return prev_x0, prev_x, variance.sqrt() * (timesteps > 0)


def ddim_previous(alpha_bar: torch.Tensor, alpha_bar_prev: torch.Tensor, eta: float) -> Coefficients:
    """(prev_x0, prev_x, sigma) of `Step`: DDIM eq. 12, with the σ_t(η) of eq. 16.

    Its direction is the noise that makes x_t of the clipped x̂_0, (x_t - √ᾱ_t x̂_0) / √(1 - ᾱ_t), as in ADM's code, and
    in diffusers by `use_clipped_model_output=True`. By default diffusers keeps the network's own, which no longer
    belongs to the x̂_0: ours of ε, whose x̂_0 is clipped most, sample far worse so, and those of v in many steps.
    """
    sigma = eta * ((1 - alpha_bar_prev) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_prev)).sqrt()
    prev_x = (1 - alpha_bar_prev - sigma**2).clamp(min=0).sqrt() / (1 - alpha_bar).sqrt()
    return alpha_bar_prev.sqrt() - prev_x * alpha_bar.sqrt(), prev_x, sigma


def inference_timesteps(
    scheduler: DDPMScheduler | DDIMScheduler, num_inference_steps: int | None, skip_schedule: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """The timesteps of the chain and those they step to, int64 [N] each, descending; -1 stands for the image.

    `uniform` is the scheduler's own `timestep_spacing`; `quadratic` is τ_i = ⌊(c·i)²⌋ of DDIM appendix D.2
    with the official code's c (the largest is 0.8 T), less the repeated timesteps, whose steps change
    nothing: a chain can then be a little shorter than `num_inference_steps`.
    """
    trained = scheduler.config.num_train_timesteps
    count = trained if num_inference_steps is None else num_inference_steps
    if not 1 <= count <= trained:
        raise ValueError(f"num_inference_steps={count} must be in [1, {trained}], the trained steps")
    if skip_schedule == "quadratic":
        if count == 1:
            raise ValueError("num_inference_steps=1 with a quadratic skip_schedule is t=0 alone: use 2 or more")
        tau = np.linspace(0, math.sqrt(0.8 * trained), count) ** 2
        timesteps = torch.from_numpy(np.unique(tau.astype(np.int64))[::-1].copy())
    elif skip_schedule == "uniform":
        scheduler.set_timesteps(count)
        timesteps = scheduler.timesteps.cpu()
        timesteps = timesteps[timesteps >= 0]  # 61 trailing steps and some others get a -1, by rounding
    else:
        raise ValueError(f"skip_schedule={skip_schedule!r} must be 'uniform' or 'quadratic'")
    if timesteps.max() >= trained:
        offset = scheduler.config.steps_offset
        raise ValueError(f"steps_offset={offset} moves {count} steps beyond the {trained} trained ones")
    if isinstance(scheduler, DDIMScheduler) and skip_schedule == "uniform":
        return timesteps, timesteps - trained // count  # not always the next one, but diffusers' choice
    return timesteps, torch.cat([timesteps[1:], torch.tensor([-1])])
