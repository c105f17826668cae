"""benchmarks/feature_extractor.py: its augmentation by another way, and that what it saves is what it says."""

import json
import re
import sys

import numpy as np
import pytest
import scipy.linalg
import torch
from conftest import REPOSITORY
from transformers import AutoImageProcessor, AutoModel

sys.path.insert(0, str(REPOSITORY / "benchmarks"))
import feature_extractor
from feature_extractor import ExtractorOptions

from images import normalize
from recipes import parse_options
from scoring.feature_extractors import load_extractor

DIGITS = ["--dataset_name", "digits", "--validation_split", "0.2", "--num_epochs", "4", "--train_batch_size", "64"]


def options_of(*flags):
    return parse_options(ExtractorOptions, [*DIGITS, *map(str, flags)])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder in which a short run has left model/ and record.json."""
    folder = tmp_path_factory.mktemp("extractor")
    where = ["--output_dir", folder / "model", "--output_json", folder / "record.json"]
    feature_extractor.main(options_of(*where, "--mixed_precision", "bf16"))  # where less can be trusted
    return folder


@pytest.fixture(scope="module")
def record(trained):
    return json.loads((trained / "record.json").read_text())


def features_of(folder, images):
    """[N, d] of uint8 images, by transformers alone."""
    model, processor = AutoModel.from_pretrained(folder).eval(), AutoImageProcessor.from_pretrained(folder)
    with torch.no_grad():
        return model(**processor(images.expand(-1, 3, -1, -1), return_tensors="pt")).pooler_output.flatten(1).double()


def train_few(seed):
    """How far ten updates on random images of two classes move the weights."""
    torch.manual_seed(seed)
    classifier = feature_extractor.build_classifier(["a", "b"])
    before = torch.nn.utils.parameters_to_vector(classifier.parameters())
    images = torch.randint(256, (8, 3, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    batches = iter(lambda: (images, torch.arange(8) % 2), None)
    feature_extractor.train(classifier, batches, 10, max_learning_rate=0.01, mixed_precision="no")
    return (torch.nn.utils.parameters_to_vector(classifier.parameters()) - before).detach()


def test_an_augmented_image_is_a_part_of_it_or_its_mirror_image_with_reflected_borders():
    pixels = np.random.default_rng(0).integers(256, size=(1, 16, 16), dtype=np.uint8)
    wide = np.pad(pixels, [(0, 0), (2, 2), (2, 2)], mode="reflect")  # 2 of 16 pixels
    parts = [wide[:, y : y + 16, x : x + 16] for y in range(5) for x in range(5)]
    # a mirrored image, padded, is the mirror image of the padded one
    expected = {part.tobytes() for part in parts} | {part[:, :, ::-1].tobytes() for part in parts}
    assert len(expected) == 50
    torch.manual_seed(0)
    augmented = feature_extractor.augment(torch.tensor(pixels).expand(500, 1, 16, 16))
    assert augmented.shape == (500, 3, 16, 16)
    assert augmented.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(augmented[:, 0], augmented[:, 2])
    levels = ((augmented[:, :1] + 1) * 127.5).round().to(torch.uint8)
    assert {image.numpy().tobytes() for image in levels} == expected


def test_training_is_repeatable():
    assert torch.equal(train_few(seed=0), train_few(seed=0))
    assert not torch.equal(train_few(seed=0), train_few(seed=1))


def test_a_loss_that_is_no_number_ends_training():
    classifier = feature_extractor.build_classifier(["a", "b"])
    batches = iter(lambda: (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.tensor([0, 1])), None)
    with pytest.raises(
        FloatingPointError, match=r"the loss is (inf|nan) after 20 updates: try a lower --learning_rate"
    ):
        feature_extractor.train(classifier, batches, 100, max_learning_rate=1e30, mixed_precision="no")


def test_the_saved_folder_is_the_extractor_of_the_record(trained, record):
    extractor = load_extractor(str(trained / "model"))
    assert record["weights_sha256"] == extractor.description["weights_sha256"]
    assert record["features"] == extractor.num_features == 320
    assert extractor.description["features"] == "pooler_output"


def test_the_saved_preprocessing_is_that_of_training(trained, digits):
    images = digits.decode_all(show_progress=False)[:9].expand(-1, 3, -1, -1)
    pixels = AutoImageProcessor.from_pretrained(trained / "model")(images, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pixels, normalize(images))


def test_its_features_tell_unseen_images_apart(trained, record, digits):
    """By the nearest mean of a class, which leaves the classifier's last layer out."""
    seen, unseen = digits.hold_out(0.2)
    features, labels = features_of(trained / "model", seen.decode_all(show_progress=False)), seen.labels()
    means = torch.stack([features[labels == label].mean(0) for label in range(10)])
    distances = torch.cdist(features_of(trained / "model", unseen.decode_all(show_progress=False)), means)
    assert (distances.argmin(1) == unseen.labels()).double().mean() > 0.7
    assert record["test_accuracy"] > 0.7


def test_the_distances_of_the_record_are_frechets_and_rise_with_noise(trained, record, digits):
    found = record["frechet_distances"]
    seen, unseen = digits.hold_out(0.2)
    half, _ = seen.random_sample(719)
    a, b = (features_of(trained / "model", x).numpy() for x in (half, unseen.random_sample(400)[0]))
    covariances = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
    expected = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(covariances[0] + covariances[1] - 2 * root)
    assert found["images"] == [719, 719, 359]
    assert found["test_images"] == pytest.approx(expected, rel=0.01)
    # Which of no noise and the least has the smaller distance, so short a training leaves to how a CPU rounds
    for names in (["other_training_images", "test_images", "noise_10"], ["noise_2", "noise_5", "noise_10", "noise_20"]):
        assert sorted(names, key=found.get) == names


def test_nothing_is_written_over(trained, tmp_path):
    before = (trained / "record.json").read_bytes()
    with pytest.raises(SystemExit, match=r"--output_dir \S*model: must be a new or an empty folder"):
        feature_extractor.main(options_of("--output_dir", trained / "model"))
    with pytest.raises(SystemExit, match=r"--output_json \S*: \S*record.json is there already"):
        feature_extractor.main(options_of("--output_dir", tmp_path / "m", "--output_json", trained / "record.json"))
    assert (trained / "record.json").read_bytes() == before
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--learning_rate", "nan"], r"--learning_rate nan: must be in \(0, inf\)"),
        (["--num_epochs", 0], r"--num_epochs 0: must be in \[1, 2\*\*20\]"),
        (["--mixed_precision", "fp16"], "--mixed_precision fp16: must be one of no, bf16"),
    ],
)
def test_bad_values_are_refused_by_name(flags, message, capsys):
    with pytest.raises(SystemExit):
        options_of(*flags)
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dataset_name", "{unlabelled}"], r"--dataset_name \S*digits.npz has no labels"),
        (
            ["--validation_split", "0.1"],
            "--validation_split 0.1: gives 180 images, and distances of 320 features need",
        ),
        (["--validation_split", "0.7"], "--dataset_name digits: gives 539 images, and distances of 320 features need"),
        (["--output_json", "no/such/folder.json"], "--output_json no/such/folder.json: must be a file name that ends"),
    ],
)
def test_what_cannot_be_is_refused_before_the_work(flags, message, tmp_path, few_digits):
    flags = [str(flag).format(unlabelled=few_digits) for flag in flags]
    with pytest.raises(SystemExit, match=message):
        feature_extractor.main(options_of("--output_dir", tmp_path / "model", *flags))
    assert not (tmp_path / "model").exists()
