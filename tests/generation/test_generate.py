"""generate.py from the outside: what it writes and refuses, and that a killed run ends with the same files."""

import errno
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    LDMPipeline,
    UNet2DModel,
    VQModel,
)
from PIL import Image
from pyarrow.parquet import read_table

import generate
from pipelines import UnconditionalPipeline

FORMATS = ("png", "npz", "parquet")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Bits are promised for equal numbers of threads; and tiny networks are faster on one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def tiny_unet(channels=1, seed=0):
    torch.manual_seed(seed)
    return UNet2DModel(
        sample_size=8,
        in_channels=channels,
        out_channels=channels,
        layers_per_block=1,
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
    ).eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder as training saves it: grey 8x8 images, 20 trained steps."""
    folder = tmp_path_factory.mktemp("pipeline")
    DDPMPipeline(unet=tiny_unet(), scheduler=DDPMScheduler(num_train_timesteps=20)).save_pretrained(folder)
    return folder


def flags(saved, folder, **options):
    """The command line; 10 images in blocks of 4 unless told otherwise."""
    options = {"pipeline": saved, "num_images": 10, "batch_size": 4, "num_inference_steps": 4} | options
    line = ["--output_dir", str(folder)]
    for name, value in options.items():
        line += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return line


def run(saved, folder, **options):
    generate.main(flags(saved, folder, **options))
    return folder


def contents(folder):
    """Name -> bytes of all files but the record, which holds times."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "generation.json"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def record(folder):
    return json.loads((folder / "generation.json").read_text())


def read_images(folder, fmt):
    """uint8 NHWC, through other readers than generate.py's."""
    if fmt == "npz":
        with np.load(folder / "images.npz") as arrays:
            assert arrays.files == ["arr_0"]
            return arrays["arr_0"]
    if fmt == "png":
        pictures = [Image.open(path) for path in sorted((folder / "images").iterdir())]
    else:
        cells = [c for path in sorted((folder / "images").iterdir()) for c in read_table(path)["image"].to_pylist()]
        pictures = [Image.open(io.BytesIO(cell["bytes"])) for cell in cells]
    return np.stack([np.array(picture).reshape(*picture.size[::-1], -1) for picture in pictures])


# What it writes


@pytest.mark.parametrize("fmt", FORMATS)
def test_formats_hold_what_the_pipeline_samples(saved, tmp_path, fmt):
    folder = run(saved, tmp_path, format=fmt, seed=7)
    pipeline = UnconditionalPipeline.from_pretrained(saved)
    blocks = [pipeline.sample(range(i, i + 4), seed=7, num_inference_steps=4) for i in (0, 4, 8)]
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
    pipeline = DDPMPipeline(unet=tiny_unet(channels=3), scheduler=DDPMScheduler(num_train_timesteps=20))
    pipeline.save_pretrained(tmp_path / "rgb")
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


def test_default_steps(saved, tmp_path):
    for sampler, trained, steps in (("ddpm", 20, 20), ("ddim", 20, 20), ("ddim", 150, 100)):
        pipeline = tmp_path / f"pipeline{trained}"
        scheduler = DDPMScheduler(num_train_timesteps=trained)
        DDPMPipeline(unet=tiny_unet(), scheduler=scheduler).save_pretrained(pipeline)
        out = tmp_path / f"{sampler}{trained}"
        options = f"--num_images 1 --batch_size 1 --sampler {sampler}".split()
        generate.main(["--pipeline", str(pipeline), "--output_dir", str(out), *options])
        assert record(out)["settings"]["num_inference_steps"] == steps


def test_either_sampler_from_either_scheduler(saved, tmp_path):
    ddim = DDIMScheduler(num_train_timesteps=20)
    DDPMPipeline(unet=tiny_unet(), scheduler=ddim).save_pretrained(tmp_path / "ddim")
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


def test_the_network_always_sees_whole_batches(saved, tmp_path, monkeypatch):
    """Else the last images would round differently, and change when num_images is raised."""
    batches, sample = [], UnconditionalPipeline.sample

    def spy(self, indices, *rest):
        batches.append(indices)
        return sample(self, indices, *rest)

    monkeypatch.setattr(UnconditionalPipeline, "sample", spy)
    run(saved, tmp_path)
    assert batches == [range(0, 4), range(4, 8), range(8, 12)]


# Interrupted and extended runs


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("renames", range(5))
def test_a_run_that_dies_in_a_write_resumes_to_the_same_files(saved, tmp_path, monkeypatch, fmt, renames):
    """Die at the n-th rename, leaving half a file behind: of the record, an image, a shard, the merge."""
    expected = contents(run(saved, tmp_path / "whole", format=fmt))
    folder, replace, left = tmp_path / "broken", os.replace, [renames]

    def dying(source, target):
        left[0] -= 1
        if left[0] < 0:
            os.truncate(source, os.path.getsize(source) // 2)
            raise OSError(errno.EIO, "died")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(generate.os, "replace", dying)
        with pytest.raises(SystemExit, match="died"):
            run(saved, folder, format=fmt)
    assert contents(folder) != expected
    assert contents(run(saved, folder, format=fmt)) == expected
    assert record(folder)["status"] == "complete"


def test_a_killed_process_resumes_to_the_same_files(saved, tmp_path):
    options = {"num_images": 1200, "num_inference_steps": 1, "grid_images": 4}
    folder = tmp_path / "killed"
    script = [sys.executable, generate.__file__]
    process = subprocess.Popen([*script, *flags(saved, folder, **options)], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (folder / "images" / "000040.png").exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    left = {name: data for name, data in contents(folder).items() if name.endswith(".png")}
    assert 40 < len(left) < 1200
    assert record(folder)["status"] == "running"

    run(saved, folder, **options)
    assert record(folder)["new_images"] <= 1200 - len(left) + 4 * 50  # it did go on
    whole = contents(run(saved, tmp_path / "whole", **options))
    assert whole == contents(folder)
    assert left.items() <= whole.items()


@pytest.mark.parametrize("fmt", FORMATS)
def test_more_images_extend_the_folder(saved, tmp_path, fmt):
    expected = contents(run(saved, tmp_path / "ten", format=fmt))
    folder = run(saved, tmp_path / "six", format=fmt, num_images=6)
    assert contents(run(saved, folder, format=fmt)) == expected
    assert record(folder)["new_images"] == 6  # the last block, half of which was there, and a new one


def test_what_a_kill_left_of_a_block_that_has_since_grown_is_deleted(saved, tmp_path):
    folder = run(saved, tmp_path / "nine", format="parquet", num_images=9)
    (folder / "images" / "000008-000008.parquet.tmp").write_bytes(b"half")
    run(saved, folder, format="parquet")
    assert contents(folder) == contents(run(saved, tmp_path / "ten", format="parquet"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_in_one_line(saved, tmp_path, number):
    options = {"num_images": 100_000, "num_inference_steps": 1}
    command = [sys.executable, generate.__file__, *flags(saved, tmp_path / "out", **options)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (tmp_path / "out" / "images" / "000040.png").exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(number)
    output = process.communicate(timeout=30)[1]
    assert process.returncode == 128 + number
    assert "Traceback" not in output
    written = len([name for name in contents(tmp_path / "out") if name.endswith(".png")])
    line = re.search(r"stopped by (\w+): (\d+) of 100000 images are in .*; the same command goes on$", output)
    assert line[1] == number.name
    assert 0 <= written - int(line[2]) < 4  # whole blocks are counted


def test_a_complete_folder_is_left_alone(saved, tmp_path):
    folder = run(saved, tmp_path)
    before, known = contents(folder), record(folder)
    times = {path: path.stat().st_mtime_ns for path in (folder / "images").iterdir()}
    run(saved, folder)
    assert contents(folder) == before
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert record(folder) == known  # the speed of the run that made the images


def launch(*line):
    """generate.py by two processes on the CPU, as its docstring has it."""
    root = Path(generate.__file__).parent
    launcher = f"--config_file {root}/accelerate_configs/cpu.yaml --num_processes 2 --main_process_port 0"
    command = [sys.executable, "-m", "accelerate.commands.launch", *launcher.split(), generate.__file__, *line]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_two_processes_write_the_same_files(saved, tmp_path):
    expected = contents(run(saved, tmp_path / "one", num_images=19))
    process = launch(*flags(saved, tmp_path / "two", num_images=19))
    assert process.returncode == 0, process.stderr
    assert contents(tmp_path / "two") == expected
    assert record(tmp_path / "two")["num_processes"] == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [({"num_images": 0}, "--num_images 0 must be in [1, "), ({"output_dir": __file__}, "is a file")],
)
def test_two_processes_exit_with_one_message(saved, tmp_path, options, message):
    process = launch(*flags(saved, tmp_path / "out", **options))
    assert process.returncode == 1
    assert process.stderr.count("generate.py: error: ") == process.stderr.count(message) == 1


# Refusals


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"num_images": 0}, r"--num_images 0 must be in \[1, 4294967296\)"),
        ({"num_images": 2**32}, r"--num_images 4294967296 must be in \[1, 4294967296\)"),
        ({"num_images": "nan"}, "--num_images.* invalid int value: 'nan'"),
        (
            {"num_images": 2**32 - 2, "batch_size": 4},
            "--num_images 4294967294 and --batch_size 4 must add up to 4294967296",
        ),
        ({"batch_size": -4}, r"--batch_size -4 must be in \[1, 4294967296\)"),
        ({"grid_images": -1}, r"--grid_images -1 must be in \[0, 10001\)"),
        ({"grid_images": 10**9}, r"--grid_images 1000000000 must be in \[0, 10001\)"),
        ({"seed": -1}, r"--seed -1 must be in \[0, 4294967296\)"),
        ({"seed": 2**32}, r"--seed 4294967296 must be in \[0, 4294967296\)"),
        ({"num_inference_steps": 0}, r"--num_inference_steps 0 must be in \[1, 20\]"),
        ({"num_inference_steps": 21}, r"--num_inference_steps 21 must be in \[1, 20\]"),
        *(({"eta": eta, "sampler": "ddim"}, rf"--eta {eta} must be in \[0, 1\]") for eta in ("nan", "inf", "-0.5")),
        ({"eta": 0.5}, "--eta 0.5 belongs to --sampler ddim"),
        ({"eta": 2, "sampler": "ddim"}, r"--eta 2.0 must be in \[0, 1\]"),
        ({"mixed_precision": "fp16"}, "--mixed_precision fp16 needs a GPU"),
        ({"pipeline": "./nowhere"}, "--pipeline ./nowhere: no such folder"),
        ({"pipeline": tempfile.gettempdir()}, "--pipeline .*/model_index.json: "),
    ],
)
def test_bad_options_are_refused_before_weights_are_read(saved, tmp_path, monkeypatch, capsys, options, match):
    monkeypatch.setattr(UnconditionalPipeline, "from_pretrained", None)
    with pytest.raises(SystemExit) as error:
        run(saved, tmp_path / "out", **options)
    assert re.search(match, f"{error.value} {capsys.readouterr().err}")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"batch_size": 10**7}, r"--batch_size 10000000 needs 2\.6 GB of memory, of which 1\.0 are available"),
        ({"num_images": 10**8}, r"--num_images 100000000 needs 5\.0 GB of memory, of which 1\.0 are available"),
    ],
)
def test_a_typing_error_does_not_exhaust_the_memory(saved, tmp_path, monkeypatch, options, match):
    monkeypatch.setattr(generate.psutil, "virtual_memory", lambda: SimpleNamespace(available=10**9))
    with pytest.raises(SystemExit, match=match):
        run(saved, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_required_options_may_come_from_a_recipe(saved, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        generate.main(["--output_dir", str(tmp_path / "out")])
    assert "--pipeline is required" in capsys.readouterr().err
    (tmp_path / "recipe.yaml").write_text(f"pipeline: {saved}\nnum_images: 6\nbatch_size: 4\nsampler: ddim\n")
    flags = ["--config", "recipe.yaml", "--output_dir", "out", "--num_images", "5", "--num_inference_steps", "2"]
    monkeypatch.chdir(tmp_path)
    generate.main(flags)
    settings = record(tmp_path / "out")["settings"]
    assert (settings["sampler"], settings["batch_size"]) == ("ddim", 4)
    assert len(read_images(tmp_path / "out", "png")) == 5


def test_a_pipeline_without_weights_is_refused_in_one_line(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "pipeline", ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(SystemExit, match=r"error: .*diffusion_pytorch_model"):
        run(tmp_path / "pipeline", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("model_index.json", "[1]"),
        ("unet/config.json", "[1]"),
        ("scheduler/scheduler_config.json", "{"),
        ("unet/diffusion_pytorch_model.safetensors", ""),
    ],
)
def test_a_broken_pipeline_is_refused_by_its_option_before_anything_is_written(saved, tmp_path, name, content):
    shutil.copytree(saved, tmp_path / "pipeline")
    (tmp_path / "pipeline" / name).write_text(content)
    with pytest.raises(SystemExit, match=rf"error: --pipeline {tmp_path}/pipeline.*\Z"):
        run(tmp_path / "pipeline", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weights_of_a_variant(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "pipeline")
    unet = tmp_path / "pipeline" / "unet"
    (unet / "diffusion_pytorch_model.safetensors").rename(unet / "diffusion_pytorch_model.fp16.safetensors")
    with pytest.raises(SystemExit, match=r"error: --pipeline .* has no weights .* --variant fp16\Z"):
        run(tmp_path / "pipeline", tmp_path / "out")
    folder = run(tmp_path / "pipeline", tmp_path / "out", variant="fp16")
    assert contents(folder) == contents(run(saved, tmp_path / "plain"))


def test_unknown_options_and_choices_are_refused(saved, tmp_path, capsys):
    for options, message in (({"step": 3}, "--step"), ({"sampler": "euler"}, "invalid choice: 'euler'")):
        with pytest.raises(SystemExit):
            run(saved, tmp_path / "out", **options)
        assert message in capsys.readouterr().err


def test_other_pipelines_are_refused_by_what_they_are(tmp_path):
    pipeline = LDMPipeline(vqvae=VQModel(block_out_channels=(32,)), unet=tiny_unet(3), scheduler=DDIMScheduler())
    pipeline.save_pretrained(tmp_path / "ldm")
    with pytest.raises(
        SystemExit, match=r"is a LDMPipeline of scheduler=DDIMScheduler, unet=UNet2DModel, vqvae=VQModel"
    ):
        run(tmp_path / "ldm", tmp_path / "out")
    AutoencoderKL(block_out_channels=(32,)).save_pretrained(tmp_path / "vae")
    with pytest.raises(SystemExit, match=r"model_index.json"):
        run(tmp_path / "vae", tmp_path / "out")
    DDPMPipeline(unet=tiny_unet(4), scheduler=DDPMScheduler()).save_pretrained(tmp_path / "four")
    with pytest.raises(SystemExit, match="makes 4 channels"):
        run(tmp_path / "four", tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"seed": 1}, "seed was 0, now 1"),
        ({"num_images": 6}, "num_images was 10, now 6"),
        ({"batch_size": 5}, "batch_size was 4, now 5"),
        ({"num_inference_steps": 5}, "num_inference_steps was 4, now 5"),
        ({"sampler": "ddim"}, "sampler was 'ddpm', now 'ddim'"),
        ({"format": "npz"}, "format was 'png', now 'npz'"),
    ],
)
def test_other_settings_are_refused_by_name(saved, tmp_path, options, match):
    folder = run(saved, tmp_path / "out")
    before = contents(folder)
    with pytest.raises(SystemExit, match=match):
        run(saved, folder, **options)
    assert contents(folder) == before
    foreign = {"notes.txt": b"mine", "images/notes.txt": b"mine"}
    for name, data in foreign.items():
        (folder / name).write_bytes(data)
    run(saved, folder, overwrite_output_dir=True, **options)
    assert contents(folder) == contents(run(saved, tmp_path / "fresh", **options)) | foreign


def test_other_weights_are_refused(saved, tmp_path):
    scheduler = DDPMScheduler(num_train_timesteps=20)
    for seed in (1, 2):
        DDPMPipeline(unet=tiny_unet(seed=seed), scheduler=scheduler).save_pretrained(tmp_path / "pipeline")
        if seed == 1:
            run(tmp_path / "pipeline", tmp_path / "out")
    with pytest.raises(SystemExit, match="weights was"):
        run(tmp_path / "pipeline", tmp_path / "out")


def test_foreign_folders_are_left_alone(saved, tmp_path):
    (tmp_path / "photo.png").write_bytes(b"mine")
    with pytest.raises(SystemExit, match=r"is not empty \(photo.png"):
        run(saved, tmp_path)
    run(saved, tmp_path, overwrite_output_dir=True)
    assert (tmp_path / "photo.png").read_bytes() == b"mine"

    other = tmp_path / "other"
    (other / "images").mkdir(parents=True)
    (other / "images" / "photo.png").write_bytes(b"mine")
    with pytest.raises(SystemExit, match=r"has images, which generate.py did not write"):
        run(saved, other, overwrite_output_dir=True)
    assert contents(other) == {"images/photo.png": b"mine"}
    with pytest.raises(SystemExit, match="is a file"):
        run(saved, tmp_path / "photo.png")


FOREIGN = {
    "png": ("images/999999.png", "images/000010.png", "images/0.png", "images.npz", "images/000001.npz.tmp"),
    "npz": ("images/000000-000099.npz", "images/000000.png", "images/000000-000003.parquet"),
    "parquet": ("images/000008-000011.parquet", "images.npz", "images/000000-000003.npz"),
}


@pytest.mark.parametrize("fmt", FORMATS)
def test_overwriting_deletes_only_what_the_record_names(saved, tmp_path, fmt):
    folder = run(saved, tmp_path / "out", format=fmt)
    foreign = {name: b"mine" for name in FOREIGN[fmt]}
    (folder / "images").mkdir(exist_ok=True)
    for name, data in foreign.items():
        (folder / name).write_bytes(data)
    run(saved, folder, format=fmt, seed=1, overwrite_output_dir=True)
    assert contents(folder) == contents(run(saved, tmp_path / "fresh", format=fmt, seed=1)) | foreign


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("images/000011.png", {"num_images": 12}),
        ("images/000011.png.tmp", {"num_images": 12}),
        ("images/000012.png", {"num_images": 16, "seed": 1, "overwrite_output_dir": True}),
        ("images.npz", {"format": "npz", "overwrite_output_dir": True}),
        ("images/000008-000009.parquet", {"format": "parquet", "overwrite_output_dir": True}),
        ("grid.png", {"grid_images": 4}),
    ],
)
def test_foreign_files_are_not_written_over(saved, tmp_path, name, options):
    folder = run(saved, tmp_path / "out", grid_images=0)
    (folder / name).write_bytes(b"mine")
    before, known = contents(folder), record(folder)
    with pytest.raises(SystemExit, match=f"has {name}, which generate.py did not write"):
        run(saved, folder, **{"grid_images": 0} | options)
    assert (contents(folder), record(folder)) == (before, known)


def test_a_folder_in_the_place_of_an_image_is_not_deleted(saved, tmp_path):
    folder = run(saved, tmp_path / "out")
    (folder / "images" / "000003.png").unlink()
    (folder / "images" / "000003.png").mkdir()
    with pytest.raises(SystemExit, match=r"has images/000003\.png, which generate\.py did not write"):
        run(saved, folder, seed=1, overwrite_output_dir=True)
    assert len(contents(folder)) == 10  # nine images and the grid


def test_the_grid_is_ours_only_if_we_drew_it(saved, tmp_path):
    folder = run(saved, tmp_path / "out", grid_images=0)
    (folder / "grid.png").write_bytes(b"mine")
    run(saved, folder, grid_images=0, num_images=12)
    assert (folder / "grid.png").read_bytes() == b"mine"
    (folder / "grid.png").unlink()
    run(saved, folder, num_images=12)
    run(saved, folder, num_images=12, grid_images=0)
    assert not (folder / "grid.png").exists()


def test_links_are_not_followed(saved, tmp_path):
    folder = run(saved, tmp_path / "out")
    (tmp_path / "mine").write_bytes(b"mine")
    for name in ("images/000002.png", "images/000003.png.tmp", "grid.png.tmp", "generation.json.tmp"):
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(tmp_path / "mine")
    run(saved, folder, seed=1, overwrite_output_dir=True)
    assert contents(folder) == contents(run(saved, tmp_path / "fresh", seed=1))
    assert (tmp_path / "mine").read_bytes() == b"mine"

    (folder / "images").rename(tmp_path / "elsewhere")
    (folder / "images").symlink_to(tmp_path / "elsewhere")
    before = contents(tmp_path / "elsewhere")
    with pytest.raises(SystemExit, match=r"--overwrite_output_dir: .*/images is a link"):
        run(saved, folder, seed=2, overwrite_output_dir=True)
    assert contents(tmp_path / "elsewhere") == before
    run(saved, folder, seed=1)  # going on is as good there as anywhere


@pytest.mark.parametrize("fmt", FORMATS)
def test_a_kill_while_overwriting_leaves_a_folder_that_is_ours(saved, tmp_path, monkeypatch, fmt):
    folder = run(saved, tmp_path / "out", format=fmt)
    unlink = generate.Path.unlink

    def die(path, **options):
        if path.suffix != ".tmp":
            raise KeyboardInterrupt
        unlink(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(generate.Path, "unlink", die)
        with pytest.raises(KeyboardInterrupt):
            run(saved, folder, format=fmt, seed=1, overwrite_output_dir=True)
    assert (record(folder)["status"], record(folder)["settings"]["seed"]) == ("running", 0)
    run(saved, folder, format=fmt, seed=1, overwrite_output_dir=True)
    assert contents(folder) == contents(run(saved, tmp_path / "fresh", format=fmt, seed=1))


@pytest.mark.parametrize("settings", [[], {}, {"format": "gif", "batch_size": 4}, {"format": "png", "batch_size": "4"}])
def test_a_broken_record_is_named(saved, tmp_path, settings):
    folder = run(saved, tmp_path)
    (folder / "generation.json").write_text(json.dumps(record(folder) | {"settings": settings}))
    with pytest.raises(SystemExit, match=r"generation\.json is broken"):
        run(saved, folder)


def test_the_same_command_with_overwrite_resumes(saved, tmp_path):
    """Equal settings make equal images: there is nothing to throw away."""
    folder = run(saved, tmp_path, overwrite_output_dir=True)
    (folder / "images" / "000005.png").unlink()
    run(saved, folder, overwrite_output_dir=True)
    assert record(folder)["new_images"] == 4


def test_a_full_disk_ends_the_run_with_a_message(saved, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(SystemExit, match=r"cannot write .*\.png: .*No space left on device"):
        run(saved, tmp_path)


def overflowing(saved, folder):
    """A pipeline whose weights are finite, and whose arithmetic is not."""
    pipeline = DDPMPipeline.from_pretrained(saved)
    pipeline.unet.conv_in.bias.data.fill_(3e38)  # finite itself; its square is not
    pipeline.save_pretrained(folder)
    return folder


def test_images_that_are_not_finite_end_the_run_in_one_line(saved, tmp_path):
    pipeline = overflowing(saved, tmp_path / "pipeline")
    message = r"error: 4 of 4 images are not finite .* number 0; the network's weights are: its arithmetic overflows\Z"
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

    with generate.Writer(limit=3, threads=1) as writer:
        for i in range(8):
            writer.submit(tmp_path / f"{i}", slow)
            assert i + 1 - len(written) <= 5  # three that wait, one at work, one just done
    assert sorted(os.listdir(tmp_path)) == [str(i) for i in range(8)]
