"""Scores against torch-fidelity's own command line, closed forms and sets made to have known answers."""

import itertools
import json
import sys
from unittest import mock
from urllib.error import URLError

import datasets
import numpy as np
import pytest
import torch
import torch_fidelity
import torch_fidelity.fidelity
import transformers
from conftest import SHARED
from PIL import Image, ImageFilter
from torch_fidelity import FeatureExtractorBase, FeatureExtractorInceptionV3

import evaluate
import feature_extractors
from evaluate import EvaluationOptions, calculate
from feature_extractors import Extractor, TransformersExtractor, load_extractor, make_frechet_metric
from images import open_images
from recipes import parse_options

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def regnet():
    """A folder with a small RegNet trained on CIFAR-10; its features are 320."""
    folder = SHARED / "metrics" / "cifar10-regnet"
    if not folder.is_dir():
        pytest.skip("needs a trained RegNet in ../shared/metrics/cifar10-regnet")
    return str(folder)


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory):
    return str(tmp_path_factory.mktemp("features"))


@pytest.fixture(scope="module")
def photos(cifar10, tmp_path_factory):
    """Two disjoint folders of 340 PNGs of CIFAR-10."""
    folder = tmp_path_factory.mktemp("photos")
    for name, split in (("a", "train[:340]"), ("b", "test[:340]")):
        save_pngs(open_images(str(cifar10), split=split).decode_all(show_progress=False), folder / name)
    return folder


def save_pngs(images, folder):
    """uint8 [N, C, H, W] -> 000000.png, ..."""
    folder.mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy().squeeze()).save(folder / f"{i:06d}.png")


def save_npz(images, path):
    np.savez(path, images.permute(0, 2, 3, 1).numpy())
    return str(path)


def noise(num_images, size=8, channels=3, seed=0):
    return torch.randint(256, (num_images, channels, size, size), generator=torch.Generator().manual_seed(seed)).byte()


@pytest.fixture
def score(tmp_path, cache_dir):
    """score("--flag", value, ...) runs the script and returns what is in its metrics.json."""
    numbers = itertools.count()

    def run(*flags):
        folder = tmp_path / f"scores-{next(numbers)}"
        evaluate.main(["--output_dir", str(folder), "--cache_dir", cache_dir, "--device", "cpu", *map(str, flags)])
        return json.loads((folder / "metrics.json").read_text())

    return run


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


# ------------------------------------------------------------------------- the same numbers as torch-fidelity


class RegNetByHand(FeatureExtractorBase):
    """The shared RegNet, without any code of ours."""

    def __init__(self, name, features_list, feature_extractor_weights_path=None, **_):
        super().__init__(name, features_list)
        self.model = transformers.AutoModel.from_pretrained(feature_extractor_weights_path)

    def forward(self, images):
        return (self.model((images / 255 - 0.5) / 0.5).pooler_output.flatten(1).double(),)

    @staticmethod
    def get_provided_features_list():
        return ("features",)

    @staticmethod
    def get_default_feature_layer_for_metric(metric):
        return "features"

    @staticmethod
    def can_be_compiled():
        return False


torch_fidelity.register_feature_extractor("regnet-by-hand", RegNetByHand)


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


@pytest.fixture(scope="module")
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
    for module in (feature_extractors, evaluate):
        monkeypatch.setattr(module, "INCEPTION_SHA256", record["feature_extractor"]["weights_sha256"])
    assert score(*flags)["values"].keys() == {"kid", "kid_std"}
    assert "not torch-fidelity's weights" not in capsys.readouterr().out


# ------------------------------------------------------------------------------------------- known answers


class Colours(RegNetByHand):
    """The features of an image are the three values of its first pixel, in grey levels."""

    def __init__(self, name, features_list, **_):
        FeatureExtractorBase.__init__(self, name, features_list)

    def forward(self, images):
        return (images[:, :, 0, 0].double(),)


torch_fidelity.register_feature_extractor("colours", Colours)
COLOURS = Extractor("colours", "features", 3, weights_path=None, description={"weights_sha256": "none"})


def score_points(points1, points2, cache_dir, *metrics):
    """Scores of two sets of points, lists of (r, g, b)."""
    images = [torch.tensor(points, dtype=torch.uint8)[:, :, None, None] for points in (points1, points2)]
    options = EvaluationOptions(
        input1="a", input2="b", output_dir="c", metrics=list(metrics), cache_dir=cache_dir, device="cpu"
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
        evaluate.main([*flags, "--output_dir", str(folder), "--overwrite_output_dir", "--cache_dir", cache_dir])
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


# ----------------------------------------------------------------------------------- in the training loop


def test_the_metric_of_the_training_loop_gives_the_same_value(regnet, photos, score):
    expected = score(
        "--input1", photos / "a", "--input2", photos / "b", "--metrics", "fid", "--feature_extractor", regnet
    )["values"]["fd"]
    generated, real = (open_images(str(photos / name)).decode_all(show_progress=False) for name in "ab")
    metric = make_frechet_metric(regnet).train()
    for batch in real.split(100):
        metric.update(batch, real=True)
    for _ in range(2):  # the second time without the real images
        for batch in generated.split(150):
            with torch.autocast("cpu", torch.bfloat16):
                metric.update(batch, real=False)
        assert metric.compute().item() == pytest.approx(expected, rel=1e-4)
        metric.reset()


def test_grey_images_are_compared_as_rgb(regnet):
    grey = noise(4, 32, channels=1)
    metric = make_frechet_metric(regnet)
    metric.update(grey, real=True)
    metric.update(grey.expand(-1, 3, -1, -1), real=False)
    assert metric.compute().item() == pytest.approx(0, abs=1e-6)


def test_inception_in_the_training_loop(random_inception):
    metric = make_frechet_metric(weights=random_inception)
    assert metric.inception(noise(2)).shape == (2, 2048)


# ----------------------------------------------------------------------------------------- extractors


def save_model(model, folder, size=64):
    model.save_pretrained(folder)
    transformers.ViTImageProcessor(size={"height": size, "width": size}).save_pretrained(folder)
    return str(folder)


TINY_VIT = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}


def tiny_vit(**more):
    return transformers.ViTConfig(**TINY_VIT, image_size=64, patch_size=32, **more)


def test_features_are_pooled_as_the_model_was_trained(tmp_path):
    vit = transformers.ViTModel(tiny_vit())
    headless = transformers.ViTModel(tiny_vit(), add_pooling_layer=False)
    segformer = transformers.SegformerModel(
        transformers.SegformerConfig(hidden_sizes=[8] * 4, num_attention_heads=[2] * 4)
    )
    for model, expected, pool in [
        (vit, "pooler_output", lambda outputs: outputs.pooler_output),
        (headless, "class token", lambda outputs: outputs.last_hidden_state[:, 0]),
        (segformer, "mean of last_hidden_state", lambda outputs: outputs.last_hidden_state.mean((2, 3))),
    ]:
        images = noise(3, 64)
        extractor = load_extractor(save_model(model.eval(), tmp_path / expected))
        assert extractor.description["features"] == expected
        assert extractor.num_features == 8
        with torch.no_grad():
            by_hand = pool(model((images / 255 - 0.5) / 0.5)).double()
        features = feature_extractors.FeatureVectors(extractor)(images)
        torch.testing.assert_close(features, by_hand, rtol=1e-4, atol=1e-5)


def test_models_that_cannot_serve_are_refused(tmp_path):
    torch.manual_seed(0)
    config = transformers.ViTMAEConfig(**TINY_VIT, image_size=64, patch_size=8, initializer_range=0.5)
    mae = transformers.ViTMAEModel(config)
    with pytest.raises(ValueError, match="different features each time"):
        load_extractor(save_model(mae, tmp_path / "mae"))
    broken = transformers.ViTModel(tiny_vit())
    state = {name: value for name, value in broken.state_dict().items() if "embeddings" not in name}
    broken.save_pretrained(tmp_path / "broken", state_dict=state)
    transformers.ViTImageProcessor().save_pretrained(tmp_path / "broken")
    with pytest.raises(ValueError, match="without trained weights for embeddings"):
        load_extractor(str(tmp_path / "broken"))


def test_other_weights_or_preprocessing_have_another_name(tmp_path):
    def name(folder, seed, **preprocessing):
        torch.manual_seed(seed)
        model = save_model(transformers.ViTModel(tiny_vit()), tmp_path / folder)
        transformers.ViTImageProcessor(size={"height": 64, "width": 64}, **preprocessing).save_pretrained(model)
        return load_extractor(model).name

    assert name("a", seed=0) == name("b", seed=0)
    assert len({name("a", seed=0), name("a", seed=1), name("a", seed=0, resample=0)}) == 3


# --------------------------------------------------------------------------------------------- inputs, cache


def test_one_set_of_images_in_every_format(tmp_path, score):
    """PNGs, parquet, npz and what generate.py leaves, grid included, are the same images."""
    model = save_model(transformers.ViTModel(tiny_vit()), tmp_path / "vit")
    images = noise(20, 16)
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
    rows = datasets.Dataset.from_dict({"image": pictures}, features=datasets.Features({"image": datasets.Image()}))

    save_pngs(images, tmp_path / "png")
    save_npz(images, tmp_path / "images.npz")
    (tmp_path / "parquet").mkdir()
    rows.to_parquet(tmp_path / "parquet" / "train-00000.parquet")

    for kind in ("png", "npz", "parquet"):
        folder = tmp_path / f"generated-{kind}"
        folder.mkdir()
        record = {"status": "complete", "num_images": 20, "settings": {"format": kind}}
        (folder / "generation.json").write_text(json.dumps(record))
        Image.new("RGB", (64, 64)).save(folder / "grid.png")
    save_pngs(images, tmp_path / "generated-png" / "images")
    save_npz(images, tmp_path / "generated-npz" / "images.npz")
    shards = tmp_path / "generated-parquet" / "images"
    shards.mkdir()
    rows.select(range(12)).to_parquet(shards / "000000-000011.parquet")
    rows.select(range(12, 20)).to_parquet(shards / "000012-000019.parquet")

    sources = ["png", "images.npz", "parquet", "generated-png", "generated-npz", "generated-parquet"]
    sources += ["generated-png/images", "generated-npz/images.npz", "generated-parquet/images"]
    records = [
        score(
            "--input1", tmp_path / source, "--input2", tmp_path / "png",
            "--feature_extractor", model, "--kid_subset_size", 10,
        )
        for source in sources
    ]  # fmt: skip
    for record in records:
        assert record["input1"]["num_images"] == 20
        assert record["input1"]["sha256"] == records[0]["input2"]["sha256"]
        assert record["values"] == records[0]["values"]
    assert records[0]["values"]["fd"] == pytest.approx(0, abs=1e-6)


def test_a_resolution_resizes_every_source_alike(tmp_path):
    save_pngs(noise(3, 12), tmp_path / "png")
    flags = {"input2": "digits", "output_dir": "x", "resolution": 8, "image_mode": "L"}
    npz = EvaluationOptions(input1=save_npz(noise(3, 12), tmp_path / "images.npz"), **flags)
    png = EvaluationOptions(input1=str(tmp_path / "png"), **flags)
    images = [evaluate.open_input(options, 1).decode_all() for options in (npz, png)]
    assert images[0].shape == (3, 1, 8, 8)
    assert torch.equal(*images)


def test_a_random_subset_depends_on_the_seed_alone(tmp_path):
    save_npz(noise(30), tmp_path / "images.npz")
    images = open_images(str(tmp_path / "images.npz"))
    subset = evaluate.read_images(images, 10, seed=1)
    assert torch.equal(subset, evaluate.read_images(images, 10, seed=1))
    assert not torch.equal(subset, evaluate.read_images(images, 10, seed=2))
    assert len({image.numpy().tobytes() for image in subset}) == 10


def test_reference_features_are_cached_until_anything_changes(tmp_path, score, monkeypatch):
    extracted = []
    forward = TransformersExtractor.forward
    monkeypatch.setattr(TransformersExtractor, "forward", lambda self, x: extracted.append(len(x)) or forward(self, x))

    def num_extracted(*flags):
        extracted.clear()
        flags = ["--input2", tmp_path / "b", "--feature_extractor", tmp_path / "vit", "--kid_subset_size", 9, *flags]
        score("--input1", tmp_path / "a", *flags)
        return sum(count for count in extracted if count > 2)  # without the two examples

    torch.manual_seed(0)
    save_model(transformers.ViTModel(tiny_vit()), tmp_path / "vit")
    save_pngs(noise(10), tmp_path / "a")
    save_pngs(noise(12, seed=1), tmp_path / "b")
    assert num_extracted() == 10 + 12
    assert num_extracted() == 10
    assert num_extracted("--num_images2", 11) == 10 + 11
    Image.new("RGB", (8, 8)).save(tmp_path / "b" / "000000.png")
    assert num_extracted() == 10 + 12
    save_model(transformers.ViTModel(tiny_vit()), tmp_path / "vit")  # other weights
    assert num_extracted() == 10 + 12
    transformers.ViTImageProcessor(size={"height": 64, "width": 64}, resample=0).save_pretrained(tmp_path / "vit")
    assert num_extracted() == 10 + 12
    assert num_extracted() == 10


def test_the_record_says_how_to_repeat_it(tmp_path, score, capsys):
    model = save_model(transformers.ViTModel(tiny_vit()), tmp_path / "vit")
    flags = ["--input1", "digits", "--input2", "digits", "--num_images1", "40", "--feature_extractor", model]
    record = score(*flags, "--metrics", "fid", "kid", "--kid_subset_size", "30")
    output = capsys.readouterr().out
    assert "fd" in output
    assert "fewer than 10,000 images (40 here) is biased" in output
    assert record["command"].endswith("--metrics fid kid --kid_subset_size 30")
    assert record["options"]["seed"] == 2020
    assert (record["input1"]["num_images"], record["input2"]["num_images"]) == (40, 1797)
    assert record["feature_extractor"]["features"] == "pooler_output"
    assert len(record["feature_extractor"]["weights_sha256"]) == 64
    assert record["input2"]["contents"]["images"] == 1797
    assert "--input2: 1,797 images of digits (8x8)" in output
    assert {"device", "versions", "seconds", "torch_fidelity"} <= record.keys()


def test_mixed_sizes_of_an_input_are_announced(tmp_path, score, caplog):
    model = save_model(transformers.ViTModel(tiny_vit()), tmp_path / "vit")
    save_pngs(noise(8), tmp_path / "mixed")
    Image.new("RGB", (32, 32)).save(tmp_path / "mixed" / "000007.png")
    flags = ["--input1", tmp_path / "mixed", "--input2", "digits", "--num_images2", 8, "--metrics", "prc"]
    record = score(*flags, "--feature_extractor", model)
    note = "images differ in size (of 8 images: 7 of 8x8, 1 of 32x32): all are resized and cropped to 8x8"
    assert note in caplog.text
    assert record["input1"]["contents"]["notes"][0].startswith(note)


# --------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--input1 a.npz --input2 digits", "--output_dir is required"),
        ("--metrics fid fdi", "--metrics fdi: must be of fid, kid, isc, prc"),
        ("--feature_extractor x --metrics isc", "--metrics isc: the Inception Score needs --feature_ex"),
        ("--batch_size 0", "--batch_size 0: must be at least 1"),
        ("--prc_batch_size 0", "--prc_batch_size 0: must be at least 1"),
        ("--prc_neighborhood -1", "--prc_neighborhood -1: must be at least 1"),
        ("--seed -1", "--seed -1"),
        ("--device tpu", "--device tpu: must be cpu, cuda or cuda:N"),
        ("--device cuda:99", "--device cuda:99: this machine has"),
    ],
)
def test_options_that_are_not_allowed(flags, message, capsys):
    given = [] if "--input1" in flags else ["--input1", "a", "--input2", "b", "--output_dir", "c"]
    with pytest.raises(SystemExit):
        evaluate.main([*given, *flags.split()])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--metrics kid --kid_subset_size 21", "--kid_subset_size 21: --input1 gives 20 images only"),
        ("--metrics prc --prc_neighborhood 20", "--prc_neighborhood 20: --input1 gives 20 images only"),
        ("--metrics isc --isc_splits 21", "--isc_splits 21: --input1 gives 20 images only"),
        ("--num_images1 21", "--num_images1 21: --input1 has 20 images only"),
        ("--num_images2 1", "--input2 gives 1 images: at least 2 are needed"),
        ("--input1 {large}", "has images of 16x16 and --input2 {images} of 8x8: --resolution 8"),
        ("--input1 {empty}", "--input1 {empty} cannot be loaded: EmptyDatasetError"),
        ("--input2 {nowhere}", "--input2 {nowhere}: no such folder"),
        ("--input1 {nowhere}.npz", "--input1: {nowhere}.npz: no such file"),
        ("--input1 {floats}", "arr_0 must be uint8 [N, H, W, 1 or 3], not float64 [2, 3]"),
        ("--input1 {unfinished}", "holds 3 of 4 images: let generate.py finish"),
        ("--input1 {floating}", "--input1: {floating}: image 0: {floating}/1.tiff: grey levels 300..300 are"),
        ("--input1 {floating}", "--white_level1 300"),
        ("--input1 {images} --white_level1 0", "--input1: --white_level1 0.0 is not a positive number"),
        ("--input2 digits --split2 test", "--input2 digits has no split 'test'"),
        ("--input2 {parquet} --image_column2 picture", "--image_column2 picture: {parquet} has no such column"),
        ("--feature_extractor {empty}", "--feature_extractor {empty} is neither 'inception' nor"),
        ("--feature_extractor_weights {nowhere}", "--feature_extractor_weights {nowhere}: no such file"),
        ("--feature_extractor_weights {floats}", "{floats} is no state dict of torch-fidelity's InceptionV3"),
        ("--feature_extractor_weights {other}", "{other} is no state dict of torch-fidelity's InceptionV3"),
        ("--feature_extractor x --feature_extractor_weights y", "only for inception; x has its own"),
        ("--output_dir {done}", "has a metrics.json: --overwrite_output_dir replaces it"),
        ("--output_dir {images}", "--output_dir {images} is a file, not a folder"),
        ("--cache_dir {images}", "--cache_dir {images} is a file, not a folder"),
    ],
)
def test_one_line_says_what_is_wrong_before_anything_takes_long(flags, message, errors_folder, monkeypatch):
    monkeypatch.setattr(evaluate, "calculate", lambda *_: pytest.fail("the expensive work began"))
    names = {path.stem: str(path) for path in errors_folder.iterdir()}
    names |= {name: str(errors_folder / name) for name in ("nowhere", "scores")}
    given = "--input1 {images} --input2 {images} --output_dir {scores} --metrics prc"
    with pytest.raises(SystemExit) as error:
        evaluate.main(f"{given} {flags}".format(**names).split())
    assert message.format(**names) in str(error.value)
    assert "\n" not in str(error.value)
    assert not (errors_folder / "nowhere").exists()
    assert not (errors_folder / "scores").exists()


def test_a_frechet_distance_needs_more_images_than_features(random_inception, errors_folder, tmp_path):
    images = str(errors_folder / "images.npz")
    flags = ["--input1", images, "--input2", images, "--output_dir", str(tmp_path), "--metrics", "fid"]
    with pytest.raises(SystemExit, match=r"--input1 gives 20 images, but .* 2048 features needs more than 2048"):
        evaluate.main([*flags, "--feature_extractor_weights", random_inception])


@pytest.fixture(scope="module")
def errors_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("errors")
    save_npz(noise(20), folder / "images.npz")
    save_npz(noise(20, 16), folder / "large.npz")
    np.savez(folder / "floats.npz", np.zeros((2, 3)))
    (folder / "empty").mkdir()
    (folder / "done").mkdir()
    (folder / "done" / "metrics.json").write_text("{}")
    (folder / "unfinished").mkdir()
    save_pngs(noise(3), folder / "unfinished" / "images")
    record = {"status": "running", "num_images": 4, "settings": {"format": "png"}}
    (folder / "unfinished" / "generation.json").write_text(json.dumps(record))
    (folder / "floating").mkdir()
    Image.new("F", (8, 8), 300).save(folder / "floating" / "1.tiff")
    datasets.Dataset.from_dict({"x": [1]}).to_parquet(folder / "parquet.parquet")
    torch.save({"weight": torch.zeros(2)}, folder / "other.pth")
    return folder


def test_weights_that_cannot_be_downloaded(monkeypatch, tmp_path):
    def fail(*_):
        raise URLError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    with pytest.raises(ValueError, match="pass the file by --feature_extractor_weights"):
        load_extractor()


def test_a_recipe_is_overridden_by_flags(tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("input1: a\ninput2: b\noutput_dir: c\nmetrics: prc\nseed: 1\ndevice: cpu\n")
    options = parse_options(EvaluationOptions, ["--config", str(recipe), "--input2", "digits"])
    assert (options.input1, options.input2, options.metrics, options.seed) == ("a", "digits", ["prc"], 1)
    recipe.write_text("input: a")
    with pytest.raises(SystemExit):
        evaluate.main(["--config", str(recipe)])
    assert "there is no option 'input'; did you mean 'input" in capsys.readouterr().err


def test_an_old_result_is_replaced_only_on_request(tmp_path, cache_dir):
    model = save_model(transformers.ViTModel(tiny_vit()), tmp_path / "vit")
    save_npz(noise(20), tmp_path / "images.npz")
    flags = ["--input1", str(tmp_path / "images.npz"), "--input2", str(tmp_path / "images.npz"), "--metrics", "prc"]
    flags += ["--feature_extractor", model, "--output_dir", str(tmp_path / "out"), "--cache_dir", cache_dir]
    evaluate.main(flags)
    with pytest.raises(SystemExit, match="--overwrite_output_dir replaces it"):
        evaluate.main(flags)
    evaluate.main([*flags, "--overwrite_output_dir"])
    (tmp_path / "out" / "metrics.json").write_text('{"accuracy": 0.9}')
    with pytest.raises(SystemExit, match=r"metrics\.json is not one of evaluate\.py's"):
        evaluate.main([*flags, "--overwrite_output_dir"])
    assert (tmp_path / "out" / "metrics.json").read_text() == '{"accuracy": 0.9}'


def test_few_images_are_scored_on_request(tmp_path, score):
    model = save_model(transformers.ViTModel(tiny_vit()), tmp_path / "vit")
    few = save_npz(noise(8), tmp_path / "few.npz")
    flags = ["--input1", few, "--input2", "digits", "--metrics", "fid", "--feature_extractor", model]
    with pytest.raises(SystemExit, match="of 8 features needs more than 8"):
        score(*flags)
    assert score(*flags, "--allow_few_images")["values"]["fd"] > 0
