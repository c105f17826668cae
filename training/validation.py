"""The loss by noise level on images that are not trained on: how far a run is, whatever its objective is."""

import re
from collections.abc import Callable

import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler

from images import ImageDataset, LatentDataset
from samplers import fold_seed

from .denoiser import Denoiser
from .metrics import LossMeter
from .options import validation_share

NUM_EXAMPLES = 1000  # 50 for each of twenty bins of timesteps
BATCH_SIZE = 32  # at least: without gradients there is room
SEED = 0  # not the run's: the examples are the same in all runs


def divide(
    dataset: ImageDataset, split: str | None, open_split: Callable[[str], ImageDataset]
) -> tuple[ImageDataset, ImageDataset | None]:
    """(What to train on, what to validate on, or None).

    Args:
        dataset: the images of the split `train`.
        split: `--validation_split`.
        open_split: opens another split of them.

    Raises:
        ValueError: there is nothing to validate on that is not trained on too.
    """
    if split is None:
        return dataset, None
    try:
        if (share := validation_share(split)) is not None:
            return dataset.hold_out(share)
        if {"train", "all"} & {re.split(r"[\[(]", part)[0].strip() for part in split.split("+")}:
            raise ValueError("the split train is trained on: give another, or a share of it to hold out, as 0.1")
        validation = open_split(split)
        if not len(validation):
            raise ValueError("holds no images")
        return dataset, validation
    except ValueError as error:
        raise ValueError(f"--validation_split {split}: {error}") from error


class ValidationLoss:
    """The plain epsilon-loss, by timestep bin, of fixed examples: images, timesteps and noise are the same at each time
    and in each run of the same data and number of timesteps, on any number of processes.

    Example i has image i modulo N in a random order, so that neighbouring timesteps have unlike images; timesteps are
    stratified, at equal distances from 0 to T.

    Args:
        images: to choose a thousand of, at random.
        labels: int64 [len(images)].
        num_train_timesteps: T.
        batch_size: of training, which fits; without gradients one of `BATCH_SIZE` does too.
    """

    def __init__(
        self,
        images: ImageDataset | LatentDataset,
        labels: torch.Tensor,
        num_train_timesteps: int,
        batch_size: int,
        accelerator: Accelerator,
    ):
        self.images, indices = images.random_sample(NUM_EXAMPLES)
        self.to_inputs, self.image_shape = images.to_inputs, images.image_shape
        self.labels = labels[indices]
        self.accelerator, self.batch_size = accelerator, max(batch_size, BATCH_SIZE)
        self.num_train_timesteps = num_train_timesteps
        order = torch.randperm(NUM_EXAMPLES, generator=torch.Generator().manual_seed(SEED))
        self.image_numbers = order % len(self.images)
        self.timesteps = (torch.arange(NUM_EXAMPLES) * num_train_timesteps + num_train_timesteps // 2) // NUM_EXAMPLES

    def measure(
        self,
        network: torch.nn.Module,
        noise_scheduler: DDPMScheduler,
        null_label: int | None = None,
    ) -> tuple[float | None, list[float | None]]:
        """(mean, [bins] means) of the epsilon-losses of a network on the accelerator's device. All processes must call
        it. Losses that are not finite are left out.

        Args:
            null_label: of the network; see `Denoiser`.
        """
        accelerator, device = self.accelerator, self.accelerator.device
        denoiser = Denoiser(network, noise_scheduler, device, null_label)
        meter = LossMeter(self.num_train_timesteps, device)
        share = torch.arange(accelerator.process_index, NUM_EXAMPLES, accelerator.num_processes)
        for numbers in share.split(self.batch_size):
            meter.add_losses(*self._losses(denoiser, numbers))
        means = meter.read(accelerator)
        return means.loss, means.loss_by_timestep

    def _losses(self, denoiser: Denoiser, numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(timesteps [B], losses [B], losses [B]) of the examples of these numbers."""
        device = self.accelerator.device
        image_numbers = self.image_numbers[numbers]
        draw = lambda shape: self._noise(image_numbers + NUM_EXAMPLES)  # noqa: E731  an image has one latent
        images = self.to_inputs(self.images[image_numbers], None, draw).to(device)
        labels, timesteps = self.labels[image_numbers].to(device), self.timesteps[numbers].to(device)
        noise = self._noise(numbers).to(device)
        losses = denoiser.epsilon_losses(images, noise, timesteps, labels)
        return timesteps, losses, losses

    def _noise(self, numbers: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] by number, drawn on the CPU, whose generator is the same everywhere."""
        generators = (torch.Generator().manual_seed(fold_seed(SEED, number)) for number in numbers.tolist())
        return torch.stack([torch.randn(self.image_shape, generator=generator) for generator in generators])
