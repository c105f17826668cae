"""The steps of the chain against diffusers' own schedulers, and against the papers."""

import itertools

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from diffusers.schedulers import scheduling_ddim, scheduling_ddpm

from pipelines import denoising_steps
from pipelines.denoising import denoise_step

CLIPS = ({"clip_sample": False}, {"clip_sample": True}, {"clip_sample": True, "clip_sample_range": 0.5})
SPACINGS = (
    {"timestep_spacing": "leading"},
    {"timestep_spacing": "trailing"},
    {"timestep_spacing": "linspace"},
)
OFFSETS = ({"steps_offset": 0}, {"steps_offset": 1})


def assert_steps_agree(scheduler, count, monkeypatch, **step_kwargs):
    """Every step of the chain from the same x_t, output and noise; `scheduler` decides what is expected."""
    steps = denoising_steps(scheduler, count, **step_kwargs)
    scheduler.set_timesteps(count)
    assert [step.timestep for step in steps] == scheduler.timesteps.tolist()
    generator = torch.Generator().manual_seed(0)
    clip = scheduler.config.clip_sample_range if scheduler.config.clip_sample else None
    if isinstance(scheduler, DDIMScheduler):
        step_kwargs["use_clipped_model_output"] = True
    for step in steps:
        x, output, noise = torch.randn(3, 2, 1, 4, 4, generator=generator)
        for module in (scheduling_ddpm, scheduling_ddim):
            monkeypatch.setattr(module, "randn_tensor", lambda *_, noise=noise, **__: noise)
        theirs = scheduler.step(output, torch.tensor(step.timestep), x, **step_kwargs).prev_sample
        ours = denoise_step(step, x, output, noise if step.sigma > 0 else None, clip)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5, msg=lambda m: f"{scheduler.config}: {m}")


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_small_log", "fixed_large"])
def test_ddpm_step_is_diffusers(prediction_type, variance_type, monkeypatch):
    for clip, spacing, offset, zero_snr in itertools.product(CLIPS, SPACINGS, OFFSETS, (False, True)):
        if zero_snr and prediction_type == "epsilon":
            continue  # x_0 is not to be had from ε alone where the signal is zero: infinite in diffusers
        scheduler = DDPMScheduler(
            prediction_type=prediction_type,
            variance_type=variance_type,
            rescale_betas_zero_snr=zero_snr,
            **clip | spacing | offset,
        )
        assert_steps_agree(scheduler, 7, monkeypatch)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_ddim_step_is_diffusers(prediction_type, eta, monkeypatch):
    for clip, spacing, offset, to_one in itertools.product(CLIPS, SPACINGS, OFFSETS, (False, True)):
        scheduler = DDIMScheduler(
            prediction_type=prediction_type,
            rescale_betas_zero_snr=prediction_type != "epsilon",
            set_alpha_to_one=to_one,
            **clip | spacing | offset,
        )
        assert_steps_agree(scheduler, 7, monkeypatch, eta=eta)


@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"])
def test_all_steps_of_a_full_chain(beta_schedule, monkeypatch):
    assert_steps_agree(DDPMScheduler(beta_schedule=beta_schedule), 1000, monkeypatch)


def test_fixed_large_log_is_the_variance_it_means():
    """diffusers' own step is NaN here: it takes the square root of log(β_t)."""
    log, plain = (DDPMScheduler(variance_type=kind) for kind in ("fixed_large_log", "fixed_large"))
    assert denoising_steps(log, 10) == denoising_steps(plain, 10)


def test_trailing_steps_never_leave_the_table():
    scheduler = DDPMScheduler(timestep_spacing="trailing")
    scheduler.set_timesteps(61)
    assert scheduler.timesteps[-1] == -1  # diffusers' rounding, and why it is cut off here
    timesteps = [step.timestep for step in denoising_steps(scheduler, 61)]
    assert len(timesteps) == 61
    assert timesteps[-1] >= 0


def official_quadratic(trained, count):
    """`runners/diffusion.py` of the DDIM authors' code."""
    return [int(s) for s in list(np.linspace(0, np.sqrt(trained * 0.8), count) ** 2)]


@pytest.mark.parametrize("count", [2, 10, 20, 100, 1000])
def test_quadratic_timesteps_are_the_official_ones(count):
    steps = denoising_steps(DDIMScheduler(), count, skip_schedule="quadratic")
    assert [step.timestep for step in steps] == sorted(set(official_quadratic(1000, count)), reverse=True)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_quadratic_step_is_equation_12(eta):
    scheduler = DDIMScheduler(clip_sample=False)
    steps = denoising_steps(scheduler, 10, eta, "quadratic")
    previous = [step.timestep for step in steps[1:]] + [-1]
    x, output, noise = torch.randn(3, 2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    for step, s in zip(steps, previous, strict=True):
        a_t, a_s = (
            scheduler.alphas_cumprod[step.timestep],
            scheduler.alphas_cumprod[s] if s >= 0 else torch.tensor(1.0),
        )
        sigma = eta * ((1 - a_s) / (1 - a_t)).sqrt() * (1 - a_t / a_s).sqrt()
        x0 = (x - (1 - a_t).sqrt() * output) / a_t.sqrt()
        expected = a_s.sqrt() * x0 + (1 - a_s - sigma**2).sqrt() * output + sigma * noise
        ours = denoise_step(step, x, output, noise, None)
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_ddim_steps_along_the_noise_that_belongs_to_the_clipped_image(prediction_type):
    """Where all of x̂_0 is clipped to c, x_{t-1} = √ᾱ_{t-1} c + √(1 - ᾱ_{t-1}) ε̂ with x_t = √ᾱ_t c + √(1 - ᾱ_t) ε̂."""
    step = denoising_steps(DDIMScheduler(prediction_type=prediction_type), 2)[0]
    abar, abar_prev = DDIMScheduler().alphas_cumprod[[step.timestep, step.timestep - 500]]
    epsilon = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    output = torch.full_like(epsilon, 1e6 if prediction_type == "sample" else -1e6)
    x = abar.sqrt() + (1 - abar).sqrt() * epsilon
    expected = abar_prev.sqrt() + (1 - abar_prev).sqrt() * epsilon
    torch.testing.assert_close(denoise_step(step, x, output, None, 1.0), expected, rtol=1e-5, atol=1e-5)


def test_ddpm_walks_a_quadratic_subsequence_as_diffusers_walks_custom_timesteps(monkeypatch):
    scheduler = DDPMScheduler()
    steps = denoising_steps(scheduler, 10, skip_schedule="quadratic")
    scheduler.set_timesteps(timesteps=[step.timestep for step in steps])
    x, output, noise = torch.randn(3, 2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *_, **__: noise)
    for step in steps:
        theirs = scheduler.step(output, torch.tensor(step.timestep), x).prev_sample
        torch.testing.assert_close(denoise_step(step, x, output, noise, 1.0), theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("scheduler", "arguments", "error", "match"),
    [
        (DDPMScheduler(thresholding=True), {}, NotImplementedError, "thresholding"),
        (DDPMScheduler(variance_type="learned_range"), {}, NotImplementedError, "learned_range"),
        (DDPMScheduler(prediction_type="flow"), {}, ValueError, "flow"),
        (DDPMScheduler(), {"eta": 0.5}, ValueError, r"eta=0\.5 belongs to DDIM"),
        (DDIMScheduler(), {"eta": 1.5}, ValueError, r"eta=1\.5 must be in \[0, 1\]"),
        (
            DDPMScheduler(),
            {"num_inference_steps": 0},
            ValueError,
            r"num_inference_steps=0 must be in \[1, 1000\]",
        ),
        (DDPMScheduler(), {"num_inference_steps": 1001}, ValueError, r"num_inference_steps=1001"),
        (DDPMScheduler(steps_offset=1), {}, ValueError, "steps_offset=1"),
        (DDIMScheduler(), {"skip_schedule": "cubic"}, ValueError, "cubic"),
        (DDIMScheduler(), {"skip_schedule": "quadratic", "num_inference_steps": 1}, ValueError, "2 or more"),
        (object(), {}, ValueError, "object is not a DDPMScheduler"),
        (DDPMScheduler(rescale_betas_zero_snr=True), {}, ValueError, "'epsilon' with a zero terminal SNR"),
        (DDIMScheduler(rescale_betas_zero_snr=True), {}, ValueError, "'epsilon' with a zero terminal SNR"),
    ],
)
def test_refuses_by_name(scheduler, arguments, error, match):
    with pytest.raises(error, match=match):
        denoising_steps(scheduler, **arguments)
