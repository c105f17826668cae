"""Images, files of them, and small feature extractors."""

import numpy as np
import torch
import transformers
from PIL import Image

torch.set_num_threads(1)


def noise(num_images, size=8, channels=3, seed=0):
    return torch.randint(256, (num_images, channels, size, size), generator=torch.Generator().manual_seed(seed)).byte()


def save_pngs(images, folder):
    """uint8 [N, C, H, W] -> 000000.png, ..."""
    folder.mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy().squeeze()).save(folder / f"{i:06d}.png")


def save_npz(images, path):
    np.savez(path, images.permute(0, 2, 3, 1).numpy())
    return str(path)


TINY_VIT = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}


def tiny_vit(**more):
    return transformers.ViTConfig(**TINY_VIT, image_size=64, patch_size=32, **more)


def save_model(model, folder, size=64):
    model.save_pretrained(folder)
    transformers.ViTImageProcessor(size={"height": size, "width": size}).save_pretrained(folder)
    return str(folder)
