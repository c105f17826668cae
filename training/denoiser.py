"""What is trained: a network under a noise schedule, and its errors."""

import torch

from samplers import NoiseSchedule, epsilon_loss_scale, mean_squares


class Denoiser:
    """The errors in eps of a network at any timestep, whatever it predicts.

    An error of the network in v or x_0 is one in eps times a factor of t alone, the square root of
    `epsilon_loss_scale`; so losses of all prediction types are the same, and can be compared.

    Args:
        network: called as (noisy images [B, C, H, W], timesteps [B], return_dict=False), as a `UNet2DModel` or a
            `DiTTransformer2DModel`; and with class_labels=[B], if it has a null class. Latents are images too here.
        noise_scheduler: a `DDPMScheduler`.
        device: of the network.
        null_label: the number of the network's null class, by which a sampler measures it (`epsilon_losses` without
            labels); None of a network that knows no classes.
    """

    def __init__(
        self,
        network: torch.nn.Module,
        noise_scheduler,
        device: torch.device | str = "cpu",
        null_label: int | None = None,
    ):
        self.network, self.noise_scheduler, self.null_label = network, noise_scheduler, null_label
        loss_scale = epsilon_loss_scale(NoiseSchedule.from_scheduler(noise_scheduler), self.prediction_type)
        self.error_scale = loss_scale.sqrt().to(device, torch.float32)  # [T]

    @property
    def prediction_type(self) -> str:
        return self.noise_scheduler.config.prediction_type

    def epsilon_errors(
        self,
        images: torch.Tensor,
        noise: torch.Tensor,
        timesteps: torch.Tensor,
        class_labels: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[B, C, H, W] float32: the errors in eps at x_t, up to the sign.

        Args:
            images, noise: [B, C, H, W]; images in [-1, 1].
            timesteps: [B] int64.
            class_labels: [B] int64, ignored by a network that knows no classes; None is the null class.
        """
        noisy_images = self.noise_scheduler.add_noise(images, noise, timesteps)
        conditions = self._conditions(class_labels, timesteps)
        prediction = self.network(noisy_images, timesteps, return_dict=False, **conditions)[0]
        if self.prediction_type == "epsilon":
            target = noise
        elif self.prediction_type == "v_prediction":
            target = self.noise_scheduler.get_velocity(images, noise, timesteps)
        else:
            target = images
        return (prediction.float() - target.float()) * self.error_scale[timesteps].view(-1, 1, 1, 1)

    def _conditions(self, class_labels: torch.Tensor | None, timesteps: torch.Tensor) -> dict[str, torch.Tensor]:
        if self.null_label is None:
            return {}
        null_labels = torch.full_like(timesteps, self.null_label)
        return {"class_labels": null_labels if class_labels is None else class_labels}

    @torch.no_grad()
    def epsilon_losses(
        self,
        images: torch.Tensor,
        noise: torch.Tensor,
        timesteps: torch.Tensor,
        class_labels: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[B] the mean squares of these errors, of the network as it is now: without gradients and dropout."""
        was_training = self.network.training
        self.network.eval()
        losses = mean_squares(self.epsilon_errors(images, noise, timesteps, class_labels))
        self.network.train(was_training)
        return losses
