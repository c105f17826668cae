"""The loss on held-out images: the same examples at each time and in each run, and nothing of the run changes by it."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from image_helpers import contents_with_bad_ones, encoded, open_contents, random_pixels, write_source
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from images import ImageDataset, open_images
from training.results import timestep_ranges
from training.validation import NUM_EXAMPLES, ValidationLoss, divide

T = 1000


def accelerator(rank=0, world_size=1):
    return SimpleNamespace(
        process_index=rank, num_processes=world_size, device=torch.device("cpu"), reduce=lambda sums, how: sums
    )


class Zero(torch.nn.Module):
    """Predicts no noise, and keeps what it was asked."""

    def __init__(self):
        super().__init__()
        self.asked = []

    def forward(self, noisy_images, timesteps, return_dict):
        self.asked.append((noisy_images.clone(), timesteps.clone()))
        return (torch.zeros_like(noisy_images),)


class Images:
    """Seven images of noise, as an `ImageDataset` chooses them."""

    to_inputs, image_shape = staticmethod(ImageDataset.to_inputs), (3, 4, 4)

    def random_sample(self, count):
        pixels = np.random.default_rng(0).integers(0, 256, (7, 3, 4, 4), dtype=np.uint8)
        return torch.from_numpy(pixels), [6, 5, 4, 3, 2, 1, 0]


def validation(batch_size=64, rank=0, world_size=1):
    return ValidationLoss(Images(), torch.arange(7), T, batch_size, accelerator(rank, world_size))


def test_timesteps_are_stratified_and_all_images_used_alike():
    examples = validation()
    assert torch.equal(torch.bincount(examples.timesteps * 20 // T), torch.full((20,), NUM_EXAMPLES // 20))
    assert torch.bincount(examples.image_numbers).tolist() == [143] * 6 + [142]
    # An image meets all noise levels: its timesteps are not those of a stretch
    assert examples.timesteps[examples.image_numbers == 0].float().std() > 0.8 * T / 12**0.5


def test_it_is_the_plain_mean_square_of_the_noise_that_a_network_does_not_see():
    """Of a network that predicts nothing: the noise's own mean square, which the noisy images give away."""
    network, scheduler, examples = Zero(), DDPMScheduler(), validation()
    loss, by_timestep = examples.measure(network, scheduler)
    noisy_images, timesteps = (torch.cat(parts) for parts in zip(*network.asked, strict=True))
    abar = scheduler.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    images = examples.images[examples.image_numbers] / 127.5 - 1
    noise = (noisy_images - abar.sqrt() * images) / (1 - abar).sqrt()
    squares = noise.square().mean((1, 2, 3))
    assert loss == pytest.approx(squares.mean().item(), rel=1e-5)
    for i, value in enumerate(by_timestep):
        assert value == pytest.approx(squares[timesteps * 20 // T == i].mean().item(), rel=1e-3)
    assert loss == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("batch_size", [1, 64, 2000])
def test_batches_do_not_matter(batch_size):
    expected = validation().measure(Zero(), DDPMScheduler())
    found = validation(batch_size=batch_size).measure(Zero(), DDPMScheduler())
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert found[1] == pytest.approx(expected[1], rel=1e-4)


def test_processes_share_the_examples_out():
    whole, parts = Zero(), [Zero(), Zero(), Zero()]
    validation().measure(whole, DDPMScheduler())
    for rank, network in enumerate(parts):
        validation(rank=rank, world_size=3).measure(network, DDPMScheduler())
    asked = [[torch.cat(list(kind)) for kind in zip(*network.asked, strict=True)] for network in (whole, *parts)]
    together = [torch.cat(kind) for kind in zip(*asked[1:], strict=True)]
    order = together[1].argsort()
    assert torch.equal(together[1][order], asked[0][1])
    assert torch.equal(together[0][order], asked[0][0])


def test_each_image_keeps_its_label():
    seen = []

    class Network(Zero):
        def forward(self, noisy_images, timesteps, return_dict, class_labels):
            seen.append(class_labels)
            return super().forward(noisy_images, timesteps, return_dict)

    examples = validation()
    examples.measure(Network(), DDPMScheduler(), null_label=7)
    assert torch.equal(torch.cat(seen), 6 - examples.image_numbers)  # as `Images` has chosen them


def test_the_global_random_state_is_left_alone():
    before = torch.get_rng_state()
    validation().measure(Zero(), DDPMScheduler())
    assert torch.equal(torch.get_rng_state(), before)


def test_bins_are_named_by_their_timesteps():
    assert timestep_ranges(1000, 20)[:2] == ["000-049", "050-099"]
    assert timestep_ranges(7, 3) == ["0-2", "3-4", "5-6"]


# Holding out


@pytest.mark.parametrize(("share", "count"), [(0.1, 180), (0.0001, 1), (0.9999, 1796), (0.5, 898)])
def test_a_share_is_held_out_at_random_and_nothing_is_lost(digits, share, count):
    others, held_out = digits.hold_out(share)
    assert (len(held_out), len(others)) == (count, 1797 - count)
    pixels = torch.cat([others.decode_all(), held_out.decode_all()])
    both, all_images = ({image.numpy().tobytes(): 0 for image in images} for images in (pixels, digits.decode_all()))
    assert both.keys() == all_images.keys()
    again, _ = digits.hold_out(share)
    assert torch.equal(again.decode_all(), others.decode_all())
    assert others.contents()["left_out"] == {"image held out": count}
    assert "left out: 1 image held out" in others.describe() or f"{count:,} images held out" in others.describe()
    assert others.fingerprint() != digits.fingerprint()
    assert digits.contents()["left_out"] == {}


def test_a_share_of_an_npz_is_held_out(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (10, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", pixels)
    others, held_out = open_images(str(tmp_path / "images.npz")).hold_out(0.2)
    parts = [part.decode_all().permute(0, 2, 3, 1).numpy().tolist() for part in (others, held_out)]
    assert [len(part) for part in parts] == [8, 2]
    assert sorted(parts[0] + parts[1]) == sorted(pixels.tolist())


def test_what_is_held_out_is_like_the_rest_whatever_their_order(tmp_path):
    """Every tenth image is white: a stride of ten would hold out these, or none of them."""
    pixels = np.zeros((1000, 4, 4, 3), dtype=np.uint8)
    pixels[::10] = 255
    np.savez(tmp_path / "images.npz", pixels)
    others, held_out = open_images(str(tmp_path / "images.npz")).hold_out(0.1)
    assert 3 < (held_out.decode_all()[:, 0, 0, 0] == 255).sum() < 20
    assert (others.decode_all()[:, 0, 0, 0] == 255).sum() > 80


def test_of_one_image_none_can_be_held_out(tmp_path):
    np.savez(tmp_path / "images.npz", np.zeros((1, 8, 8, 3), dtype=np.uint8))
    with pytest.raises(ValueError, match="of one image none can be held out"):
        open_images(str(tmp_path / "images.npz")).hold_out(0.5)


def test_images_that_cannot_be_decoded_are_not_chosen(tmp_path):
    contents, pixels = contents_with_bad_ones(12, [2, 3, 11])
    dataset = open_contents(tmp_path, contents, on_bad_image="skip", resolution=8, image_mode="RGB")
    images, indices = dataset.random_sample(20)
    assert sorted(indices) == [0, 1, 4, 5, 6, 7, 8, 9, 10]
    assert torch.equal(images, pixels[indices])
    assert dataset.bad_images == [2, 3, 11]


# In a run

VALIDATION = ("--validation_split", 0.1, "--validation_steps", 8, "--max_train_steps", 20)


def tracked(folder):
    """{name: {step: value}} of what TensorBoard has."""
    events = EventAccumulator(str(next(folder.glob("logs/*")))).Reload()
    return {name: {event.step: event.value for event in events.Scalars(name)} for name in events.Tags()["scalars"]}


def validation_records(run):
    return [record for record in run.metrics if "validation_loss" in record]


def test_a_run_measures_it_at_intervals_and_at_its_end(train):
    run = train("run", *VALIDATION, "--logger", "tensorboard").wait()
    records = validation_records(run)
    assert [record["step"] for record in records] == [8, 16, 20]
    assert all(record["validation_loss"] > 0 for record in records)
    assert all(len(record["validation_loss_by_timestep"]) == 20 for record in records)
    assert "1,617 images of digits" in run.output
    assert "validation: 180 images of digits" in run.output
    assert (run.folder / "validation_loss.png").stat().st_size > 10_000
    assert "validation_loss.png" in (run.folder / "README.md").read_text()
    assert "validation" in json.loads((run.folder / "training_summary.json").read_text())["seconds"]

    # A resumed run goes on from the regular records alone
    assert tracked(run.folder)["validation_loss"] == {r["step"]: pytest.approx(r["validation_loss"]) for r in records}
    assert "validation_loss_by_timestep/000-049" in tracked(run.folder)
    longer = train("run", *VALIDATION, "--max_train_steps", 24, "--resume_from_checkpoint", "latest").wait()
    at_once = train("at_once", *VALIDATION, "--max_train_steps", 24).wait()
    assert longer.metrics == at_once.metrics
    assert [record["step"] for record in validation_records(longer)] == [8, 16, 24]


def test_it_changes_nothing_of_the_run_and_is_of_the_averaged_weights(train, tmp_path):
    folder = write_source("saved_splits", tmp_path, [encoded(pixels) for pixels in random_pixels(20)])
    data = ("--dataset_name", folder, "--max_train_steps", 12, "--logging_steps", 4)
    plain = train("plain", *data).wait()
    validated = train("validated", *data, "--validation_split", "test", "--validation_steps", 4).wait()
    records = [record for record in validated.metrics if "loss" in record]
    assert records == plain.metrics
    assert [record["step"] for record in validation_records(validated)] == [4, 8, 12]

    pipeline = DDPMPipeline.from_pretrained(validated.folder)
    images = open_images(str(folder), split="test")
    examples = ValidationLoss(images, torch.zeros(1, dtype=torch.long), T, 8, accelerator())
    loss, by_timestep = examples.measure(pipeline.unet, pipeline.scheduler)
    record = validation_records(validated)[-1]
    assert record["validation_loss"] == pytest.approx(loss, rel=1e-5)
    assert record["validation_loss_by_timestep"] == pytest.approx(by_timestep, rel=1e-4)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--validation_split", "0.1"), "--validation_split 0.1: needs --validation_steps too"),
        (("--validation_steps", "10"), "--validation_steps 10: needs --validation_split too"),
        (
            ("--validation_split", "1.5", "--validation_steps", "10"),
            "--validation_split 1.5: must be a share in (0, 1)",
        ),
        (
            ("--validation_split", "nan", "--validation_steps", "10"),
            "--validation_split nan: must be a share in (0, 1)",
        ),
        (("--validation_split", "0.1", "--validation_steps", "0"), "--validation_steps 0: must be in [1, 2**53]"),
    ],
)
def test_options_that_are_not_allowed(flags, message, capsys):
    from train_adaptive_ddpm import command_line

    with pytest.raises(SystemExit):
        command_line(list(flags))
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ("test", "--dataset_name digits has no split 'test', but ['train']"),
        ("train", "the split train is trained on: give another, or a share of it to hold out"),
        ("train[90%:]", "the split train is trained on"),
        ("all", "the split train is trained on"),
    ],
)
def test_a_split_that_cannot_be_validated_on_is_named(train, split, message):
    run = train("run", "--validation_split", split, "--validation_steps", 8).wait(1)
    last_line = run.output.splitlines()[-1]
    assert f"--validation_split {split}: {message}" in last_line
    assert not run.folder.exists()


def test_an_empty_split_is_refused():
    digits = open_images("digits")
    with pytest.raises(ValueError, match=r"--validation_split test\[5:5\]: holds no images"):
        divide(digits, "test[5:5]", lambda split: open_images("digits", split="train[5:5]", like=digits))


def test_another_split_is_read_as_the_images_to_train_on_are(tmp_path):
    """One of them is all below 1, as images between 0 and 1 are; it is dark all the same."""
    for split, level in (("train", 200.0), ("test", 1.0)):
        (tmp_path / split).mkdir()
        Image.fromarray(np.full((8, 8), level, dtype=np.float32)).save(tmp_path / split / "a.tiff")
    images = open_images(str(tmp_path))
    assert open_images(str(tmp_path), split="test").decode_all().max() == 255
    assert open_images(str(tmp_path), split="test", like=images).decode_all().max() == 1
