"""Adam (arXiv 1412.6980, algorithm 1) on a flat vector, for samplers that own parameters: all its state is tensors."""

import torch


def adam_step(
    parameters: torch.Tensor,
    gradient: torch.Tensor,
    moments: torch.Tensor,
    step: int,
    learning_rate: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> None:
    """Update `parameters` [P] and `moments` [2, P] in place; `step` counts from 1."""
    first, second = moments
    first.lerp_(gradient, 1 - betas[0])
    second.lerp_(gradient.square(), 1 - betas[1])
    unbiased_second = second / (1 - betas[1] ** step)
    parameters.sub_(learning_rate / (1 - betas[0] ** step) * first / (unbiased_second.sqrt() + eps))
