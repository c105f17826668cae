"""A small variational autoencoder, so that latent diffusion can be tried where no weights can be downloaded.

    python benchmarks/train_autoencoder.py --dataset_name uoft-cs/cifar10 --output_dir runs/vae_cifar10_f4

Trains diffusers' AutoencoderKL, by default 32x32 pixels to 8x8 latents of 4 channels in minutes on one CPU thread, and
measures what it loses on images that it has not seen. `AutoencoderKL.from_pretrained(output_dir)` loads it. The
objective is that of Rombach et al. 2022 (High-Resolution Image Synthesis with Latent Diffusion Models, appendix G)
with the squared error for the absolute one, and without the perceptual and adversarial terms, which need weights or
time that there is not: reconstructions are blurred, and scores of samples include that.
"""

import math
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from transformers.hf_argparser import HfArg

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from new_outputs import check_new_folder, check_new_record

from images import ImageDataset, normalize, open_images, training_batches
from pipelines import make_grid_image
from pipelines.files import named_save_errors
from progress import progress_bar
from recipes import check_ranges, one_line_errors, parse_options
from scoring.frechet_metric import make_frechet_metric
from training.machine import device_name, library_versions, this_command
from training.options import validation_share
from training.saving import replace_file, write_json
from training.validation import divide

NORM_GROUPS = 8  # of each group normalisation, so channels are multiples of it
BATCH_SIZE = 250  # where no gradients are needed
SHOWN = 16  # images of the picture
RANGES = {
    "resolution": "[1, 2**16]",
    "block_out_channels": f"[{NORM_GROUPS}, 2**13]",
    "layers_per_block": "[1, 16]",
    "latent_channels": "[1, 2**10]",
    "kl_weight": "[0, inf)",
    "max_train_seconds": "(0, inf)",
    "max_train_steps": "[1, 2**53]",
    "train_batch_size": "[1, 2**16]",
    "learning_rate": "(0, inf)",
    "latent_images": "[2, 2**20]",
    "seed": "[0, 2**32)",
}


@dataclass
class AutoencoderOptions:
    """Options of benchmarks/train_autoencoder.py."""

    output_dir: str = HfArg(default="vae", help="Where the autoencoder goes: a folder that is new or empty.")
    output_json: str | None = HfArg(default=None, help="New file of the measurements, and a .png of that name.")
    dataset_name: str = HfArg(default="digits", help="As in training.")
    validation_split: str = HfArg(default="test", help="What to measure on: a split, or the share to hold out (0.05).")
    resolution: int | None = HfArg(default=None, help="As in training; a multiple of the reduction, 4 by default.")
    block_out_channels: list[int] = field(
        default_factory=lambda: [16, 32, 64],
        metadata={"help": f"Of each level, multiples of {NORM_GROUPS}; each level but the last halves the sides."},
    )
    layers_per_block: int = HfArg(default=1, help="Residual blocks of a level; the decoder has one more.")
    latent_channels: int = HfArg(default=4, help="Of a latent.")
    kl_weight: float = HfArg(default=1e-6, help="Of the KL divergence in the loss, both as sums over an image.")
    max_train_seconds: float = HfArg(default=600, help="Of training; the learning rate falls to 0 until then.")
    max_train_steps: int | None = HfArg(default=None, help="Updates, if those are fewer.")
    train_batch_size: int = HfArg(default=8, help="Images of an update.")
    learning_rate: float = HfArg(default=1e-3, help="AdamW's, at first.")
    latent_images: int = HfArg(default=5000, help="Training images that the latents' scale is measured on.")
    feature_extractor: str | None = HfArg(default=None, help="As in evaluate.py; default: no Fréchet distance.")
    seed: int = HfArg(default=0, help="Of initial weights, data order and noise.")

    def __post_init__(self):
        check_ranges(self, RANGES)
        for channels in self.block_out_channels:
            if channels % NORM_GROUPS:
                raise ValueError(f"--block_out_channels {channels}: must be a multiple of {NORM_GROUPS}")
        share = validation_share(self.validation_split)
        if share is not None and not 0 < share < 1:
            raise ValueError(f"--validation_split {share}: must be a share in (0, 1), or the name of a split")


def main(options: AutoencoderOptions) -> None:
    with one_line_errors(ValueError, OSError, FloatingPointError):
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        picture = check_outputs(options)
        dataset, test_images = open_data(options)
        frechet_metric = open_metric(options, len(test_images), device)
        os.makedirs(options.output_dir, exist_ok=True)

        torch.manual_seed(options.seed)
        vae = build_autoencoder(options, dataset.channels, dataset.resolution).to(device)
        batches = training_batches(dataset, options.train_batch_size, seed=options.seed, device=device)
        steps, seconds = train(vae, batches, options)
        vae.eval()
        latents = scale_latents(vae, dataset.random_sample(options.latent_images)[0].to(device))
        with named_save_errors(Path(options.output_dir)):
            vae.save_pretrained(options.output_dir)

        originals = test_images.decode_all().to(device)
        reconstructions = reconstruct(vae, originals)
        results = {
            "parameters": sum(parameter.numel() for parameter in vae.parameters()),
            "updates": steps,
            "images_seen": steps * options.train_batch_size,
            "seconds": seconds,
            "latents": latents,
            "test": errors(originals, reconstructions) | frechet_distance(frechet_metric, originals, reconstructions),
            "options": asdict(options),
            "device": device_name(device),
            "versions": library_versions(),
            "command": this_command(),
        }
        print(*(f"{name}: {results[name]}" for name in ("parameters", "updates", "latents", "test")), sep="\n")
        if options.output_json:
            rows = torch.cat([originals[:SHOWN], reconstructions[:SHOWN]])
            replace_file(picture, make_grid_image(rows, columns=min(SHOWN, len(originals)), scale=2).save)
            write_json(results, Path(options.output_json))


# Checks before the work


def check_outputs(options: AutoencoderOptions) -> Path | None:
    """The picture's path. Raises ValueError, naming the flag, where something would be written over."""
    check_new_folder(options.output_dir, options.dataset_name)
    if options.output_json is None:
        return None
    check_new_record(options.output_json, ".png")
    return Path(options.output_json).with_suffix(".png")


def open_data(options: AutoencoderOptions) -> tuple[ImageDataset, ImageDataset]:
    """(Images to train on, images to measure on). Raises ValueError, naming the flag."""
    dataset = open_images(options.dataset_name, resolution=options.resolution)
    open_split = partial(open_images, options.dataset_name, like=dataset)
    dataset, test_images = divide(dataset, options.validation_split, lambda split: open_split(split=split))
    reduction = 2 ** (len(options.block_out_channels) - 1)
    if dataset.resolution % reduction:
        raise ValueError(f"--resolution {dataset.resolution}: must be a multiple of {reduction}, the reduction")
    print(dataset.describe())
    return dataset, test_images


def open_metric(options: AutoencoderOptions, num_images: int, device: torch.device) -> Any:
    """The Fréchet distance with the features asked for, or None. Raises ValueError, naming the flag."""
    if options.feature_extractor is None:
        return None
    metric = make_frechet_metric(options.feature_extractor, device=device)
    if num_images <= metric.inception.num_features:
        raise ValueError(
            f"--feature_extractor {options.feature_extractor}: has {metric.inception.num_features} features, which "
            f"need more than the {num_images} images of --validation_split {options.validation_split}"
        )
    return metric


# Training


def build_autoencoder(options: AutoencoderOptions, channels: int, resolution: int) -> AutoencoderKL:
    """[N, C, H, W] to latents [N, latent_channels, H / f, W / f] and back, f = 2^(levels - 1); random weights."""
    levels = len(options.block_out_channels)
    return AutoencoderKL(
        in_channels=channels,
        out_channels=channels,
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        block_out_channels=options.block_out_channels,
        layers_per_block=options.layers_per_block,
        latent_channels=options.latent_channels,
        norm_num_groups=NORM_GROUPS,
        sample_size=resolution,
    )


def train(vae: AutoencoderKL, batches: Iterator[torch.Tensor], options: AutoencoderOptions) -> tuple[int, float]:
    """Train until the first budget is spent, the learning rate falling linearly to 0: (updates, seconds).

    Raises:
        FloatingPointError: the loss is no longer finite.
    """
    optimizer = torch.optim.AdamW(vae.parameters(), lr=options.learning_rate)
    steps, spent, start = 0, 0.0, time.perf_counter()
    with progress_bar(total=100, unit="%", desc="Training") as bar:
        while spent < 1:
            for group in optimizer.param_groups:
                group["lr"] = options.learning_rate * (1 - spent)
            loss = autoencoder_loss(vae, normalize(next(batches)), options.kl_weight)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
            optimizer.step()
            steps += 1
            spent = max(
                (time.perf_counter() - start) / options.max_train_seconds, steps / (options.max_train_steps or math.inf)
            )
            if math.floor(100 * min(spent, 1)) > bar.n:  # reading the loss waits for a GPU
                bar.set_postfix(loss=checked(loss, steps), updates=steps, refresh=False)
                bar.update(math.floor(100 * min(spent, 1)) - bar.n)
    return steps, time.perf_counter() - start


def checked(loss: torch.Tensor, steps: int) -> float:
    """The loss as a number. Raises FloatingPointError where it is none."""
    if not loss.isfinite():
        raise FloatingPointError(f"the loss is {loss.item()} after {steps} updates: try a lower --learning_rate")
    return loss.item()


def autoencoder_loss(vae: AutoencoderKL, images: torch.Tensor, kl_weight: float) -> torch.Tensor:
    """Squared error of a sampled reconstruction + kl_weight * KL(posterior || N(0, 1)), both summed over an image,
    then divided by the number of its values. LDM weighs the sums alike (kl_weight 1e-6), with the absolute error.

    Args:
        images: float32 [N, C, H, W] in [-1, 1].
    """
    posterior = vae.encode(images).latent_dist
    reconstructions = vae.decode(posterior.sample()).sample
    squares = (reconstructions - images).square().sum()
    return (squares + kl_weight * posterior.kl().sum()) / images.numel()


# Measurements


@torch.no_grad()
def scale_latents(vae: AutoencoderKL, images: torch.Tensor) -> dict[str, Any]:
    """Set `scaling_factor` so that the latents of these images, uint8 [N, C, H, W], have a standard deviation of one
    over all channels, as LDM does; and say what they are like, unscaled."""
    batches = images.split(BATCH_SIZE)
    latents = torch.cat([vae.encode(normalize(batch)).latent_dist.sample() for batch in batches])
    vae.register_to_config(scaling_factor=1 / latents.std().item())
    return {
        "images": len(images),
        "shape": list(latents.shape[1:]),
        "scaling_factor": vae.config.scaling_factor,
        "std": latents.std().item(),
        "mean_per_channel": latents.mean((0, 2, 3)).tolist(),
        "std_per_channel": latents.std((0, 2, 3)).tolist(),
        "are_finite": bool(latents.isfinite().all()),
    }


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, images: torch.Tensor) -> torch.Tensor:
    """uint8 [N, C, H, W] decoded from the means of their latents, likewise."""
    decoded = [vae(normalize(batch)).sample for batch in images.split(BATCH_SIZE)]
    return ((torch.cat(decoded) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def errors(originals: torch.Tensor, reconstructions: torch.Tensor) -> dict[str, float]:
    """Of uint8 images, in grey levels; PSNR in dB, of the mean square error over all images."""
    difference = reconstructions.double() - originals.double()
    mse = difference.square().mean().item()
    psnr = 10 * math.log10(255**2 / mse) if mse else math.inf
    return {"images": len(originals), "mse": mse, "psnr": psnr, "mean_absolute_error": difference.abs().mean().item()}


def frechet_distance(metric: Any, originals: torch.Tensor, reconstructions: torch.Tensor) -> dict[str, float]:
    """{"fid" or "fd": the distance of the reconstructions from the originals}; nothing where there is no metric."""
    if metric is None:
        return {}
    for images, is_original in ((originals, True), (reconstructions, False)):
        for batch in images.split(BATCH_SIZE):
            metric.update(batch, real=is_original)
    return {metric.inception.score_name: metric.compute().item()}


if __name__ == "__main__":
    main(parse_options(AutoencoderOptions))
