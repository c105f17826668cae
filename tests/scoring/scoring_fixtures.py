"""What the tests of evaluate.py start from, for `pytest_plugins`."""

import itertools
import json
from unittest import mock

import pytest
import torch
from scoring_helpers import save_pngs
from torch_fidelity import FeatureExtractorInceptionV3

import evaluate
from images import open_images


@pytest.fixture(scope="session")
def random_inception(tmp_path_factory):
    """A file like torch-fidelity's weights of Inception, but with RANDOM numbers in it."""
    module = "torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url"
    torch.manual_seed(0)
    with mock.patch(module), mock.patch.object(FeatureExtractorInceptionV3, "load_state_dict"):
        model = FeatureExtractorInceptionV3("random", ["2048"])
    for layer in model.modules():
        if isinstance(layer, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    path = tmp_path_factory.mktemp("weights") / "RANDOM-inception.pth"
    torch.save(model.state_dict(), path)
    return str(path)


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory):
    return str(tmp_path_factory.mktemp("features"))


@pytest.fixture(scope="session")
def photos(cifar10, tmp_path_factory):
    """Two disjoint folders of 340 PNGs of CIFAR-10."""
    folder = tmp_path_factory.mktemp("photos")
    for name, split in (("a", "train[:340]"), ("b", "test[:340]")):
        save_pngs(open_images(str(cifar10), split=split).decode_all(show_progress=False), folder / name)
    return folder


@pytest.fixture
def score(tmp_path, cache_dir):
    """score("--flag", value, ...) runs the script and returns what is in its metrics.json."""
    numbers = itertools.count()

    def run(*flags):
        folder = tmp_path / f"scores-{next(numbers)}"
        evaluate.main(
            ["--output_dir", str(folder), "--features_cache_dir", cache_dir, "--device", "cpu", *map(str, flags)]
        )
        return json.loads((folder / "metrics.json").read_text())

    return run
