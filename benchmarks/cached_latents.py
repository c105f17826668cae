"""Training steps per second from latents that were encoded once, against encoding every batch as SpeeD and DiT do.

    python benchmarks/cached_latents.py --config configs/cifar10_latents.yaml --output_json cached_latents.json

The same `train_step` of the same network, taking turns: only where its inputs come from differs. All options are those
of the training script.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from timing import TimingOptions, summary, time_interleaved

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from new_outputs import check_new_record

from images import LatentDataset, normalize
from pipelines import null_label
from recipes import one_line_errors, parse_options
from train_adaptive_ddpm import train_step
from training.clock import PhaseClock
from training.data import open_batches, open_training_data
from training.denoiser import Denoiser
from training.latents import encode_images
from training.machine import device_name, library_versions, this_command
from training.methods import build_sampler
from training.network import build_network
from training.noise_schedule import build_noise_scheduler
from training.options import TrainingOptions
from training.saving import write_json
from training.state import build_state
from training.step_random import StepRandom
from training.warm_up import warm_up


@dataclass
class CachedLatentsOptions(TrainingOptions, TimingOptions):
    """Those of training, and those of the measurement."""


def main(options: CachedLatentsOptions) -> None:
    if options.vae is None:
        raise SystemExit("--vae: must be given; its latents are what is cached")
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision=options.mixed_precision)
    torch.set_float32_matmul_precision("high")
    with one_line_errors(ValueError, OSError):
        check_new_record(options.output_json)
        dataset, _ = open_training_data(options)
        vae, latents, _ = encode_images(options, accelerator, dataset, None, PhaseClock(accelerator.device))
    update = make_update(options, accelerator, latents)
    sources = {
        "cached": (open_batches(options, latents, accelerator, images_seen=0), latents.to_inputs),
        "online": (open_batches(options, dataset, accelerator, images_seen=0), encoder(vae)),
    }

    def make_steps(name: str) -> Callable[[], None]:
        batches, to_inputs = sources[name]
        return lambda: [update(to_inputs, *next(batches)) for _ in range(options.steps_per_repeat)]

    seconds = time_interleaved({name: make_steps(name) for name in sources}, options.repeats)
    rates = {name: summary([options.steps_per_repeat / value for value in values]) for name, values in seconds.items()}
    ratios = [online / cached for cached, online in zip(seconds["cached"], seconds["online"], strict=True)]
    results = {
        "steps_per_second": rates,
        "cached_over_online": summary(ratios),
        "seed": options.seed,
        "threads": torch.get_num_threads(),
        "device": device_name(accelerator.device),
        "versions": library_versions(),
        "command": this_command(),
    }
    for name, values in {**rates, "cached over online": results["cached_over_online"]}.items():
        print(f"{name:20} {values['median']:8.3f}  ({values['min']:.3f} to {values['max']:.3f})")
    if options.output_json:
        write_json(results, Path(options.output_json))


def make_update(
    options: TrainingOptions, accelerator: Accelerator, latents: LatentDataset
) -> Callable[[Callable, torch.Tensor, torch.Tensor], None]:
    """A function that makes an update, as train_adaptive_ddpm.py does, of (to_inputs, a batch, its labels)."""
    torch.manual_seed(options.seed)
    num_classes = len(latents.classes) if options.class_conditional else None
    network = build_network(options, latents.channels, latents.resolution, num_classes)
    noise_scheduler = build_noise_scheduler(options)
    sampler = build_sampler(options, noise_scheduler, latents.sample, options.seed, accelerator.device)
    state = build_state(options, accelerator, network, sampler, {}, PhaseClock(accelerator.device))
    null = null_label(network.config)
    denoiser = Denoiser(state.network, noise_scheduler, accelerator.device, null)
    warm_up(state, denoiser, latents.image_shape, options.train_batch_size)

    def update(to_inputs: Callable, batch: torch.Tensor, labels: torch.Tensor) -> None:
        shares = options.random_flip, options.share_of_null_labels
        step_random = StepRandom(options.seed, accelerator, to_inputs, *shares, null)
        train_step(state, denoiser, step_random, batch, labels)

    return update


def encoder(vae: AutoencoderKL) -> Callable[..., torch.Tensor]:
    """In place of `LatentDataset.to_inputs`: from uint8 images [B, C, H, W], by a VAE on their device."""

    @torch.no_grad()
    def to_inputs(batch: torch.Tensor, flips: torch.Tensor | None, draw: Callable) -> torch.Tensor:
        posterior = vae.encode(normalize(batch, flips)).latent_dist
        return (posterior.mean + posterior.std * draw(posterior.mean.shape)) * vae.config.scaling_factor

    return to_inputs


if __name__ == "__main__":
    main(parse_options(CachedLatentsOptions, sys.argv[1:]))
