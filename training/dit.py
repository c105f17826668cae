"""The `DiTTransformer2DModel` to train (Peebles & Xie 2023, arXiv 2212.09748), as the paper has it where diffusers'
class has not."""

import inspect
import itertools
from typing import Any

import torch
from diffusers import DiTTransformer2DModel
from torch import nn

SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}  # layers, width, heads
PATCH_SIZES = (2, 4, 8)
PRESETS = {
    f"DiT-{size}/{patch_size}": {
        "num_layers": layers,
        "num_attention_heads": heads,
        "attention_head_dim": width // heads,
        "patch_size": patch_size,
    }
    for (size, (layers, width, heads)), patch_size in itertools.product(SIZES.items(), PATCH_SIZES)
}
DEFAULT = "DiT-S/2"
NUM_LABELS = 1000  # `DiTPipeline` takes number 1000 for the null class, however many classes there are


def dit_config(
    settings: dict[str, Any],
    start: dict[str, Any],
    channels: int,
    resolution: int,
    num_classes: int | None = None,
) -> dict[str, Any]:
    """Keyword arguments of the `DiTTransformer2DModel` to train: those to start from, a preset's or saved ones, with
    `settings` over them.

    Raises:
        ValueError: more classes than it can have, a size that its patches do not divide, or settings that the data
            decide.
    """
    if num_classes is not None and num_classes > NUM_LABELS:
        raise ValueError(
            f"--class_conditional: {num_classes:,} classes, and a DiT has {NUM_LABELS:,} at most, since DiTPipeline's "
            f"null class is number {NUM_LABELS}"
        )
    by_data = {"sample_size": resolution, "in_channels": channels, "out_channels": channels}
    fixed = by_data | {"num_embeds_ada_norm": NUM_LABELS}
    for name in fixed.keys() & settings.keys():
        if settings[name] != fixed[name]:
            decides = "the images decide that, which have" if name in by_data else "DiTPipeline needs"
            raise ValueError(f"--dit {name} {settings[name]}: {decides} {fixed[name]}")
    known = inspect.signature(DiTTransformer2DModel.__init__).parameters  # of its former class, there are more
    config = {name: value for name, value in start.items() if name in known} | settings | fixed
    patch_size = config.get("patch_size")
    if type(patch_size) is int and patch_size > 0 and resolution % patch_size:
        raise ValueError(
            f"--dit patch_size {patch_size}: does not divide the side of what it is trained on, {resolution}"
        )
    return config


def make_dit(config: dict[str, Any]) -> DiTTransformer2DModel:
    """A transformer with the paper's initial weights, whose blocks share one embedding of timestep and label.

    In diffusers' class each block has its own, with its own label dropout of a tenth: 75 M parameters in XL that the
    paper has not, and a label is never withheld from all blocks at once. Here whoever calls it withholds labels.
    """
    dit = DiTTransformer2DModel(**config)
    initialize(dit)
    embedding = dit.transformer_blocks[0].norm1.emb
    embedding.class_embedder.dropout_prob = 0.0  # its table keeps the null class's row
    for block in dit.transformer_blocks:
        block.norm1.emb = embedding
    return dit


@torch.no_grad()
def initialize(dit: DiTTransformer2DModel) -> None:
    """The initial weights of the paper's code: adaLN-Zero, so that each block starts as the identity and the output is
    zero; Xavier elsewhere; embeddings N(0, 0.02²)."""
    for module in dit.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    patches = dit.pos_embed.proj  # a linear layer in the form of a convolution
    nn.init.xavier_uniform_(patches.weight.view(len(patches.weight), -1))
    nn.init.zeros_(patches.bias)
    for block in dit.transformer_blocks:
        for projection in (block.attn1.to_q, block.attn1.to_k, block.attn1.to_v):
            nn.init.xavier_uniform_(projection.weight, gain=0.5**0.5)  # the paper's are one layer of three outputs
        nn.init.normal_(block.norm1.emb.class_embedder.embedding_table.weight, std=0.02)
        nn.init.normal_(block.norm1.emb.timestep_embedder.linear_1.weight, std=0.02)
        nn.init.normal_(block.norm1.emb.timestep_embedder.linear_2.weight, std=0.02)
        nn.init.zeros_(block.norm1.linear.weight)
    for layer in (dit.proj_out_1, dit.proj_out_2):
        nn.init.zeros_(layer.weight)
