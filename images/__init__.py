"""Any image source -> uint8 tensors [C, H, W], for training and for evaluation.

    dataset = open_images("uoft-cs/cifar10")                            # or a folder, an .npz, or "digits"
    print(dataset.describe())                                           # how many images, and what was left out
    for images in training_batches(dataset, batch_size=128, seed=0):    # endless uint8 [128, 3, 32, 32]
        loss = model(normalize(images)) ...
    every_image = dataset.decode_all()                                  # uint8 [50000, 3, 32, 32]

Images stay uint8 until the training step (`normalize`): a quarter of the memory and of the copying.
"""

from .batches import ImageBatches, image_order, training_batches
from .dataset import ImageDataset, counted, normalize
from .decoding import BadImage, ImageError, decode_image
from .folders import check_output_outside_data
from .latents import LatentDataset, latent_shape, open_latents, sample_posterior
from .opening import open_images

__all__ = [
    "BadImage",
    "ImageBatches",
    "ImageDataset",
    "ImageError",
    "LatentDataset",
    "check_output_outside_data",
    "counted",
    "decode_image",
    "image_order",
    "latent_shape",
    "normalize",
    "open_images",
    "open_latents",
    "sample_posterior",
    "training_batches",
]
