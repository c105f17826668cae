"""The network, the noise schedule and the names of the method's parts, from options."""

import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

from samplers import PARTS, NoiseSchedule, epsilon_loss_scale

from .ema import whole


def build_unet(options, channels, resolution):
    """The `UNet2DModel` to train: DDPM's, or that of `--model_config_name_or_path`, with `--unet` over it.

    Raises:
        ValueError: settings that UNet2DModel refuses, or a resolution that its levels cannot halve.
    """
    if options.model_config_name_or_path:
        config = load_unet_config(options.model_config_name_or_path)
    else:
        config = default_unet_config(resolution)
    config |= options.unet
    config |= {"sample_size": resolution, "in_channels": channels, "out_channels": channels}
    levels = len(config["block_out_channels"])
    if resolution % 2 ** (levels - 1):
        raise ValueError(
            f"--resolution {resolution}: a U-Net of {levels} levels needs a multiple of {2 ** (levels - 1)}; choose "
            "another, or fewer block_out_channels in --unet"
        )
    try:
        return UNet2DModel(**config)
    except (TypeError, ValueError) as error:
        raise ValueError(f"--unet: {error}") from error


def load_unet_config(name_or_path):
    """The settings of a saved UNet2DModel: a folder, a pipeline's folder, a JSON file or a Hub id."""
    try:
        config = UNet2DModel.load_config(name_or_path)
        if config.get("_class_name") == "DDPMPipeline":
            config = UNet2DModel.load_config(name_or_path, subfolder="unet")
    except OSError as error:
        raise ValueError(f"--model_config_name_or_path {name_or_path}: {error}") from error
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
    """The `DDPMScheduler` to train with and to save.

    Raises:
        ValueError: an unknown schedule or setting, or a last timestep without any signal.
    """
    settings = {
        "num_train_timesteps": options.ddpm_num_steps,
        "beta_schedule": options.ddpm_beta_schedule,
        "prediction_type": options.prediction_type,
        **options.noise_scheduler,
    }
    try:
        noise_scheduler = DDPMScheduler(**settings)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise ValueError(f"--ddpm_beta_schedule / --noise_scheduler {settings}: {error}") from error
    if noise_scheduler.alphas_cumprod[-1] == 0:
        raise ValueError(
            "--noise_scheduler: a zero terminal SNR (rescale_betas_zero_snr) cannot be trained here: objectives are "
            "defined on the epsilon-loss, which says nothing about a network's output where there is no signal"
        )
    return noise_scheduler


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
    """A `DDPMPipeline` of the averaged weights. All processes must call it."""
    model = accelerator.unwrap_model(unet)
    names = (name for name, _ in model.named_parameters())
    weights = {name: whole(tensor) for name, tensor in zip(names, ema.shadow_params, strict=True)}
    with torch.random.fork_rng(devices=[]):  # initial weights, soon overwritten, must not move the run's dropout
        average = UNet2DModel.from_config(model.config)
    average.load_state_dict(weights)
    return DDPMPipeline(average.eval(), DDPMScheduler.from_config(noise_scheduler.config))


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
