"""DiT (Peebles & Xie 2023, arXiv 2212.09748), as a diffusers `DiTTransformer2DModel`, initialised as in the paper.

What diffusers has otherwise than the paper's code, for training:
- Every block owns an embedding of timestep and label, 28 copies in XL (75 M parameters). Here all blocks share one, and
  `untied` makes copies of it for saving.
- Every copy drops labels at random by itself, so that a label is nearly never dropped as a whole. Here it drops none:
  the training loop puts the null class in.
- Nothing is initialised as in the paper.
"""

from typing import Any

import torch
from diffusers import DiTTransformer2DModel
from torch import nn

NULL_CLASS = 1000  # which diffusers' DiTPipeline takes for it, whatever the number of classes
SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}  # layers, width, heads
PRESETS = {
    f"DiT-{size}/{patch}": {
        "num_layers": layers,
        "num_attention_heads": heads,
        "attention_head_dim": width // heads,
        "patch_size": patch,
    }
    for size, (layers, width, heads) in SIZES.items()
    for patch in (2, 4, 8)
}


def build_dit(config: dict[str, Any]) -> DiTTransformer2DModel:
    """A `DiTTransformer2DModel` of these settings, to be trained: one shared embedding, initialised as in the paper."""
    dit = DiTTransformer2DModel(**config)
    share_embedding(dit)
    initialize(dit)
    return dit


def share_embedding(dit: DiTTransformer2DModel) -> None:
    """Let all blocks use the first one's embedding of timestep and label, without a dropout of its own."""
    embedding = dit.transformer_blocks[0].norm1.emb
    embedding.class_embedder.dropout_prob = 0.0
    for block in dit.transformer_blocks:
        block.norm1.emb = embedding


def untied(dit: DiTTransformer2DModel) -> DiTTransformer2DModel:
    """A stock model of the same function, each block with a copy of the embedding: what diffusers saves and loads."""
    with torch.random.fork_rng(devices=[]):  # initial weights, soon overwritten, must not move the run's dropout
        stock = DiTTransformer2DModel.from_config(dit.config)
    stock.load_state_dict(dit.state_dict())
    return stock


def initialize(dit: DiTTransformer2DModel) -> None:
    """Initialise in place as the paper's code does: adaLN-Zero, Xavier, embeddings of standard deviation 0.02."""
    for module in dit.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    patches = dit.pos_embed.proj  # a convolution, initialised as the linear layer that it is
    nn.init.xavier_uniform_(patches.weight.flatten(1))
    nn.init.zeros_(patches.bias)
    embedding = dit.transformer_blocks[0].norm1.emb
    nn.init.normal_(embedding.class_embedder.embedding_table.weight, std=0.02)
    nn.init.normal_(embedding.timestep_embedder.linear_1.weight, std=0.02)
    nn.init.normal_(embedding.timestep_embedder.linear_2.weight, std=0.02)
    for block in dit.transformer_blocks:
        for projection in (block.attn1.to_q, block.attn1.to_k, block.attn1.to_v):  # one layer of 3 x width in the paper
            nn.init.xavier_uniform_(projection.weight, gain=0.5**0.5)
        zero(block.norm1.linear)
    zero(dit.proj_out_1)
    zero(dit.proj_out_2)


def zero(layer: nn.Linear) -> None:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
