"""Networks and pipelines so small that a test can sample from them."""

import torch
from diffusers import AutoencoderKL, DDPMPipeline, DDPMScheduler, UNet2DModel

from pipelines import ClassConditionalPipeline
from training.dit import dit_config, make_dit

CLASSES = {0: "cat", 1: "dog, hound", 2: "frog"}


def tiny_unet(channels=1, seed=0, **settings):
    """A `UNet2DModel` of 8x8 images, in evaluation mode; `settings` are its own, over the defaults here."""
    torch.manual_seed(seed)
    shape = {"sample_size": 8, "in_channels": channels, "out_channels": channels}
    levels = {
        "layers_per_block": 1,
        "block_out_channels": (8, 8),
        "down_block_types": ("DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D"),
        "norm_num_groups": 4,
    }
    return UNet2DModel(**shape, **levels, **settings).eval()


def tiny_pipeline(scheduler=None, **unet_settings):
    """A pipeline as training saves it, with 20 trained steps unless `scheduler` says otherwise."""
    scheduler = scheduler or DDPMScheduler(num_train_timesteps=20)
    return DDPMPipeline(unet=tiny_unet(**unet_settings), scheduler=scheduler)


def tiny_conditional_pipeline(scheduler=None, id2label=CLASSES, **unet_settings):
    """A pipeline of three classes, whose embeddings differ more than those of a new network."""
    unet, scheduler = tiny_unet(num_class_embeds=4, **unet_settings), scheduler or DDPMScheduler(num_train_timesteps=20)
    pipeline = ClassConditionalPipeline(scheduler, unet=unet, id2label=id2label)
    pipeline.unet.class_embedding.weight.data *= 5
    return pipeline


def tiny_dit(channels=1, seed=0, is_shared=False, **settings):
    """A `DiTTransformer2DModel` of 8x8 images, in evaluation mode, as training saves it: each block has a copy of the
    embedding; or shares one, as in training. Its weights all tell: at the paper's initial ones the output is zero."""
    torch.manual_seed(seed)
    sizes = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8, "patch_size": 2, **settings}
    dit = make_dit(dit_config({}, sizes, channels, resolution=8))
    for parameter in dit.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    if is_shared:
        return dit.eval()
    saved = type(dit).from_config(dit.config)
    saved.load_state_dict(dit.state_dict())
    return saved.eval()


def tiny_vae(channels=1, latent_channels=1, seed=0):
    """An `AutoencoderKL` that halves the sides of images."""
    torch.manual_seed(seed)
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    sizes = {"block_out_channels": (8, 8), "norm_num_groups": 4, "latent_channels": latent_channels}
    return AutoencoderKL(channels, channels, **blocks, **sizes, scaling_factor=0.5).eval()
