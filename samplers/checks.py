"""What a sampler is given: its options, and a training loop's tensors, by what is known of these without waiting for
the device."""

import math
from numbers import Integral

import torch

from .schedule import NoiseSchedule

INDEX_TYPES = (torch.int32, torch.int64)


def allowed_indices(schedule: NoiseSchedule) -> str:
    """In words: which timesteps `sample` draws."""
    ends = torch.tensor([0, schedule.num_train_timesteps - 1])
    first, last = schedule.to_scheduler(ends).sort().values.tolist()
    return f"integers in [{first}, {last + 1}) as `sample` draws them, indices into the noise scheduler's tables"


def check_per_example(timesteps: torch.Tensor, schedule: NoiseSchedule, **per_example: torch.Tensor) -> None:
    """Refuse timesteps that are no indices, and errors or losses of another batch.

    The values are not looked at, since they may be on a GPU.

    Args:
        timesteps: [B] integers.
        schedule: of which they are.
        per_example: by its name, `errors` [B, ...], or losses [B].

    Raises:
        ValueError: they are something else.
    """
    if timesteps.dtype not in INDEX_TYPES:
        raise ValueError(
            f"timesteps must be {allowed_indices(schedule)}, not {timesteps.dtype}: what these hold, as a flow's "
            "timesteps and sigmas, is for the network"
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


def check_counts(least: int = 1, **counts: int) -> None:
    """Refuse options that are no integers, or below `least`. Raises ValueError, naming the option."""
    for name, value in counts.items():
        if not isinstance(value, Integral) or value < least:
            raise ValueError(f"{name} must be an integer of at least {least}, not {value}")


def check_positive(**numbers: float) -> None:
    """Refuse options that are not positive and finite. Raises ValueError, naming the option."""
    for name, value in numbers.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be positive and finite, not {value}")


def check_finite(**numbers: float) -> None:
    """Refuse options that are not finite. Raises ValueError, naming the option."""
    for name, value in numbers.items():
        if not math.isfinite(value):
            raise ValueError(f"{name} must be finite, not {value}")


def check_fractions(**fractions: float) -> None:
    """Refuse options outside [0, 1]. Raises ValueError, naming the option."""
    for name, value in fractions.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must be in [0, 1], not {value}")


def check_shares(**shares: float) -> None:
    """Refuse options outside (0, 1]. Raises ValueError, naming the option."""
    for name, value in shares.items():
        if not 0 < value <= 1:
            raise ValueError(f"{name} must be in (0, 1], not {value}")
