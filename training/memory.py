"""How much memory a training step takes, from shapes alone."""

import logging

import torch

from pipelines import Network, null_label

COPIES = 5  # float32 tensors of the size of the weights: these, their gradients, their average, Adam's two moments

logger = logging.getLogger(__name__)


def warn_of_memory(
    network: Network,
    image_shape: tuple[int, int, int],
    batch_size: int,
    is_half: bool,
    available: int,
    num_shards: int = 1,
) -> None:
    """Say so if training will probably not fit into `available` bytes. Arguments are those of `training_memory`."""
    needed = training_memory(network, image_shape, batch_size, is_half, num_shards)
    if needed > available:
        logger.warning(
            f"--train_batch_size {batch_size}: training takes about {needed / 1e9:,.1f} GB, and the device has "
            f"{available / 1e9:,.1f} GB; smaller batches with --gradient_accumulation_steps take less, and so does "
            "--gradient_checkpointing"
        )


def training_memory(
    network: Network, image_shape: tuple[int, int, int], batch_size: int, is_half: bool, num_shards: int = 1
) -> int:
    """About how many bytes training takes on a device: the weights and all that is kept of them, and what the forward
    pass of a batch keeps for the backward pass. Kernels' own buffers, the images and a VAE come on top.

    Args:
        network: on the meta device, which computes nothing; its gradient checkpointing counts.
        image_shape: (C, H, W) of images or latents.
        batch_size: of a process and accumulation step.
        is_half: whether activations are of 16 bits, but for a few.
        num_shards: devices that share out the weights (FSDP).
    """
    weights = sum(parameter.numel() for parameter in network.parameters())
    return COPIES * 4 * weights // num_shards + activation_memory(network, image_shape, batch_size) // (
        2 if is_half else 1
    )


def activation_memory(network: Network, image_shape: tuple[int, int, int], batch_size: int) -> int:
    """Bytes of the float32 tensors that the forward pass of a batch keeps, each storage once, without the weights."""
    weights = {parameter.untyped_storage()._cdata for parameter in network.parameters()}
    kept = {}  # {address: storage}, which holds it: else another one could get its address

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage
        return tensor

    device = next(network.parameters()).device
    images, zeros = torch.zeros(batch_size, *image_shape, device=device), torch.zeros(batch_size, device=device).long()
    class_labels = None if null_label(network.config) is None else zeros
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        network(images, zeros, class_labels=class_labels, return_dict=False)
    return sum(storage.nbytes() for storage in kept.values())
