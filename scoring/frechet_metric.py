"""The Fréchet distance in a training loop, on all processes alike; the real images are seen only once.

metric = make_frechet_metric("facebook/dinov2-large", device="cuda")
for images in real:                                      # uint8 [N, 1 or 3, H, W]
    metric.update(images, real=True)
...
metric.update(generated, real=False)
distance = metric.compute()
metric.reset()                                           # forgets the generated images only
"""

import torch
from torch_fidelity.utils import create_feature_extractor
from torchmetrics.image.fid import FrechetInceptionDistance

from scoring.feature_extractors import Extractor, load_extractor


class FeatureVectors(torch.nn.Module):
    """uint8 [N, 1 or 3, H, W] -> [N, d]: an extractor as torchmetrics calls it. Grey images are made RGB.

    It stays in evaluation mode and in full precision, whatever the loop around it does."""

    def __init__(self, extractor: Extractor):
        super().__init__()
        self.num_features = extractor.num_features
        self.description = extractor.description
        self.score_name = "fid" if extractor.is_standard_inception else "fd"  # of a Fréchet distance with them
        self.extractor = create_feature_extractor(
            extractor.name,
            [extractor.layer],
            cuda=False,
            verbose=False,
            feature_extractor_weights_path=extractor.weights_path,
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        with torch.autocast(images.device.type, enabled=False):
            return self.extractor(images.expand(-1, 3, -1, -1))[0]

    def train(self, mode: bool = True) -> "FeatureVectors":
        return super().train(False)


def make_frechet_metric(
    name_or_path: str | None = None, weights: str | None = None, device: str | torch.device = "cpu"
) -> FrechetInceptionDistance:
    """Make torchmetrics' Fréchet distance with one of our extractors, for use while training.

    `update` takes uint8 [N, 1 or 3, H, W] on `device`; `compute` gathers the sums of all processes; `reset` keeps
    the real images' statistics, so they need to be computed only once. It gives what evaluate.py gives.

    Args:
        name_or_path, weights: see `load_extractor`; None for Inception.
        device: where the images will be.

    Raises:
        ValueError: see `load_extractor`.
    """
    features = FeatureVectors(load_extractor(name_or_path, weights))
    return FrechetInceptionDistance(feature=features, reset_real_features=False).to(device)
