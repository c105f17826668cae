"""Networks and pipelines so small that a test can sample from them."""

import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

from pipelines import ClassConditionalPipeline

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
    pipeline = ClassConditionalPipeline(scheduler, unet, id2label=id2label)
    pipeline.unet.class_embedding.weight.data *= 5
    return pipeline
