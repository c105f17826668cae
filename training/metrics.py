"""What a run measures of itself on its way, on the device until somebody asks."""

from typing import NamedTuple

import torch
from accelerate import Accelerator

NUM_BINS = 20  # of timesteps, in the log


class Means(NamedTuple):
    """What was measured since the last time, over all processes; None where nothing was added."""

    loss: float | None  # weighted
    grad_norm: float | None
    grad_norm_clipped: float | None  # share of the updates
    loss_by_timestep: list[float | None]  # [bins] of epsilon-losses


class LossMeter:
    """Running sums of the loss, its gradient's norm and how often that is clipped, and the loss by timestep bin; on the
    device until read.

    Args:
        num_train_timesteps: T.
        device: of the losses.
    """

    def __init__(self, num_train_timesteps: int, device: torch.device | str):
        self.num_bins = min(NUM_BINS, num_train_timesteps)
        self.bin_of_timestep = bin_of_timestep(num_train_timesteps, self.num_bins).to(device)
        self.loss = torch.zeros(2, device=device)  # sum of weighted losses, number of examples
        self.norm = torch.zeros(2, device=device)  # sum of gradient norms, number of updates
        self.clipped = torch.zeros(2, device=device)  # number of updates clipped, number of updates
        self.bins = torch.zeros(2, self.num_bins, device=device)  # sum of epsilon-losses, number of examples

    def add_losses(self, timesteps: torch.Tensor, losses: torch.Tensor, epsilon_losses: torch.Tensor) -> None:
        """timesteps, losses as trained on (weighted and filtered) and epsilon_losses (the plain mean squares, which can
        be compared from one method to another): [B], detached. Examples whose losses are not finite are left out."""
        finite = losses.isfinite() & epsilon_losses.isfinite()
        self.loss += torch.stack([torch.where(finite, losses, 0.0).sum(), finite.sum()])
        bins = self.bin_of_timestep[timesteps]
        self.bins[0].index_add_(0, bins, torch.where(finite, epsilon_losses, 0.0))
        self.bins[1].index_add_(0, bins, finite.float())

    def add_gradient_norm(self, norm: torch.Tensor, max_norm: float) -> None:
        """norm: 0-d tensor, before it is clipped to max_norm. One that is not finite is left out."""
        finite = norm.isfinite()
        self.norm += torch.stack([torch.where(finite, norm, 0.0), finite.float()])
        self.clipped += torch.stack([finite & (norm > max_norm), finite])

    def read(self, accelerator: Accelerator) -> Means:
        """The means since the last call. Waits for the device."""
        sums = torch.cat([torch.stack([self.loss, self.norm, self.clipped], dim=1), self.bins], dim=1)
        totals, counts = accelerator.reduce(sums, "sum").tolist()
        means = [total / count if count else None for total, count in zip(totals, counts, strict=True)]
        loss, norm, clipped, *bins = means
        for sums in (self.loss, self.norm, self.clipped, self.bins):
            sums.zero_()
        return Means(loss, norm, clipped, [None if value is None else round(value, 6) for value in bins])

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The sums, on the CPU."""
        return {name: getattr(self, name).cpu().clone() for name in ("loss", "norm", "clipped", "bins")}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Restore the sums."""
        for name, value in state.items():
            getattr(self, name).copy_(value)


def bin_of_timestep(num_train_timesteps: int, num_bins: int) -> torch.Tensor:
    """[T] the bin of each timestep, of equal widths."""
    return torch.arange(num_train_timesteps) * num_bins // num_train_timesteps


def by_bin(table: torch.Tensor, num_bins: int = NUM_BINS) -> list[float]:
    """A table over timesteps [T], averaged in bins: a list of floats."""
    table = table.detach().float().cpu()
    num_bins = min(num_bins, len(table))
    bins = bin_of_timestep(len(table), num_bins)
    sums = torch.zeros(num_bins).index_add_(0, bins, table)
    return [float(f"{value:.6g}") for value in (sums / torch.bincount(bins)).tolist()]
