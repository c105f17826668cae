"""Weights and gradients that are not finite: never saved, and skipped."""

from collections.abc import Iterable

import torch

from pipelines.weights import are_finite

from .sharding import full_tensor


def check_finite(tensors: Iterable[torch.Tensor], what: str) -> None:
    """Refuse weights that are not finite: nothing good can be saved of them, or sampled with them.

    Raises:
        FloatingPointError: on all processes alike.
    """
    is_finite = are_finite(full_tensor(tensor.detach()) for tensor in tensors).all().float()
    if torch.distributed.is_initialized():  # shards may differ
        torch.distributed.all_reduce(is_finite, torch.distributed.ReduceOp.MIN)
    if not is_finite:
        raise FloatingPointError(f"the {what} are not finite, and are not saved")


class NonFiniteGuard:
    """Skips updates whose gradient is not finite, without asking the device on each step.

    Fused optimisers leave parameters and state alone where `found_inf` is 1. Under fp16 the gradient scaler does the
    skipping, and this only counts.

    Args:
        optimizer: the fused torch optimiser inside accelerate's.
        scaled: a gradient scaler is in use.
        max_in_row: updates skipped in a row at which `check` gives up.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, device: torch.device | str, scaled: bool, max_in_row: int):
        self.optimizer, self.scaled, self.max_in_row = optimizer, scaled, max_in_row
        self.counts = torch.zeros(3, device=device)  # skipped in all; in a row now; most in a row since the last check

    def observe(self, gradient_norm: torch.Tensor) -> None:
        """Call between clipping and the optimiser's step. gradient_norm: 0-d tensor on the device."""
        skipped = (~gradient_norm.isfinite()).float()
        total, in_row, worst = self.counts
        in_row = (in_row + 1) * skipped
        self.counts = torch.stack([total + skipped, in_row, torch.maximum(worst, in_row)])
        if not self.scaled:
            self.optimizer.found_inf = skipped

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The counts, on the CPU."""
        return {"counts": self.counts.cpu().clone()}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Restore the counts."""
        self.counts.copy_(state["counts"])

    def check(self) -> int:
        """Updates skipped so far. Waits for the device.

        Raises:
            FloatingPointError: `max_in_row` updates in a row were skipped.
        """
        total, _, worst = self.counts.tolist()
        if worst >= self.max_in_row:
            raise FloatingPointError(
                f"the loss or its gradient was not finite in {int(worst)} steps in a row "
                f"(--max_nonfinite_steps {self.max_in_row}): lower --learning_rate, or use bf16 in place of fp16"
            )
        self.counts[2] = 0
        return int(total)
