"""generate.py from the outside: what it writes, by one process and by two."""

import errno
import io
import json
import os
import shutil
import subprocess
import time

import datasets
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler
from generation_helpers import FORMATS, contents, flags, launch, read_images, record, run
from PIL import Image
from tiny_networks import tiny_pipeline

import generate
from generation.writing import Writer
from pipelines import load_pipeline, sample_images

pytest_plugins = ["generation_fixtures"]
pytestmark = pytest.mark.usefixtures("one_thread", "on_cpu")


@pytest.mark.parametrize("fmt", FORMATS)
def test_formats_hold_what_the_pipeline_samples(saved, tmp_path, fmt):
    folder = run(saved, tmp_path, format=fmt, seed=7)
    pipeline = load_pipeline(str(saved))
    blocks = [sample_images(pipeline, range(i, i + 4), seed=7, num_inference_steps=4) for i in (0, 4, 8)]
    expected = torch.cat(blocks)[:10].permute(0, 2, 3, 1).numpy()
    images = read_images(folder, fmt)
    assert images.dtype == np.uint8
    assert np.array_equal(images, expected)
    files = {
        "png": [f"images/{i:06d}.png" for i in range(10)],
        "npz": ["images.npz"],
        "parquet": [f"images/{name}.parquet" for name in ("000000-000003", "000004-000007", "000008-000009")],
    }
    assert sorted(contents(folder)) == ["grid.png", *files[fmt]]
    assert (folder / "images").exists() == (fmt != "npz")
    assert Image.open(folder / "grid.png").size == (4 * 66 + 2, 3 * 66 + 2)


def test_npz_is_what_numpy_would_save(saved, tmp_path):
    folder = run(saved, tmp_path, format="npz")
    plain = io.BytesIO()
    np.savez(plain, read_images(folder, "npz"))
    assert (folder / "images.npz").read_bytes() == plain.getvalue()


@pytest.mark.parametrize("fmt", ["png", "parquet"])
def test_the_folder_of_images_loads_as_a_dataset(saved, tmp_path, fmt):
    folder = run(saved, tmp_path / "out", format=fmt)
    rows = datasets.load_dataset(str(folder / "images"), split="train", cache_dir=str(tmp_path / "cache"))
    assert len(rows) == 10  # and not the grid
    assert np.array_equal([np.array(image)[..., None] for image in rows["image"]], read_images(folder, fmt))


def test_colour_images(tmp_path):
    tiny_pipeline(channels=3).save_pretrained(tmp_path / "rgb")
    for fmt in FORMATS:
        folder = run(tmp_path / "rgb", tmp_path / fmt, format=fmt, num_images=5)
        assert read_images(folder, fmt).shape == (5, 8, 8, 3)
        assert Image.open(folder / "grid.png").mode == "RGB"


def test_record_tells_how_the_images_were_made(saved, tmp_path):
    found = record(run(saved, tmp_path, sampler="ddim", eta=0.5, skip_schedule="quadratic", seed=3))
    settings = found["settings"]
    assert (found["status"], found["num_images"], found["new_images"]) == ("complete", 10, 10)
    assert found["images_per_second"] > 0
    assert found["versions"]["torch"] == torch.__version__
    assert (settings["sampler"], settings["eta"], settings["seed"]) == ("ddim", 0.5, 3)
    assert (settings["num_inference_steps"], settings["skip_schedule"]) == (4, "quadratic")
    assert settings["scheduler"]["class"] == "DDIMScheduler"
    assert settings["scheduler"]["num_train_timesteps"] == 20
    assert settings["pipeline"] == str(saved)


def test_images_by_ddims_earlier_steps_are_not_mixed_with_todays(saved, tmp_path):
    folder = run(saved, tmp_path, sampler="ddim")
    found = record(folder)
    assert found["settings"].pop("use_clipped_model_output")
    (folder / "generation.json").write_text(json.dumps(found))
    with pytest.raises(SystemExit, match="use_clipped_model_output was None, now True"):
        run(saved, tmp_path, sampler="ddim")
    assert "use_clipped_model_output" not in record(run(saved, tmp_path / "ddpm"))["settings"]


def test_default_steps(saved, tmp_path):
    for sampler, trained, steps in (("ddpm", 20, 20), ("ddim", 20, 20), ("ddim", 150, 100)):
        pipeline = tmp_path / f"pipeline{trained}"
        tiny_pipeline(DDPMScheduler(num_train_timesteps=trained)).save_pretrained(pipeline)
        out = tmp_path / f"{sampler}{trained}"
        options = f"--num_images 1 --batch_size 1 --sampler {sampler}".split()
        generate.main(["--pipeline", str(pipeline), "--output_dir", str(out), *options])
        assert record(out)["settings"]["num_inference_steps"] == steps


def test_either_sampler_from_either_scheduler(saved, tmp_path):
    tiny_pipeline(DDIMScheduler(num_train_timesteps=20)).save_pretrained(tmp_path / "ddim")
    for sampler in ("ddpm", "ddim"):
        a = run(saved, tmp_path / f"a-{sampler}", sampler=sampler)
        b = run(tmp_path / "ddim", tmp_path / f"b-{sampler}", sampler=sampler)
        assert contents(a) == contents(b)
    assert contents(tmp_path / "a-ddpm") != contents(tmp_path / "a-ddim")


def test_bf16_and_no_grid(saved, tmp_path):
    folder = run(saved, tmp_path / "bf16", mixed_precision="bf16", grid_images=0)
    assert "grid.png" not in contents(folder)
    difference = read_images(folder, "png").astype(int) - read_images(run(saved, tmp_path / "no"), "png")
    assert 0 < np.abs(difference).max() < 60  # another precision, the same images


def test_weights_of_a_variant(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "pipeline")
    unet = tmp_path / "pipeline" / "unet"
    (unet / "diffusion_pytorch_model.safetensors").rename(unet / "diffusion_pytorch_model.fp16.safetensors")
    with pytest.raises(SystemExit, match=r"error: --pipeline .* has no weights .* --variant fp16\Z"):
        run(tmp_path / "pipeline", tmp_path / "out")
    folder = run(tmp_path / "pipeline", tmp_path / "out", variant="fp16")
    assert contents(folder) == contents(run(saved, tmp_path / "plain"))


def test_the_network_always_sees_whole_batches(saved, tmp_path, monkeypatch):
    """Else the last images would round differently, and change when num_images is raised."""
    batches = []

    def spy(pipeline, indices, *rest):
        batches.append(indices)
        return sample_images(pipeline, indices, *rest)

    monkeypatch.setattr(generate, "sample_images", spy)
    run(saved, tmp_path)
    assert batches == [range(0, 4), range(4, 8), range(8, 12)]


def test_two_processes_write_the_same_files(saved, tmp_path):
    expected = contents(run(saved, tmp_path / "one", num_images=19))
    process = launch(*flags(saved, tmp_path / "two", num_images=19), run=subprocess.run)
    assert process.returncode == 0, process.stderr
    assert contents(tmp_path / "two") == expected
    assert record(tmp_path / "two")["num_processes"] == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [({"num_images": 0}, "--num_images 0: must be in [1, "), ({"output_dir": __file__}, "is a file")],
)
def test_two_processes_exit_with_one_message(saved, tmp_path, options, message):
    process = launch(*flags(saved, tmp_path / "out", **options))
    assert process.returncode == 1
    assert process.stderr.count("generate.py: error: ") == process.stderr.count(message) == 1


def test_a_full_disk_ends_the_run_with_a_message(saved, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(
        SystemExit,
        match=r"\.png could not be saved \(.* MB are free\): .*No space left on device.*the same command goes on",
    ):
        run(saved, tmp_path)


def overflowing(saved, folder):
    """A pipeline whose weights are finite, and whose arithmetic is not."""
    pipeline = DDPMPipeline.from_pretrained(saved)
    pipeline.unet.conv_in.bias.data.fill_(3e38)  # finite itself; its square is not
    pipeline.save_pretrained(folder)
    return folder


def test_images_that_are_not_finite_end_the_run_in_one_line(saved, tmp_path):
    pipeline = overflowing(saved, tmp_path / "pipeline")
    message = r"error: 4 of 4 images are not finite .* number 0; the weights of its UNet2DModel are: .* overflows\Z"
    with pytest.raises(SystemExit, match=message):
        run(pipeline, tmp_path / "out")
    assert contents(tmp_path / "out") == {}
    process = launch(*flags(pipeline, tmp_path / "two"))
    assert process.returncode == 1
    assert "generate.py: error: 4 of 4 images are not finite" in process.stderr
    assert 'generate.py", line' not in process.stderr  # no traceback of ours; the launcher has its own
    assert contents(tmp_path / "two") == {}


def test_the_writer_waits_for_a_slow_disk(tmp_path):
    written = []

    def slow(file):
        time.sleep(0.02)
        written.append(file.name)

    with Writer(limit=3, threads=1) as writer:
        for i in range(8):
            writer.submit(tmp_path / f"{i}", slow)
            assert i + 1 - len(written) <= 5  # three that wait, one at work, one just done
    assert sorted(os.listdir(tmp_path)) == [str(i) for i in range(8)]
