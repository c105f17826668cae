"""Scores against torch-fidelity's own command line, closed forms and sets made to have known answers."""

import itertools
import json
import sys

import numpy as np
import pytest
import torch
import torch_fidelity
import torch_fidelity.fidelity
import transformers
from PIL import Image, ImageFilter
from scoring_helpers import noise, save_npz, save_pngs
from torch_fidelity import FeatureExtractorBase

import evaluate
from images import open_images
from scoring import feature_extractors, report
from scoring.feature_extractors import Extractor
from scoring.fidelity import calculate
from scoring.options import EvaluationOptions

pytest_plugins = ["scoring_fixtures"]


class OneLayer(FeatureExtractorBase):
    """What torch-fidelity asks of an extractor that has one layer of features."""

    @staticmethod
    def get_provided_features_list():
        return ("features",)

    @staticmethod
    def get_default_feature_layer_for_metric(metric):
        return "features"

    @staticmethod
    def can_be_compiled():
        return False


class RegNetByHand(OneLayer):
    """The shared RegNet, without any code of ours."""

    def __init__(self, name, features_list, feature_extractor_weights_path=None, **_):
        super().__init__(name, features_list)
        self.model = transformers.AutoModel.from_pretrained(feature_extractor_weights_path)

    def forward(self, images):
        return (self.model((images / 255 - 0.5) / 0.5).pooler_output.flatten(1).double(),)


torch_fidelity.register_feature_extractor("regnet-by-hand", RegNetByHand)


def run_fidelity(monkeypatch, capsys, *flags):
    """torch-fidelity's own command line, in this process, where extractors can be registered."""
    capsys.readouterr()
    settings = ["--cpu", "--silent", "--json", "--no-cache", "--save-cpu-ram"]
    monkeypatch.setattr(sys, "argv", ["fidelity", *settings, *flags])
    torch_fidelity.fidelity.main()
    return json.loads(capsys.readouterr().out)


def assert_same_values(values, expected):
    expected = {
        name.replace("frechet_inception_distance", "fd")
        .replace("kernel_inception_distance_mean", "kd")
        .replace("kernel_inception_distance_std", "kd_std")
        .replace("inception_score_mean", "inception_score"): value
        for name, value in expected.items()
    }
    assert values == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_a_transformers_model_gives_the_numbers_of_torch_fidelitys_command_line(
    regnet, photos, score, monkeypatch, capsys
):
    inputs = ["--input1", str(photos / "a"), "--input2", str(photos / "b")]
    record = score(*inputs, "--feature_extractor", regnet, "--kid_subset_size", 200)
    flags = ["--feature-extractor", "regnet-by-hand", "--feature-extractor-weights-path", regnet]
    flags += ["--fid", "--kid", "--prc", "--kid-subset-size", "200"]
    expected = run_fidelity(monkeypatch, capsys, *inputs, *flags)
    assert record["values"].keys() == {"fd", "kd", "kd_std", "precision", "recall", "f_score"}
    assert_same_values(record["values"], expected)


def test_inception_gives_the_numbers_of_torch_fidelitys_command_line(
    random_inception, score, tmp_path, monkeypatch, capsys
):
    save_pngs(noise(10), tmp_path / "a")
    save_pngs(noise(10, seed=1) // 2, tmp_path / "b")
    inputs = ["--input1", str(tmp_path / "a"), "--input2", str(tmp_path / "b")]
    settings = ["--kid_subset_size", "6", "--kid_subsets", "5", "--isc_splits", "2"]
    record = score(
        *inputs, *settings, "--metrics", "isc", "kid", "prc", "--feature_extractor_weights", random_inception
    )
    flags = ["--feature-extractor", "inception-v3-compat", "--feature-extractor-weights-path", random_inception]
    flags += ["--isc", "--kid", "--prc", *(flag.replace("_", "-") for flag in settings)]
    expected = run_fidelity(monkeypatch, capsys, *inputs, *flags)
    assert_same_values(record["values"], expected)
    assert record["values"]["inception_score"] > 1.00005  # of a random network: hardly any class stands out


def test_a_distance_is_called_fid_with_torch_fidelitys_own_weights_only(random_inception, score, monkeypatch, capsys):
    flags = ["--input1", "digits", "--input2", "digits", "--num_images1", 3, "--num_images2", 3, "--metrics", "kid"]
    flags += ["--kid_subset_size", 2, "--kid_subsets", 2, "--feature_extractor_weights", random_inception]
    record = score(*flags)
    assert record["values"].keys() == {"kd", "kd_std"}
    assert "not torch-fidelity's weights" in capsys.readouterr().out
    for module in (feature_extractors, report):
        monkeypatch.setattr(module, "INCEPTION_SHA256", record["feature_extractor"]["weights_sha256"])
    assert score(*flags)["values"].keys() == {"kid", "kid_std"}
    assert "not torch-fidelity's weights" not in capsys.readouterr().out


class Colours(OneLayer):
    """The features of an image are the three values of its first pixel, in grey levels."""

    def __init__(self, name, features_list, **_):
        super().__init__(name, features_list)

    def forward(self, images):
        return (images[:, :, 0, 0].double(),)


torch_fidelity.register_feature_extractor("colours", Colours)
COLOURS = Extractor("colours", "features", 3, weights_path=None, description={"weights_sha256": "none"})


def score_points(points1, points2, cache_dir, *metrics):
    """Scores of two sets of points, lists of (r, g, b)."""
    images = [torch.tensor(points, dtype=torch.uint8)[:, :, None, None] for points in (points1, points2)]
    options = EvaluationOptions(
        input1="a", input2="b", output_dir="c", metrics=list(metrics), features_cache_dir=cache_dir, device="cpu"
    )
    return calculate(*images, COLOURS, options)[0]


def test_the_frechet_distance_of_two_gaussians_has_its_closed_form(cache_dir):
    def grid(means, deviations):
        """All combinations of a normal's quantiles in each channel: the covariance is exactly diagonal."""
        quantiles = torch.special.ndtri(torch.linspace(0.04, 0.96, 12, dtype=torch.float64))
        channels = [(mean + s * quantiles).round().tolist() for mean, s in zip(means, deviations, strict=True)]
        return torch.tensor(list(itertools.product(*channels)), dtype=torch.float64)

    a, b = grid([100, 120, 140], [5, 20, 30]), grid([130, 118, 140], [10, 20, 6])
    closed_form = (a.mean(0) - b.mean(0)).square().sum() + (a.std(0) - b.std(0)).square().sum()
    assert score_points(a.tolist(), b.tolist(), cache_dir, "fid")["fd"] == pytest.approx(closed_form.item(), rel=1e-9)
    assert score_points(a.tolist(), a.tolist(), cache_dir, "fid")["fd"] == pytest.approx(0, abs=1e-6)


def test_precision_and_recall_of_clusters(cache_dir):
    def cluster(r, g, b):
        return [(r + i, g + j, b) for i in range(4) for j in range(4)]

    def shifted(points):
        return [(r, g, b + 1) for r, g, b in points]

    red, green, blue = cluster(200, 10, 10), cluster(10, 200, 10), cluster(10, 10, 200)
    for generated, real, expected in [
        (red, red, (1, 1)),
        (shifted(red), red, (1, 1)),
        (red + blue, green, (0, 0)),
        (shifted(red), red + green, (1, 0.5)),
        (shifted(red + green), red, (0.5, 1)),
        (shifted(red + blue), red + green, (0.5, 0.5)),
    ]:
        values = score_points(generated, real, cache_dir, "prc")
        assert (values["precision"], values["recall"]) == expected


@pytest.fixture(scope="module")
def distance(regnet, cifar10, cache_dir, tmp_path_factory):
    """distance(images) is the FD of uint8 [N, 3, 32, 32] from 2,000 images of CIFAR-10."""
    folder = tmp_path_factory.mktemp("distances")

    def run(images):
        flags = ["--input1", save_npz(images, folder / "images.npz"), "--feature_extractor", regnet]
        flags += ["--input2", str(cifar10), "--split2", "train[:2000]", "--metrics", "fid", "--device", "cpu"]
        evaluate.main(
            [*flags, "--output_dir", str(folder), "--overwrite_output_dir", "--features_cache_dir", cache_dir]
        )
        return json.loads((folder / "metrics.json").read_text())["values"]["fd"]

    return run


def test_distances_are_near_zero_for_real_data_and_rise_with_noise_and_blur(distance, cifar10):
    others = open_images(str(cifar10), split="train[2000:3000]").decode_all(show_progress=False)
    test = open_images(str(cifar10), split="test[:5000]").decode_all(show_progress=False)

    def noisy(images, sigma):
        normal = torch.from_numpy(np.random.RandomState(0).normal(0, sigma, images.shape))
        return (images + normal).round().clamp(0, 255).byte()

    def blurred(images, radius):
        pictures = (Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images)
        blurred = [np.asarray(picture.filter(ImageFilter.GaussianBlur(radius))) for picture in pictures]
        return torch.from_numpy(np.stack(blurred)).permute(0, 3, 1, 2)

    real, noise_20 = distance(others), distance(noisy(test, 20))
    assert 0 < real < 0.12
    assert real < distance(noisy(test[:1000], 10)) < noise_20
    assert real < distance(blurred(test[:1000], 0.5)) < distance(blurred(test[:1000], 0.7))
    # Known from 10,000 real images; these 2,000 add 0.02 of bias, and the draw of the noise moves it by 0.01.
    assert noise_20 == pytest.approx(0.929, abs=0.05)
