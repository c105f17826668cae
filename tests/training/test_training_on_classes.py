"""Training on labels: which the network sees, which are withheld, and what is refused."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY_UNET
from diffusers import DDPMScheduler, UNet2DModel
from PIL import Image

from samplers import NOISE_COUPLINGS
from training.denoiser import Denoiser
from training.network import build_network
from training.options import ClassOptions, ModelOptions
from training.plan import warn_of_class_dropout
from training.resuming import Start, check_same_classes
from training.step_random import StepRandom


def accelerator(rank=0, world_size=1):
    return SimpleNamespace(process_index=rank, num_processes=world_size, device=torch.device("cpu"))


class ShowLabels(torch.nn.Module):
    """Predicts the label, everywhere."""

    def forward(self, noisy_images, timesteps, return_dict, class_labels=None):
        labels = torch.zeros(len(noisy_images)) if class_labels is None else class_labels
        return (labels.view(-1, 1, 1, 1).expand(noisy_images.shape).float(),)


def errors_at_zero(denoiser, labels):
    zeros = torch.zeros(len(labels), 1, 4, 4)
    timesteps = torch.arange(len(labels))
    return denoiser.epsilon_errors(zeros, zeros, timesteps, labels)[:, 0, 0, 0].tolist()


def test_the_network_sees_the_labels_and_the_null_class_where_there_are_none():
    denoiser = Denoiser(ShowLabels(), DDPMScheduler(), null_label=3)
    assert errors_at_zero(denoiser, torch.tensor([2, 0, 3])) == [2, 0, 3]
    zeros = torch.zeros(2, 1, 4, 4)
    errors = denoiser.epsilon_errors(zeros, zeros, torch.zeros(2, dtype=torch.long))
    assert errors.unique().tolist() == [3]
    losses = denoiser.epsilon_losses(zeros, zeros, torch.zeros(2, dtype=torch.long), torch.tensor([1, 2]))
    assert losses.tolist() == [1, 4]


def test_a_network_without_classes_sees_none():
    assert errors_at_zero(Denoiser(ShowLabels(), DDPMScheduler()), torch.tensor([2, 1])) == [0, 0]


# Which labels are withheld


def dropped(step, count=4000, rank=0, world_size=1, class_dropout=0.25, seed=0):
    random = StepRandom(seed, accelerator(rank, world_size), class_dropout=class_dropout, null_label=10)
    random.begin(step)
    labels = torch.arange(count) % 10
    found = random.drop_labels(labels)
    assert torch.equal(found[found != 10], labels[found != 10])
    return found == 10


def test_as_often_as_asked_for():
    assert dropped(step=3).float().mean() == pytest.approx(0.25, abs=0.03)
    assert not dropped(step=3, class_dropout=0.0).any()
    assert dropped(step=3, class_dropout=1.0).all()


def test_by_the_seed_and_the_step_alone_on_any_number_of_processes():
    alone = dropped(step=5)
    assert torch.equal(dropped(step=5), alone)
    assert not torch.equal(dropped(step=6), alone)
    assert not torch.equal(dropped(step=5, seed=1), alone)
    ranks = [dropped(step=5, count=2000, rank=rank, world_size=2) for rank in (0, 1)]
    assert torch.equal(torch.stack(ranks, dim=1).flatten(), alone)


def test_the_noise_does_not_depend_on_it():
    noises = []
    for num_classes in (None, 10):
        random = StepRandom(0, accelerator(), null_label=num_classes, class_dropout=0.5)
        random.begin(1)
        random.flips(4)
        noises.append(random.noise(torch.zeros(4, 1, 2, 2), NOISE_COUPLINGS["antithetic"]))
        random.drop_labels(torch.zeros(4, dtype=torch.long))
    assert torch.equal(*noises)


# Networks and data


def test_the_network_has_a_null_class_beside_those_of_the_data():
    options = ModelOptions()
    options.unet.update(block_out_channels=[32], down_block_types=["DownBlock2D"], up_block_types=["UpBlock2D"])
    unet = build_network(options, channels=1, resolution=8, num_classes=10)
    assert unet.config.num_class_embeds == 11
    assert build_network(options, channels=1, resolution=8).config.num_class_embeds is None
    options.unet["num_class_embeds"] = 10
    with pytest.raises(ValueError, match="--unet num_class_embeds 10: the images decide that, which have 11"):
        build_network(options, channels=1, resolution=8, num_classes=10)


CLASSES = ("--class_conditional", "--dataset_name", "digits")


def test_a_run_that_is_killed_and_resumed_is_the_same(train):
    whole = train("whole", *CLASSES, "--max_train_steps", 12).wait()
    train("run", *CLASSES, "--max_train_steps", 6).wait()
    resumed = train("run", *CLASSES, "--max_train_steps", 12, "--resume_from_checkpoint", "latest").wait()
    assert resumed.metrics == whole.metrics
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert (resumed.folder / weights).read_bytes() == (whole.folder / weights).read_bytes()
    assert UNet2DModel.from_pretrained(whole.folder / "unet").config.num_class_embeds == 11


def test_a_network_of_another_kind_is_not_resumed(train):
    train("with", *CLASSES, "--max_train_steps", 1).wait()
    train("without", "--max_train_steps", 1).wait()
    found = train("without", *CLASSES, "--resume_from_checkpoint", "latest").wait(1).output.splitlines()[-1]
    assert "--class_conditional: the network in" in found
    assert "knows no classes" in found
    found = train("with", "--resume_from_checkpoint", "latest").wait(1).output.splitlines()[-1]
    assert "num_class_embeds was 11, now None" in found


@pytest.mark.parametrize(
    ("options", "is_warned_of"),
    [
        ({"class_dropout": 0.2}, True),
        ({"class_dropout": 0.0}, True),
        ({"class_dropout": 0.1}, False),
        ({}, False),
        ({"class_dropout": 0.2, "class_conditional": True}, False),
    ],
)
def test_a_share_of_withheld_labels_without_labels_is_warned_of(options, is_warned_of, caplog):
    warn_of_class_dropout(ClassOptions(**options))
    assert ("--class_dropout" in caplog.text and "--class_conditional" in caplog.text) == is_warned_of


def test_a_run_says_that_labels_cannot_be_withheld(train):
    run = train("run", "--class_dropout", 0.2, "--max_train_steps", 1).wait()
    assert "--class_dropout 0.2: has no effect without --class_conditional" in run.output


def test_data_without_labels_is_refused(train, tmp_path):
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "pictures" / "a.png")
    run = train("run", "--class_conditional", "--dataset_name", tmp_path / "pictures").wait(1)
    assert "--class_conditional: --dataset_name" in run.output.splitlines()[-1]
    assert "has no labels" in run.output.splitlines()[-1]
    assert not run.folder.exists()


def test_what_it_leaves_is_loaded_by_diffusers_where_this_project_is_not(train, tmp_path):
    run = train("run", *CLASSES, "--max_train_steps", 2, "--eval_batch_size", 20, "--ddpm_num_steps", 20).wait()
    source = (
        "from diffusers import DiffusionPipeline as P; "
        f"p = P.from_pretrained({str(run.folder)!r}, custom_pipeline={str(run.folder)!r}, trust_remote_code=True); "
        "p.set_progress_bar_config(disable=True); "
        "print(p(class_labels=[3, '7'], guidance_scale=1.5, num_inference_steps=2).images[1].size)"
    )
    command = [sys.executable, "-I", "-c", source]
    assert subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout == "(8, 8)\n"
    card = (run.folder / "README.md").read_text()
    assert "A class-conditional diffusion model" in card
    assert "Classes: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9." in card
    assert "pipeline.py" in (run.folder / ".written_files").read_text().split()
    picture = Image.open(run.folder / "samples" / "final.png")
    assert picture.width > 4 * picture.height  # ten columns, a class each, and two rows


def write_classes(folder, counts, seed=0):
    """{class: number of images} as class folders."""
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = np.random.default_rng([seed, i, *name.encode()]).integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return ("--class_conditional", "--dataset_name", folder, "--max_train_steps", 2)


def test_a_class_without_an_image_to_train_on_is_refused(train, tmp_path):
    flags = write_classes(tmp_path / "data", {"cat": 20, "dog": 1})
    train("fine", *flags, "--dry_run").wait()
    run = train("run", *flags, "--validation_split", 0.99, "--validation_steps", 1).wait(1)
    assert "--class_conditional: there is no image of class 'dog' to train on" in run.output.splitlines()[-1]
    assert not run.folder.exists()


def test_a_run_does_not_go_on_with_other_classes(train, tmp_path):
    train("run", *write_classes(tmp_path / "first", {"cat": 4, "dog": 4})).wait()
    for name, counts, message in (
        ("second", {"dog": 4, "fox": 4}, "is of the classes cat, dog; now they are dog, fox"),
        ("third", {"cat": 4, "dog": 4, "fox": 4}, "is of the classes cat, dog; now they are cat, dog, fox"),
    ):
        flags = write_classes(tmp_path / name, counts)
        found = train("run", *flags, "--max_train_steps", 4, "--resume_from_checkpoint", "latest").wait(1)
        assert message in found.output.splitlines()[-1]


def test_a_run_does_not_go_on_with_other_labels():
    start = Start(Path("c"), {"data": {"fingerprint": "8-a", "classes": ["cat", "dog"], "labels": "1"}})
    identity = {"images": 8, "fingerprint": "8-a", "classes": ["cat", "dog"], "labels": "2"}
    with pytest.raises(ValueError, match="--resume_from_checkpoint c: the images had other labels then"):
        check_same_classes(ClassOptions(class_conditional=True), identity, start)
    check_same_classes(ClassOptions(class_conditional=True), {**identity, "fingerprint": "9-b"}, start)  # it has grown
    check_same_classes(ClassOptions(), identity, start)


@pytest.mark.parametrize(
    ("unet", "message"),
    [
        ({"class_embed_type": "timestep"}, "--unet class_embed_type timestep: only plain class labels are known"),
        ({"num_class_embeds": 7}, "--unet num_class_embeds 7: the images decide that, which have 11"),
    ],
)
def test_a_network_that_cannot_know_these_classes_is_refused(train, unet, message):
    run = train("run", *CLASSES, unet={**TINY_UNET, **unet}).wait(1)
    assert message in run.output.splitlines()[-1]
    assert not run.folder.exists()
