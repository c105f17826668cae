"""The network, the noise schedule and the timestep sampler, from options."""

import json
from contextlib import contextmanager

import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

from pipelines import denoising_steps
from samplers import PARTS, NoiseSchedule, epsilon_loss_scale, make_timestep_sampler

from .ema import whole


def build_unet(options, channels, resolution):
    """The `UNet2DModel` to train: DDPM's, or that of `--model_config_name_or_path`, with `--unet` over it.

    Raises:
        ValueError: settings that UNet2DModel refuses, be it when it is built or when it is called; or a resolution that
            its levels cannot halve.
    """
    config = unet_config(options, channels, resolution)
    with _named_unet_errors(options):
        levels = len(unet_on_meta(config).config.block_out_channels)
        if resolution % 2 ** (levels - 1) == 0:
            try_forward(unet_on_meta(config), channels, resolution)
            return UNet2DModel(**config)
    raise ValueError(
        f"--resolution {resolution}: a U-Net of {levels} levels needs a multiple of {2 ** (levels - 1)}; choose "
        "another, or fewer block_out_channels in --unet"
    )


def unet_config(options, channels, resolution):
    """Keyword arguments of the `UNet2DModel` to train."""
    if options.model_config_name_or_path:
        config = load_unet_config(options.model_config_name_or_path)
    else:
        config = default_unet_config(resolution)
    by_data = {"sample_size": resolution, "in_channels": channels, "out_channels": channels}
    for name in by_data.keys() & options.unet.keys():
        if options.unet[name] != by_data[name]:
            raise ValueError(f"--unet {name} {options.unet[name]}: the images decide that, which have {by_data[name]}")
    return config | options.unet | by_data


def unet_on_meta(config):
    """A `UNet2DModel` whose weights have shapes alone: it takes no memory, and moves no random state."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        return UNet2DModel(**config)


def try_forward(unet, channels, resolution):
    """Call the network on tensors that have a shape alone.

    Raises:
        Exception: whatever a setting leads to that only shows when the network is called.
    """
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        images, timesteps = torch.empty(2, channels, resolution, resolution), torch.zeros(2, dtype=torch.long)
        output = unet(images, timesteps, return_dict=False)[0]
    if output.shape != images.shape:
        raise ValueError(f"images of {list(images.shape[1:])} come out as {list(output.shape[1:])}")


@contextmanager
def _named_unet_errors(options):
    """Whatever diffusers and torch raise for settings that they cannot use, with the flag that they came from."""
    try:
        yield
    except Exception as error:
        flag = f"--unet {json.dumps(options.unet)}"
        if options.model_config_name_or_path:
            flag = f"--model_config_name_or_path {options.model_config_name_or_path} with {flag}"
        raise ValueError(f"{flag}: UNet2DModel cannot use it: {type(error).__name__}: {error}") from error


def load_unet_config(name_or_path):
    """The settings of a saved UNet2DModel: a folder, a pipeline's folder, a JSON file or a Hub id.

    Raises:
        ValueError: there is none, or it is of something else.
    """
    try:
        try:
            config = UNet2DModel.load_config(name_or_path)
        except OSError:  # no config.json: a pipeline's
            config = UNet2DModel.load_config(name_or_path, subfolder="unet")
        config = dict(config)
    except Exception as error:  # of the file system, the Hub, JSON, or a JSON list
        raise ValueError(f"--model_config_name_or_path {name_or_path}: no UNet2DModel's config: {error}") from error
    kind = config.get("_class_name", "UNet2DModel")
    if kind != "UNet2DModel" or "block_out_channels" not in config:
        found = f"a {kind}'s" if kind != "UNet2DModel" else "one without block_out_channels"
        raise ValueError(f"--model_config_name_or_path {name_or_path}: no UNet2DModel's config, but {found}")
    return {name: value for name, value in config.items() if not name.startswith("_")}


def default_unet_config(resolution):
    """DDPM's U-Net (arXiv 2006.11239, appendix B): widths doubled on the way down to 4x4, attention at 16x16.

    At 32x32 these are the settings of google/ddpm-cifar10-32, without its dropout."""
    multipliers = (1, 2, 2, 2) if resolution <= 32 else (1, 1, 2, 2, 4, 4)
    levels = 1
    while levels < len(multipliers) and resolution % 2**levels == 0 and resolution >> levels >= 4:
        levels += 1
    attention = [resolution >> level == 16 for level in range(levels)]
    return {
        "block_out_channels": [128 * multiplier for multiplier in multipliers[:levels]],
        "down_block_types": ["AttnDownBlock2D" if here else "DownBlock2D" for here in attention],
        "up_block_types": ["AttnUpBlock2D" if here else "UpBlock2D" for here in reversed(attention)],
        "layers_per_block": 2,
        "downsample_padding": 0,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "norm_eps": 1e-6,
        "attention_head_dim": None,
    }


def method_parts(options):
    """{part: name, or None for the method's own} of a method, as `samplers.make_timestep_sampler` takes them."""
    return {name: getattr(options, name) for name in PARTS}


def build_noise_scheduler(options):
    """The `DDPMScheduler` to train with and to save, which can sample in all numbers of steps that are planned.

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
    given = f"--ddpm_beta_schedule {options.ddpm_beta_schedule} --noise_scheduler {json.dumps(options.noise_scheduler)}"
    try:
        noise_scheduler = DDPMScheduler(**{**settings, **options.noise_scheduler})
        check_alphas_cumprod(noise_scheduler)
        planned = (options.ddpm_num_inference_steps, options.eval_num_inference_steps)
        for num_inference_steps in {*planned, options.ddpm_num_steps}:  # the last by generate.py, if not told otherwise
            denoising_steps(noise_scheduler, num_inference_steps)
    except Exception as error:  # diffusers does not check types
        raise ValueError(f"{given}: cannot be used: {type(error).__name__}: {error}") from error
    return noise_scheduler


def check_alphas_cumprod(noise_scheduler):
    """Refuse a schedule of noise that is not one. Raises ValueError."""
    alphas_cumprod, steps = noise_scheduler.alphas_cumprod, noise_scheduler.config.num_train_timesteps
    if len(alphas_cumprod) != steps:
        raise ValueError(f"trained_betas has {len(alphas_cumprod)} values, and --ddpm_num_steps is {steps}")
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


def build_sampler(options, schedule, images, device):
    """The method's timestep sampler.

    Args:
        schedule: a `NoiseSchedule`.
        images: [N, C, H, W] in [-1, 1], a sample of the training data.

    Raises:
        ValueError: names or settings that cannot be used.
    """
    given = dict(options.timestep_sampler_options)
    flag = f"--method {options.method} --timestep_sampler_options {json.dumps(given)}"
    for name in given.keys() & {"seed", "device", "images", "low_discrepancy", *PARTS}:
        raise ValueError(f"{flag}: {name} is no setting of a sampler's class; it has a flag, or is the run's")
    try:
        return make_timestep_sampler(
            schedule,
            options.method,
            **method_parts(options),
            images=images,
            low_discrepancy=options.low_discrepancy,
            seed=options.seed,
            device=device,
            **given,
        )
    except Exception as error:  # the classes check ranges, not types
        raise ValueError(f"{flag}: {error}") from error


def epsilon_scale_of(noise_scheduler, device):
    """[T] float32 on `device`: what `epsilon_errors` needs, for the scheduler's prediction type."""
    schedule = NoiseSchedule.from_scheduler(noise_scheduler)
    loss_scale = epsilon_loss_scale(schedule, noise_scheduler.config.prediction_type)
    return loss_scale.sqrt().to(device, torch.float32)


def epsilon_errors(unet, noise_scheduler, images, noise, timesteps, epsilon_scale):
    """[B, C, H, W] float32: the network's errors in eps at x_t, up to the sign, whatever it predicts.

    Args:
        images, noise: [B, C, H, W]; images in [-1, 1].
        timesteps: [B] int64.
        epsilon_scale: [T] of `epsilon_scale_of`.
    """
    noisy_images = noise_scheduler.add_noise(images, noise, timesteps)
    prediction = unet(noisy_images, timesteps, return_dict=False)[0]
    prediction_type = noise_scheduler.config.prediction_type
    if prediction_type == "epsilon":
        target = noise
    elif prediction_type == "v_prediction":
        target = noise_scheduler.get_velocity(images, noise, timesteps)
    else:
        target = images
    return (prediction.float() - target.float()) * epsilon_scale[timesteps].view(-1, 1, 1, 1)


def ema_pipeline(accelerator, unet, ema, noise_scheduler):
    """A `DDPMPipeline` of the averaged weights. All processes must call it.

    Raises:
        FloatingPointError: the average is not finite.
    """
    model = accelerator.unwrap_model(unet)
    names = (name for name, _ in model.named_parameters())
    weights = {name: whole(tensor) for name, tensor in zip(names, ema.shadow_params, strict=True)}
    check_finite(weights.values(), "averaged weights")
    with torch.random.fork_rng(devices=[]):  # initial weights, soon overwritten, must not move the run's dropout
        average = UNet2DModel.from_config(model.config)
    average.load_state_dict(weights)
    return DDPMPipeline(average.eval(), DDPMScheduler.from_config(noise_scheduler.config))


def check_finite(tensors, what):
    """Refuse weights that are not finite: nothing good can be saved of them, or sampled with them.

    Raises:
        FloatingPointError: on all processes alike.
    """
    is_finite = torch.stack([whole(tensor.detach()).isfinite().all() for tensor in tensors]).all().float()
    if torch.distributed.is_initialized():  # shards may differ
        torch.distributed.all_reduce(is_finite, torch.distributed.ReduceOp.MIN)
    if not is_finite:
        raise FloatingPointError(f"the {what} are not finite, and are not saved")


def warm_up(accelerator, unet, sampler, image_shape, batch_size):
    """Run the network and the sampler's losses forward and backward on noise, so that compilation and autotuning are
    over before the clock starts; without gradients too, if the sampler measures the network. Leaves weights, gradients
    and random states as they were."""
    device = accelerator.device
    timesteps = torch.zeros(batch_size, dtype=torch.long, device=device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        for _ in range(2):
            images = torch.randn(batch_size, *image_shape, device=device)
            sampler.losses(unet(images, timesteps, return_dict=False)[0], timesteps).mean().backward()
        if sampler.measures_model:
            unet.eval()
            with torch.no_grad():
                unet(images, timesteps, return_dict=False)
            unet.train()
    unet.zero_grad(set_to_none=True)
