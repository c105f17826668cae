"""Sampling from a diffusion model, of images or latents, unconditional or of classes, one random stream per image.

diffusers' own pipelines draw the noise of a whole batch at once, so an image changes with its batch. Here image i
depends on (seed, i), and on its class, alone.
"""

import math
from collections.abc import Sequence

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler

from pipelines.checks import sample_shape
from pipelines.class_conditional import (
    check_guidance_scale,
    find_label_ids,
    network_of,
    null_label,
    predict_with_guidance,
    read_id2label,
)
from pipelines.denoising import Step, denoise_step, denoising_steps
from pipelines.kinds import Network, Pipeline, vae_of
from pipelines.noise import image_generators, noise_maps
from pipelines.weights import nonfinite_weights

EVERYWHERE = (0.0, math.inf)  # a guidance interval
DECODED_AT_A_TIME = 16  # latents: a VAE takes far more memory an image than a latent network


def sample_images(
    pipeline: Pipeline,
    indices: Sequence[int],
    seed: int = 0,
    num_inference_steps: int | None = None,
    eta: float = 0.0,
    skip_schedule: str = "uniform",
    class_labels: Sequence[int | str] | None = None,
    guidance_scale: float = 1.0,
    guidance_interval: tuple[float, float] = EVERYWHERE,
    guidance_channels: int | None = None,
) -> torch.Tensor:
    """Images number `indices` of the endless series that `seed` names.

    The noise of image i is the same, bit for bit, in every batch, and for every class; CPU and CUDA generators differ,
    so it is another image on another kind of device. The network adds up in another order for another batch *size*,
    which moves a pixel by a grey level now and then: where bits matter, keep the size and pad.

    Example:
        >>> pipeline = load_pipeline("google/ddpm-cifar10-32").to("cuda")
        >>> images = sample_images(pipeline, range(16), seed=0)  # uint8 [16, 3, 32, 32]
        >>> make_grid_image(images).save("grid.png")

    Args:
        pipeline: of a UNet2DModel or a DiTTransformer2DModel, and a DDPM or DDIM scheduler; see `make_pipeline`.
        indices: numbers of B images, each in [0, 2**32).
        seed: in [0, 2**32).
        num_inference_steps: length of the chain, 1 to `num_train_timesteps`; None for all of them.
        eta: of DDIM eq. 16: 0 is deterministic, 1 is DDPM-like. Must stay 0 for a DDPM scheduler.
        skip_schedule: see `inference_timesteps`.
        class_labels: B names, or numbers in [0, N), of N classes; None: image i is of class i mod N.
        guidance_scale: w of `predict_with_guidance`; 1 for none.
        guidance_interval: see `guidance_scales`.
        guidance_channels: see `predict_with_guidance`.

    Returns:
        uint8 [B, C, H, W] on the pipeline's device.

    Raises:
        ValueError, NotImplementedError: see `denoising_steps` and `sample_shape`; no index, or one out of range; labels
            that do not fit the images, or the model; guidance of an unconditional model.
        FloatingPointError: an image is not finite; uint8 would have it black or white.
    """
    network, device, indices = network_of(pipeline), pipeline._execution_device, [int(i) for i in indices]
    shape = sample_shape(network.config)
    steps = denoising_steps(pipeline.scheduler, num_inference_steps, eta, skip_schedule)
    scales = guidance_scales(pipeline.scheduler, steps, guidance_scale, guidance_interval)
    generators = image_generators(seed, indices, device)
    labels = choose_labels(pipeline, indices, class_labels, guidance_scale)
    labels = None if labels is None else torch.tensor(labels, device=device)
    was_training = network.training
    network.eval()
    try:
        x = denoise(pipeline, steps, scales, generators, labels, shape, guidance_channels)
    finally:
        network.train(was_training)
    check_finite_samples(network, x, indices)
    if (vae := vae_of(pipeline)) is not None:
        x = decode_latents(vae, x, indices)
    pipeline.maybe_free_model_hooks()
    return ((x / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)


def guidance_scales(
    scheduler: DDPMScheduler | DDIMScheduler, steps: list[Step], scale: float, interval: tuple[float, float]
) -> list[float]:
    """[steps] the guidance of each: `scale` where low < σ <= high, elsewhere 1, which takes half the time.

    σ = ((1 - ᾱ_t) / ᾱ_t)^½ is the noise level. Kynkäänniemi et al. 2024 (arXiv 2404.07724) find guidance harmful at
    high noise levels, where it takes away variety, and needless at low ones.

    Raises:
        ValueError: a scale or an interval out of range.
    """
    check_guidance_scale(scale)
    low, high = interval
    if not 0 <= low <= high:
        raise ValueError(f"guidance_interval={(low, high)} must be two noise levels, 0 <= LOW <= HIGH")
    alpha_bar = scheduler.alphas_cumprod.cpu().double()[[step.timestep for step in steps]]
    sigmas = ((1 - alpha_bar) / alpha_bar).sqrt().tolist()
    return [scale if low < sigma <= high else 1.0 for sigma in sigmas]


def choose_labels(
    pipeline: Pipeline, indices: list[int], class_labels: Sequence[int | str] | None, guidance_scale: float
) -> list[int] | None:
    """[B] the images' classes by number, of an unconditional model None or the null class; it must not be asked for any
    other."""
    config = network_of(pipeline).config
    null = null_label(config)
    id2label = None if null is None else read_id2label(pipeline.config.get("id2label"), config)
    if id2label is None:
        asked = {"class_labels": class_labels is not None, "guidance_scale": guidance_scale != 1}
        for name in filter(asked.get, asked):
            raise ValueError(f"{name} needs a class-conditional model, and this one is unconditional")
        return None if null is None else [null] * len(indices)
    if class_labels is None:
        return [i % len(id2label) for i in indices]
    labels = find_label_ids(class_labels, id2label)
    if len(labels) != len(indices):
        raise ValueError(f"{len(labels)} class_labels for {len(indices)} images")
    return labels


@torch.inference_mode()
def denoise(
    pipeline: Pipeline,
    steps: list[Step],
    scales: list[float],
    generators: list[torch.Generator],
    labels: torch.Tensor | None,
    shape: tuple[int, int, int],
    guidance_channels: int | None,
) -> torch.Tensor:
    """Run the chain from pure noise; float32 [B, C, H, W]. Nothing in the loop waits for the device."""
    network, config, device = network_of(pipeline), pipeline.scheduler.config, generators[0].device
    x = next(noise_maps(generators, shape, 1, device))
    noise = noise_maps(generators, shape, sum(step.sigma > 0 for step in steps), device)
    clip = config.clip_sample_range if config.clip_sample else None
    dtype = network.dtype  # asked once: it walks through all the modules
    timesteps = torch.tensor([step.timestep for step in steps], device=device).unbind()
    for step, t, scale in zip(pipeline.progress_bar(steps), timesteps, scales, strict=True):
        output = predict_with_guidance(network, x.to(dtype), t, labels, scale, guidance_channels)
        x = denoise_step(step, x, output, next(noise) if step.sigma > 0 else None, clip)
    return x


@torch.inference_mode()
def decode_latents(vae: AutoencoderKL, latents: torch.Tensor, indices: list[int]) -> torch.Tensor:
    """[B, C, H, W] float32 images number `indices`, in [-1, 1], of latents as the network makes them. In the VAE's own
    precision: some overflow in half. Raises FloatingPointError if one is not finite."""
    with torch.autocast(latents.device.type, enabled=False):
        parts = (latents / vae.config.scaling_factor).to(vae.dtype).split(DECODED_AT_A_TIME)
        images = torch.cat([vae.decode(part).sample.float() for part in parts])
    check_finite_samples(vae, images, indices)
    return images


def check_finite_samples(network: Network | AutoencoderKL, x: torch.Tensor, indices: list[int]) -> None:
    """Refuse NaN and infinity in what a network has made for images number `indices`, [B, ...]; waits for the device,
    so once a batch and not in the chain.

    Raises:
        FloatingPointError: naming the first, and whether the network's weights are to blame.
    """
    finite = x.isfinite().flatten(1).all(1).tolist()
    if all(finite):
        return
    bad = [index for index, is_finite in zip(indices, finite, strict=True) if not is_finite]
    names = nonfinite_weights(network)
    raise FloatingPointError(
        f"{len(bad)} of {len(indices)} images are not finite (NaN or infinity), the first is number {bad[0]}; "
        + (
            f"neither are the weights of its {type(network).__name__} ({names[0]}, ...)"
            if names
            else f"the weights of its {type(network).__name__} are: its arithmetic overflows"
        )
    )
