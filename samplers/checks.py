"""What a training loop gives to a sampler, checked by what is known of it without waiting for the device."""

import torch

INDEX_TYPES = (torch.int32, torch.int64)


def check_per_example(timesteps: torch.Tensor, num_train_timesteps: int, **per_example: torch.Tensor) -> None:
    """Refuse timesteps that are no indices, and errors or losses of another batch.

    The values are not looked at, since they are on the device: one out of range fails there, or stands for another.

    Args:
        timesteps: [B] integers in [0, T).
        num_train_timesteps: T.
        per_example: by its name, `errors` [B, ...], or losses [B].

    Raises:
        ValueError: they are something else.
    """
    if timesteps.dtype not in INDEX_TYPES:
        raise ValueError(
            f"timesteps must be integers in [0, {num_train_timesteps}) as `sample` draws them, indices into the noise "
            f"scheduler's tables, not {timesteps.dtype}: what these hold, as a flow's timesteps and sigmas, is for the "
            "network"
        )
    if timesteps.ndim != 1:
        raise ValueError(f"timesteps must be [B], one for each example, not {list(timesteps.shape)}")
    for name, values in per_example.items():
        if values.shape[:1] != timesteps.shape or (values.ndim > 1) != (name == "errors"):
            expected = f"[{len(timesteps)}, ...]" if name == "errors" else f"[{len(timesteps)}]"
            raise ValueError(f"{name} must be {expected}, of the examples of the timesteps, not {list(values.shape)}")


def check_drawn(drawn: object, asked: str) -> None:
    """Refuse what can only follow a draw.

    Raises:
        ValueError: `drawn` is None.
    """
    if drawn is None:
        raise ValueError(
            f"`{asked}` before any `sample`: timesteps must be those that this sampler has drawn, by `sample` or "
            "`compute_density_for_timestep_sampling`, once for each batch, and not of torch.randint or another density"
        )
