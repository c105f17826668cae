"""Sampling from an unconditional diffusion model, one random stream per image.

The stock `DDPMPipeline` draws the noise of a whole batch at once, so an image changes with its batch, and its
scheduler waits for the device several times a step. Here image i depends on (seed, i) alone, and the
coefficients of the whole chain are computed once, from the scheduler, before the first step.
"""

import copy
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel
from PIL import Image
from torchvision.utils import make_grid

NOISE_STEPS = 50  # denoising steps whose noise is drawn at once for each image
NOISE_VALUES = 2**20  # at most so many values an image and draw (4 MiB): bounds the memory for large images
SIGMA_LEARNED = ("learned", "learned_range")
SPACINGS = ("linspace", "leading", "trailing")
FIXED_VARIANCES = ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log")


class UnconditionalPipeline(DDPMPipeline):
    """A `DDPMPipeline` whose images can be asked for one by one: image i depends on (seed, i) only.

    It loads any folder or Hub id made of a UNet2DModel and a DDPM or DDIM scheduler, and saves a stock
    `DDPMPipeline`.

    Example:
        >>> pipeline = UnconditionalPipeline.from_pretrained("google/ddpm-cifar10-32").to("cuda")
        >>> images = pipeline.sample(range(16), seed=0)  # uint8 [16, 3, 32, 32]
        >>> make_grid_image(images).save("grid.png")
    """

    def __init__(self, unet: UNet2DModel, scheduler: DDPMScheduler | DDIMScheduler):
        super().__init__(unet=unet, scheduler=scheduler)

    def save_pretrained(self, save_directory, **kwargs) -> None:
        """Save as a stock `DDPMPipeline`, which anyone with diffusers can load."""
        DDPMPipeline(unet=self.unet, scheduler=self.scheduler).save_pretrained(save_directory, **kwargs)

    def sample(
        self,
        indices: Sequence[int],
        seed: int = 0,
        num_inference_steps: int | None = None,
        eta: float = 0.0,
        skip_schedule: str = "uniform",
    ) -> torch.Tensor:
        """Images number `indices` of the endless series that `seed` names.

        The noise of image i is the same, bit for bit, in every batch; CPU and CUDA generators differ, so it
        is another image on another kind of device. The network adds up in another order for another batch
        *size*, which moves a pixel by a grey level now and then: where bits matter, keep the size and pad.

        Args:
            indices: numbers of the images, each in [0, 2**32).
            seed: in [0, 2**32).
            num_inference_steps: length of the chain, 1 to `num_train_timesteps`; None for all of them.
            eta: of DDIM eq. 16: 0 is deterministic, 1 is DDPM-like. Must stay 0 for a DDPM scheduler.
            skip_schedule: see `inference_timesteps`.

        Returns:
            uint8 [B, C, H, W] on the pipeline's device.

        Raises:
            ValueError, NotImplementedError: see `denoising_steps` and `image_shape`; or no index, or one out
            of range.
            FloatingPointError: an image is not finite; uint8 would have it black or white.
        """
        device, indices = self._execution_device, [int(i) for i in indices]
        shape = image_shape(self.unet.config)
        steps = denoising_steps(self.scheduler, num_inference_steps, eta, skip_schedule)
        generators = image_generators(seed, indices, device)
        was_training = self.unet.training
        self.unet.eval()
        try:
            x = self._denoise(steps, generators, shape, device)
        finally:
            self.unet.train(was_training)
        self.maybe_free_model_hooks()
        self._check_finite(x, indices)
        return ((x / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)

    @torch.inference_mode()
    def _denoise(self, steps, generators, shape, device) -> torch.Tensor:
        """Run the chain from pure noise; float32 [B, C, H, W]. Nothing in the loop waits for the device."""
        x = next(noise_maps(generators, shape, 1, device))
        noise = noise_maps(generators, shape, sum(step.sigma > 0 for step in steps), device)
        clip = self.scheduler.config.clip_sample_range if self.scheduler.config.clip_sample else None
        dtype = self.unet.dtype  # asked once: it walks through all the modules
        timesteps = torch.tensor([step.timestep for step in steps], device=device).unbind()
        for step, t in zip(self.progress_bar(steps), timesteps, strict=True):
            output = self.unet(x.to(dtype), t).sample.float()
            x = denoise_step(step, x, output, next(noise) if step.sigma > 0 else None, clip)
        return x

    def _check_finite(self, x: torch.Tensor, indices: list[int]) -> None:
        """Refuse NaN and infinity; waits for the device, so once a batch and not in the chain."""
        finite = x.isfinite().flatten(1).all(1).tolist()
        if all(finite):
            return
        bad = [index for index, is_finite in zip(indices, finite, strict=True) if not is_finite]
        names = nonfinite_weights(self.unet)
        raise FloatingPointError(
            f"{len(bad)} of {len(indices)} images are not finite (NaN or infinity), the first is number {bad[0]}; "
            + (
                f"neither are the network's weights ({names[0]}, ...)"
                if names
                else "the network's weights are: its arithmetic overflows"
            )
        )


# The chain


class Step(NamedTuple):
    """One step of the chain. Python floats, not tensors: they travel with the kernel that uses them.

    x̂_0     = clip((x0_x · x_t + x0_output · output) / x0_scale)
    x_{t-1} = prev_x0 · x̂_0 + prev_x · x_t + prev_output · output + sigma · noise
    """

    timestep: int
    x0_x: float
    x0_output: float
    x0_scale: float
    prev_x0: float
    prev_x: float
    prev_output: float
    sigma: float


def denoise_step(step: Step, x: torch.Tensor, output: torch.Tensor, noise: torch.Tensor | None, clip: float | None):
    """x_t [B, C, H, W] and the network's output for it -> x_{t-1}; see `Step`."""
    x0 = (step.x0_x * x).add_(output, alpha=step.x0_output).div_(step.x0_scale)
    if clip is not None:
        x0.clamp_(-clip, clip)
    prev = x0.mul_(step.prev_x0).add_(x, alpha=step.prev_x)
    if step.prev_output != 0:
        prev.add_(output, alpha=step.prev_output)
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
        prev = ddim_previous(scheduler.config.prediction_type, alpha_bar, alpha_bar_prev, eta)
    else:
        prev = ddpm_previous(scheduler.config.variance_type, alpha_bar, alpha_bar_prev, timesteps)
    columns = [torch.as_tensor(column).expand(len(timesteps)).tolist() for column in (*x0, *prev)]
    return [Step(*row) for row in zip(timesteps.tolist(), *columns, strict=True)]


def predict_x0(prediction_type: str, alpha_bar: torch.Tensor) -> tuple:
    """(x0_x, x0_output, x0_scale) of `Step`: DDPM eq. 15, or Salimans & Ho 2022 for a predicted v."""
    if prediction_type == "epsilon":
        return 1.0, -(1 - alpha_bar).sqrt(), alpha_bar.sqrt()
    if prediction_type == "v_prediction":
        return alpha_bar.sqrt(), -(1 - alpha_bar).sqrt(), 1.0
    return 0.0, 1.0, 1.0


def predict_epsilon(prediction_type: str, alpha_bar: torch.Tensor) -> tuple:
    """(a, b) such that ε̂ = a · x_t + b · output; from the unclipped x̂_0, as `DDIMScheduler.step` has it."""
    if prediction_type == "epsilon":
        return 0.0, 1.0
    if prediction_type == "v_prediction":
        return (1 - alpha_bar).sqrt(), alpha_bar.sqrt()
    return 1 / (1 - alpha_bar).sqrt(), -alpha_bar.sqrt() / (1 - alpha_bar).sqrt()


def ddpm_previous(
    variance_type: str, alpha_bar: torch.Tensor, alpha_bar_prev: torch.Tensor, timesteps: torch.Tensor
) -> tuple:
    """(prev_x0, prev_x, prev_output, sigma) of `Step`: DDPM eq. 7, which holds for a sub-sequence as well."""
    alpha = alpha_bar / alpha_bar_prev
    beta = 1 - alpha
    # For fixed_large_log, diffusers takes the square root of log(β_t), which is NaN; what is meant is β_t.
    large = variance_type in ("fixed_large", "fixed_large_log")
    variance = beta if large else ((1 - alpha_bar_prev) / (1 - alpha_bar) * beta).clamp(min=1e-20)
    prev_x0 = alpha_bar_prev.sqrt() * beta / (1 - alpha_bar)
    prev_x = alpha.sqrt() * (1 - alpha_bar_prev) / (1 - alpha_bar)
    return prev_x0, prev_x, 0.0, variance.sqrt() * (timesteps > 0)


def ddim_previous(prediction_type: str, alpha_bar: torch.Tensor, alpha_bar_prev: torch.Tensor, eta: float) -> tuple:
    """(prev_x0, prev_x, prev_output, sigma) of `Step`: DDIM eq. 12, with the σ_t(η) of eq. 16."""
    sigma = eta * ((1 - alpha_bar_prev) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_prev)).sqrt()
    direction = (1 - alpha_bar_prev - sigma**2).clamp(min=0).sqrt()
    epsilon_x, epsilon_output = predict_epsilon(prediction_type, alpha_bar)
    return alpha_bar_prev.sqrt(), direction * epsilon_x, direction * epsilon_output, sigma


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


def check_scheduler(scheduler: Any, eta: float = 0.0) -> None:
    """Refuse by name what there is no formula for here."""
    if not isinstance(scheduler, DDPMScheduler | DDIMScheduler):
        raise ValueError(f"{type(scheduler).__name__} is not a DDPMScheduler or a DDIMScheduler")
    config = scheduler.config
    table = scheduler.alphas_cumprod
    if not ((table >= 0) & (table <= 1)).all():
        raise ValueError("its betas (beta_start, beta_end, trained_betas) give an alphas_cumprod outside [0, 1]")
    if len(table) != config.num_train_timesteps:
        raise ValueError(f"{len(table)} trained_betas are not num_train_timesteps={config.num_train_timesteps}")
    if type(config.steps_offset) is not int or config.steps_offset < 0:
        raise ValueError(f"steps_offset={config.steps_offset!r} must be a whole number, 0 or more")
    if config.timestep_spacing not in SPACINGS:
        raise ValueError(f"timestep_spacing={config.timestep_spacing!r} must be one of {', '.join(SPACINGS)}")
    if config.clip_sample and not is_positive(config.clip_sample_range):
        raise ValueError(f"clip_sample_range={config.clip_sample_range!r} must be a finite number above 0")
    if config.thresholding:
        raise NotImplementedError("thresholding=True is not implemented; clip_sample is")
    if config.get("variance_type") in SIGMA_LEARNED and isinstance(scheduler, DDPMScheduler):
        raise NotImplementedError(f"variance_type={config.variance_type!r} is not implemented")
    if isinstance(scheduler, DDPMScheduler) and config.variance_type not in FIXED_VARIANCES:
        raise ValueError(f"variance_type={config.variance_type!r} must be one of {', '.join(FIXED_VARIANCES)}")
    if config.prediction_type not in ("epsilon", "v_prediction", "sample"):
        known = "epsilon, v_prediction or sample"
        raise ValueError(f"prediction_type={config.prediction_type!r} must be {known}")
    if not 0 <= eta <= 1:
        raise ValueError(f"eta={eta} must be in [0, 1]")
    if eta > 0 and isinstance(scheduler, DDPMScheduler):
        raise ValueError(f"eta={eta} belongs to DDIM; a DDPMScheduler takes its noise from variance_type")


def is_positive(value: Any) -> bool:
    """Whether a value of a config is a finite number above 0."""
    return isinstance(value, int | float) and 0 < value < math.inf


# Noise


def mix32(x: int) -> int:
    """A bijection of the 32-bit integers that scatters neighbours (lowbias32, Wellons 2018)."""
    x = (x + 0x9E3779B9) & 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)


def image_seed(seed: int, index: int) -> int:
    """The 64-bit generator seed of image `index`; no two (seed, index) share one.

    PyTorch's CPU generator reads only the low 32 bits: they alone are a bijection of `index` for a fixed
    seed, and of `seed` for a fixed index, so no two images of one run ever start from the same noise.

    Raises:
        ValueError: seed or index outside [0, 2**32).
    """
    for name, value in (("seed", seed), ("index", index)):
        if not 0 <= value < 2**32:
            raise ValueError(f"{name}={value} must be in [0, 2**32)")
    return seed << 32 | mix32(mix32(index) ^ seed)


def image_generators(seed: int, indices: Sequence[int], device: torch.device) -> list[torch.Generator]:
    """One generator an image, on the device that draws."""
    if not indices:
        raise ValueError("no image asked for: indices is empty")
    return [torch.Generator(device).manual_seed(image_seed(seed, i)) for i in indices]


def noise_maps(
    generators: list[torch.Generator], shape: tuple[int, ...], count: int, device: torch.device
) -> Iterator[torch.Tensor]:
    """`count` standard normal maps float32 [B, C, H, W], row i from generator i.

    Each is drawn for many steps at once: one launch an image and step would cost as much as the network. How
    many depends on `shape` and `count`, never on the batch. A map is valid until the next one is asked for.
    """
    steps = max(1, min(NOISE_STEPS, NOISE_VALUES // math.prod(shape)))
    for done in range(0, count, steps):
        maps = torch.empty(len(generators), min(steps, count - done), *shape, device=device)
        for row, generator in zip(maps, generators, strict=True):
            row.normal_(generator=generator)
        yield from maps.unbind(1)


# Shapes and pictures


def image_shape(unet_config: dict[str, Any]) -> tuple[int, int, int]:
    """(C, H, W) of the images that a U-Net with this config makes.

    Raises:
        ValueError: it is class-conditional, has a learned variance, or does not name its size.
    """
    channels, size = unet_config.get("in_channels", 3), unet_config.get("sample_size")
    if unet_config.get("class_embed_type") or unet_config.get("num_class_embeds"):
        raise ValueError("the UNet2DModel is class-conditional; only unconditional ones are sampled here")
    if (outputs := unet_config.get("out_channels", 3)) != channels:
        raise ValueError(f"the UNet2DModel has in_channels={channels} but out_channels={outputs}")
    if size is None:
        raise ValueError("the UNet2DModel's config has no sample_size, so the images' size is not known")
    height, width = size if isinstance(size, list | tuple) and len(size) == 2 else (size, size)
    for value in (channels, height, width):
        if type(value) is not int or value < 1:
            raise ValueError(
                f"the UNet2DModel has in_channels={channels!r}, sample_size={size!r}: not whole numbers > 0"
            )
    return channels, height, width


def nonfinite_weights(unet: torch.nn.Module) -> list[str]:
    """Names of the weights that hold a NaN or an infinity."""
    return [name for name, tensor in unet.state_dict().items() if not tensor.isfinite().all()]


def make_grid_image(images: torch.Tensor, columns: int | None = None, scale: int | None = None) -> Image.Image:
    """One picture of many: uint8 [N, C, H, W], grey or RGB, row by row, two black pixels apart.

    Args:
        columns: images a row; about a square when None.
        scale: enlarges each pixel to a square of this side; by default small images become at least 64 pixels
            wide.

    Raises:
        ValueError: no image, or neither 1 nor 3 channels.
    """
    if images.ndim != 4 or len(images) == 0 or images.shape[1] not in (1, 3) or images.dtype != torch.uint8:
        found = f"{images.dtype} {list(images.shape)}"
        raise ValueError(f"expected uint8 [N, 1 or 3, H, W] with N > 0, got {found}")
    scale = scale or math.ceil(64 / min(64, *images.shape[2:]))
    images = images.cpu().repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    grid = make_grid(images, nrow=columns or math.ceil(math.sqrt(len(images))))
    return to_pil(grid[: images.shape[1]])  # make_grid turns grey into RGB


def to_pil(image: torch.Tensor) -> Image.Image:
    """uint8 [1 or 3, H, W] -> a grey or RGB picture."""
    array = image.permute(1, 2, 0).contiguous().cpu().numpy()
    return Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)
