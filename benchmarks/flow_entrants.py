"""Who takes part in the race of flow_matching.py: ways to draw the timesteps of a flow, and an update by each."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3

from pipelines import Network
from samplers import TimestepSampler

# Of Curriculum's updates: its best FID is reported after 100,000 updates, of which 60,000 are the first phase. 40 % of
# 150,000, as the phase is announced, would put the end of a run beyond that point
SHARE_OF_FIRST_PHASE = 0.6


class Entrant(NamedTuple):
    """How a run draws timesteps and noise, and weighs its losses.

    Attributes:
        sampler: arguments of `make_timestep_sampler`; none for the functions of diffusers' scripts for SD3.
        weighting_scheme: of these.
        shift: of the noise schedule, in training and in sampling: timesteps are drawn uniformly from it.
        contrast: lambda of Contrastive Flow Matching.
    """

    sampler: dict[str, Any] | None = None
    weighting_scheme: str = "none"
    shift: float = 1.0
    contrast: float = 0.0


def all_entrants(num_updates: int, class_conditional: bool) -> dict[str, Entrant]:
    """{name: entrant}; what needs classes is there for networks that know them.

    Args:
        num_updates: of a run, to which Curriculum's schedule is fitted.
    """
    first_phase, as_published = round(SHARE_OF_FIRST_PHASE * num_updates), {"low_discrepancy": False}
    entrants = {
        "uniform": Entrant(),
        "logit_normal": Entrant(weighting_scheme="logit_normal"),
        "mode": Entrant(weighting_scheme="mode"),
        "cosmap": Entrant(weighting_scheme="cosmap"),
        "shift_3": Entrant(shift=3.0),
        "curriculum": Entrant({"method": "curriculum", "num_updates": first_phase, **as_published}),
        "immiscible": Entrant({"method": "immiscible", "loss_weighting": "flow", **as_published}),
        "adaptive": Entrant({"method": "adaptive"}),
    }
    return entrants | ({"contrastive": Entrant(contrast=0.05)} if class_conditional else {})


def loss_of(
    network: Network,
    scheduler: FlowMatchEulerDiscreteScheduler,
    entrant: Entrant,
    sampler: TimestepSampler | None,
    images: torch.Tensor,
    labels: torch.Tensor | None,
) -> torch.Tensor:
    """The loss of a batch, images [B, C, H, W] in [-1, 1] and labels [B], or None of a network that knows none.

    Where there is a sampler, the lines are those that a user of this package writes; else they are those of diffusers'
    examples/dreambooth/train_dreambooth_sd3.py with --precondition_outputs 0, as SD3's paper has the loss. Contrastive
    Flow Matching (arXiv 2506.05350) takes away lambda times the error to the velocity of another example; as in its
    authors' code, any other of the batch.
    """
    if sampler is not None:
        noise = sampler.noise(images)
        indices, weights = sampler.sample(len(images))
    else:
        noise = torch.randn_like(images)
        u = compute_density_for_timestep_sampling(entrant.weighting_scheme, len(images), 0.0, 1.0, mode_scale=1.29)
        T = scheduler.config.num_train_timesteps
        indices = (u * T).long().clamp(max=T - 1)  # u may round to 1
    sigmas = scheduler.sigmas.to(images.device)[indices].view(-1, 1, 1, 1)
    timesteps = scheduler.timesteps.to(images.device)[indices]
    prediction = network((1 - sigmas) * images + sigmas * noise, timesteps, class_labels=labels).sample
    target = noise - images
    if sampler is not None:
        losses = sampler.losses(prediction - target, indices)
        sampler.update(indices, losses.detach())
        return (weights * losses).mean()
    weighting = compute_loss_weighting_for_sd3(entrant.weighting_scheme, sigmas)
    loss = (weighting * (prediction - target) ** 2).mean()
    if entrant.contrast:
        loss = loss - entrant.contrast * F.mse_loss(prediction, target[others(len(target))])
    return loss


def others(batch_size: int) -> torch.Tensor:
    """[B] for each example of a batch another one, at random."""
    return (torch.arange(batch_size) + torch.randint(1, batch_size, (batch_size,))) % batch_size


@torch.inference_mode()
def sample_by_euler(
    network: Network, shift: float, num_steps: int, noise: torch.Tensor, labels: torch.Tensor | None
) -> torch.Tensor:
    """uint8 [B, C, H, W] where the flow leads from noise [B, C, H, W], as diffusers' pipelines for SD3 go.

    Raises:
        FloatingPointError: values that are not finite.
    """
    scheduler, x = FlowMatchEulerDiscreteScheduler(shift=shift), noise
    scheduler.set_timesteps(num_steps, device=noise.device)
    for t in scheduler.timesteps:
        velocity = network(x, t.expand(len(x)), class_labels=labels).sample
        x = scheduler.step(velocity, t, x, return_dict=False)[0]
    if not x.isfinite().all():
        raise FloatingPointError("samples are not finite")
    return ((x / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
