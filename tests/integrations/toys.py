"""The networks of trainers in use, diffusers' own classes, so small that a test can train them."""

import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel, WanTransformer3DModel

WIDTH = 8  # of text embeddings, and of everything that has no size of its own here


def text(batch_size, tokens=3):
    """[B, tokens, WIDTH] what a text encoder would say."""
    return torch.randn(batch_size, tokens, WIDTH, generator=torch.Generator().manual_seed(0))


def latents(batch_size, channels=4, *size, seed=0):
    """[B, C, ...] smooth, of a variance near 1, as latents are."""
    x = torch.randn(batch_size, channels, *(size or (8, 8)), generator=torch.Generator().manual_seed(seed))
    return (x + x.roll(1, -1) + x.roll(1, -2)) / 3**0.5


def unet_with_text():
    """Stable Diffusion's."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(WIDTH, WIDTH),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=4,
        cross_attention_dim=WIDTH,
    )


def sd3():
    torch.manual_seed(0)
    return SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=4,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        pos_embed_max_size=8,
    )


def flux():
    torch.manual_seed(0)
    return FluxTransformer2DModel(
        in_channels=16,  # four latent pixels of four channels are a token
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=1,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        axes_dims_rope=(2, 2, 4),
    )


def wan():
    torch.manual_seed(0)
    return WanTransformer3DModel(
        num_attention_heads=1,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=WIDTH,
        freq_dim=WIDTH,
        ffn_dim=16,
        num_layers=1,
        rope_max_seq_len=32,
    )
