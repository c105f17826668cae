"""The noise schedule to train with, from options."""

import json
from collections.abc import Iterable

import torch
from diffusers import DDPMScheduler

from pipelines import denoising_steps
from pipelines.checks import check_alphas_cumprod

from .options import ModelOptions


def build_noise_scheduler(options: ModelOptions, planned_num_steps: Iterable[int] = ()) -> DDPMScheduler:
    """The `DDPMScheduler` to train with and to save.

    Args:
        planned_num_steps: numbers of denoising steps in which it must be able to sample, beside that of all timesteps.

    Raises:
        ValueError: a schedule or setting that cannot be used, or a last timestep without any signal.
    """
    settings = {
        "num_train_timesteps": options.ddpm_num_steps,
        "beta_schedule": options.ddpm_beta_schedule,
        "prediction_type": options.prediction_type,
    }
    flags = dict(zip(settings, ("ddpm_num_steps", "ddpm_beta_schedule", "prediction_type"), strict=True))
    for name in settings.keys() & options.noise_scheduler.keys():
        if options.noise_scheduler[name] != settings[name]:
            raise ValueError(f"--noise_scheduler {name} {options.noise_scheduler[name]}: is given by --{flags[name]}")
    if options.vae:
        settings["clip_sample"] = False  # latents have no bounds
    given = f"--ddpm_beta_schedule {options.ddpm_beta_schedule} --noise_scheduler {json.dumps(options.noise_scheduler)}"
    try:
        noise_scheduler = DDPMScheduler(**{**settings, **options.noise_scheduler})
        check_trainable(noise_scheduler)
        for num_inference_steps in {*planned_num_steps, options.ddpm_num_steps}:  # the last by generate.py
            denoising_steps(noise_scheduler, num_inference_steps)
    except Exception as error:  # diffusers does not check types
        raise ValueError(f"{given}: cannot be used: {type(error).__name__}: {error}") from error
    return noise_scheduler


def check_trainable(noise_scheduler: DDPMScheduler) -> None:
    """Refuse a schedule of noise that is not one, or that ends without any signal. Raises ValueError."""
    check_alphas_cumprod(noise_scheduler)
    alphas_cumprod, steps = noise_scheduler.alphas_cumprod, noise_scheduler.config.num_train_timesteps
    if not ((noise_scheduler.betas > 0).all() and (noise_scheduler.betas <= 1).all()):
        raise ValueError("betas must be in (0, 1]")
    if alphas_cumprod[-1] == 0:
        cause = "rescale_betas_zero_snr" if noise_scheduler.config.rescale_betas_zero_snr else f"{steps} of these betas"
        raise ValueError(
            f"a zero terminal SNR ({cause}) cannot be trained here: objectives are defined on the epsilon-loss, which "
            "says nothing about a network's output where there is no signal"
        )
    if not (torch.cat([torch.ones(1), alphas_cumprod]).diff() < 0).all():
        raise ValueError("betas are so small that alphas_cumprod does not fall from each timestep to the next")
