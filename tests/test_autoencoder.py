"""benchmarks/train_autoencoder.py: its loss by another way, and that what it saves is what it says."""

import json
import math
import re
import sys

import pytest
import torch
from conftest import REPOSITORY
from diffusers import AutoencoderKL
from PIL import Image
from torch.distributions import Normal, kl_divergence

sys.path.insert(0, str(REPOSITORY / "benchmarks"))
import train_autoencoder
from train_autoencoder import AutoencoderOptions

from images import normalize
from recipes import parse_options

TINY = ["--validation_split", "0.1", "--block_out_channels", "8", "8", "8", "--latent_images", "200"]


def options_of(*flags):
    return parse_options(AutoencoderOptions, [*TINY, *map(str, flags)])


@pytest.fixture
def vae():
    torch.manual_seed(0)
    return train_autoencoder.build_autoencoder(options_of(), channels=1, resolution=8)


@pytest.fixture
def images(digits):
    return torch.stack([digits[i] for i in range(200)])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder in which a short run has left vae/, record.json and record.png."""
    folder = tmp_path_factory.mktemp("autoencoder")
    where = ["--output_dir", folder / "vae", "--output_json", folder / "record.json"]
    train_autoencoder.main(options_of(*where, "--max_train_steps", 60))
    return folder


def test_the_loss_is_that_of_ldm_over_the_number_of_values(vae, images):
    """The mean over images of: sum of squares + weight * KL(N(mu, sigma) || N(0, 1)) by torch.distributions."""
    x, weight = normalize(images[:5]), 0.1  # heavy, so that both terms tell
    torch.manual_seed(1)
    loss = train_autoencoder.autoencoder_loss(vae, x, weight)
    posterior = vae.encode(x).latent_dist
    torch.manual_seed(1)
    decoded = vae.decode(posterior.mean + posterior.std * torch.randn(posterior.mean.shape)).sample
    divergence = kl_divergence(Normal(posterior.mean, posterior.std), Normal(0.0, 1.0)).flatten(1).sum(1)
    squares = torch.nn.functional.mse_loss(decoded, x, reduction="none").flatten(1).sum(1)
    assert weight * divergence.mean() > 0.001 * squares.mean()
    torch.testing.assert_close(loss, (squares + weight * divergence).mean() / x[0].numel())


def test_training_lowers_the_error(vae, images):
    def error():
        return train_autoencoder.errors(images, train_autoencoder.reconstruct(vae, images))["mse"]

    before = error()
    options = options_of("--max_train_steps", 60)
    steps, _ = train_autoencoder.train(vae, iter(lambda: images[torch.randint(200, (32,))], None), options)
    assert steps == 60
    assert error() < 0.7 * before


def test_a_loss_that_is_no_number_ends_training(vae, images):
    options = options_of("--max_train_steps", 100, "--kl_weight", 1e308)
    with pytest.raises(FloatingPointError, match=r"the loss is (inf|nan) after 1 updates: try a lower --learning_rate"):
        train_autoencoder.train(vae, iter(lambda: images[:2], None), options)


def test_the_scaling_factor_gives_latents_a_standard_deviation_of_one(vae, images):
    torch.manual_seed(2)
    found = train_autoencoder.scale_latents(vae, images)
    torch.manual_seed(2)
    latents = vae.encode(normalize(images)).latent_dist.sample() * vae.config.scaling_factor
    assert latents.std().item() == pytest.approx(1, rel=1e-5)
    assert found["scaling_factor"] == vae.config.scaling_factor == pytest.approx(1 / found["std"])
    assert found["shape"] == [4, 2, 2]
    scaled = latents.std((0, 2, 3)) / vae.config.scaling_factor
    torch.testing.assert_close(torch.tensor(found["std_per_channel"]), scaled)


def test_errors_are_those_of_a_known_difference():
    originals = torch.full((3, 1, 4, 4), 100, dtype=torch.uint8)
    reconstructions = originals.clone()
    reconstructions[..., :2] = 90  # 10 levels in half of the pixels
    found = train_autoencoder.errors(originals, reconstructions)
    assert found == {
        "images": 3,
        "mse": 50,
        "psnr": pytest.approx(20 * math.log10(255 / 50**0.5)),
        "mean_absolute_error": 5,
    }
    assert train_autoencoder.errors(originals, originals)["psnr"] == math.inf


def test_the_saved_folder_is_the_autoencoder_of_the_record(trained, digits):
    record = json.loads((trained / "record.json").read_text())
    vae = AutoencoderKL.from_pretrained(trained / "vae").eval()
    assert vae.config.scaling_factor == record["latents"]["scaling_factor"]
    assert record["latents"]["are_finite"]
    assert record["updates"] == 60
    assert record["images_seen"] == 60 * 8
    _, test_images = digits.hold_out(0.1)
    originals = test_images.decode_all(show_progress=False)
    found = train_autoencoder.errors(originals, train_autoencoder.reconstruct(vae, originals))
    assert found == pytest.approx(record["test"])
    with Image.open(trained / "record.png") as picture:
        assert picture.size == (16 * 18 + 2, 2 * 18 + 2)


def test_nothing_is_written_over(trained, tmp_path):
    before = (trained / "record.json").read_bytes()
    with pytest.raises(SystemExit, match=r"--output_dir \S*vae: must be a new or an empty folder"):
        train_autoencoder.main(options_of("--output_dir", trained / "vae"))
    where = ["--output_dir", tmp_path / "vae", "--output_json", trained / "record.json"]
    with pytest.raises(SystemExit, match=r"--output_json \S*: \S*record.json is there already"):
        train_autoencoder.main(options_of(*where))
    assert (trained / "record.json").read_bytes() == before
    assert not (tmp_path / "vae").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--block_out_channels", 8, 12], "--block_out_channels 12: must be a multiple of 8"),
        (["--learning_rate", "nan"], r"--learning_rate nan: must be in \(0, inf\)"),
        (["--validation_split", "1.5"], r"--validation_split 1.5: must be a share in \(0, 1\)"),
    ],
)
def test_bad_values_are_refused_by_name(flags, message, capsys):
    with pytest.raises(SystemExit):
        options_of(*flags)
    assert "error: " in (told := capsys.readouterr().err)
    assert re.search(message, told)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--resolution", 10], "--resolution 10: must be a multiple of 4"),
        (["--validation_split", "train"], "--validation_split train: "),
        (["--output_json", "no/such/folder.json"], "--output_json no/such/folder.json: must be a file name that ends"),
        (["--feature_extractor", "no/such/model"], "--feature_extractor no/such/model is neither"),
    ],
)
def test_what_cannot_be_is_refused_before_the_work(flags, message, tmp_path):
    with pytest.raises(SystemExit, match=message):
        train_autoencoder.main(options_of("--output_dir", tmp_path / "vae", *flags))
    assert not (tmp_path / "vae").exists()
