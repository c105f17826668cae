"""generate.py's refusals of options and pipelines, in one line, before anything is written."""

import re
import shutil
import tempfile
from types import SimpleNamespace

import psutil
import pytest
from diffusers import AutoencoderKL, DDIMScheduler, LDMPipeline, VQModel
from generation_helpers import read_images, record, run
from tiny_networks import tiny_pipeline, tiny_unet

import generate

pytest_plugins = ["generation_fixtures"]
pytestmark = pytest.mark.usefixtures("one_thread", "on_cpu")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"num_images": 0}, r"--num_images 0: must be in \[1, 2\*\*32\)"),
        ({"num_images": 2**32}, r"--num_images 4294967296: must be in \[1, 2\*\*32\)"),
        ({"num_images": "nan"}, "--num_images.* invalid int value: 'nan'"),
        (
            {"num_images": 2**32 - 2, "batch_size": 4},
            "--num_images 4294967294 and --batch_size 4 must add up to 4294967296",
        ),
        ({"batch_size": -4}, r"--batch_size -4: must be in \[1, 2\*\*32\)"),
        ({"grid_images": -1}, r"--grid_images -1: must be in \[0, 10000\]"),
        ({"grid_images": 10**9}, r"--grid_images 1000000000: must be in \[0, 10000\]"),
        ({"seed": -1}, r"--seed -1: must be in \[0, 2\*\*32\)"),
        ({"seed": 2**32}, r"--seed 4294967296: must be in \[0, 2\*\*32\)"),
        ({"num_inference_steps": 0}, r"--num_inference_steps 0: must be in \[1, 20\]"),
        ({"num_inference_steps": 21}, r"--num_inference_steps 21: must be in \[1, 20\]"),
        *(({"eta": eta, "sampler": "ddim"}, rf"--eta {eta}: must be in \[0, 1\]") for eta in ("nan", "inf", "-0.5")),
        ({"eta": 0.5}, "--eta 0.5 belongs to --sampler ddim"),
        ({"eta": 2, "sampler": "ddim"}, r"--eta 2.0: must be in \[0, 1\]"),
        ({"mixed_precision": "fp16"}, "--mixed_precision fp16 needs a GPU"),
        ({"pipeline": "./nowhere"}, "--pipeline ./nowhere: no such folder"),
        ({"pipeline": "runs/nowhere"}, "--pipeline runs/nowhere: there is no such folder, and on the Hugging Face Hub"),
        (
            {"pipeline": tempfile.gettempdir()},
            "--pipeline .*: is not the folder of a whole pipeline, .*/model_index.json: ",
        ),
        ({"guidance_scale": 2.0}, r"--guidance_scale 2\.0 needs a class-conditional model, .* is unconditional"),
        ({"class_labels": ["cat", 1]}, "--class_labels cat 1 needs a class-conditional model, .* is unconditional"),
        ({"class_labels": "balanced"}, "--class_labels balanced needs a class-conditional model"),
    ],
)
def test_bad_options_are_refused_before_weights_are_read(saved, tmp_path, monkeypatch, capsys, options, match):
    monkeypatch.setattr(generate, "load_pipeline", None)
    with pytest.raises(SystemExit) as error:
        run(saved, tmp_path / "out", **options)
    assert re.search(match, f"{error.value} {capsys.readouterr().err}")
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_is_said_to_be_no_pipeline(tmp_path, capsys):
    (tmp_path / "checkpoint-7").mkdir()
    (tmp_path / "checkpoint-7" / "manifest.json").write_text("{}")
    with pytest.raises(SystemExit) as error:
        run(tmp_path / "checkpoint-7", tmp_path / "out")
    assert "is a checkpoint of training" in f"{error.value} {capsys.readouterr().err}"


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"class_labels": ["frog", "cta"]}, "--class_labels: there is no class 'cta'; the nearest name is 'cat'"),
        ({"class_labels": 3}, r"--class_labels: there is no class 3: the numbers are \[0, 3\)"),
        ({"class_labels": -1}, "--class_labels: there is no class -1"),
        ({"class_labels": 1.5}, r"--class_labels: there is no class '1\.5'"),
        *(({"guidance_scale": w}, rf"--guidance_scale {w}: must be in \[0, inf\)") for w in (-1.0, "nan", "inf")),
        ({"guidance_interval": [0.2, 5]}, r"--guidance_interval 0\.2 5\.0 needs a --guidance_scale other than 1"),
        *(
            ({"guidance_interval": interval, "guidance_scale": 2}, "--guidance_interval .* must be two noise levels")
            for interval in ([5, 0.2], [-1, 5], ["nan", 5], [0, "nan"], [1], [1, 2, 3])
        ),
    ],
)
def test_bad_classes_and_guidance_are_refused_before_weights_are_read(
    conditional, tmp_path, monkeypatch, capsys, options, match
):
    monkeypatch.setattr(generate, "load_pipeline", None)
    with pytest.raises(SystemExit) as error:
        run(conditional, tmp_path / "out", **options)
    assert re.search(match, f"{error.value} {capsys.readouterr().err}")
    assert not (tmp_path / "out").exists()


def test_help_has_headings(capsys):
    with pytest.raises(SystemExit):
        generate.main(["--help"])
    headings = re.findall(r"^([A-Z].*):$", capsys.readouterr().out, re.MULTILINE)
    assert headings == ["Pipeline and output", "Sampling", "Classes and guidance, of a class-conditional model"]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"batch_size": 10**7}, r"--batch_size 10000000 needs 2\.6 GB of memory, of which 1\.0 are available"),
        ({"num_images": 10**8}, r"--num_images 100000000 needs 5\.0 GB of memory, of which 1\.0 are available"),
    ],
)
def test_a_typing_error_does_not_exhaust_the_memory(saved, tmp_path, monkeypatch, options, match):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=10**9))
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


def test_unknown_options_and_choices_are_refused(saved, tmp_path, capsys):
    for options, message in (({"step": 3}, "--step"), ({"sampler": "euler"}, "invalid choice: 'euler'")):
        with pytest.raises(SystemExit):
            run(saved, tmp_path / "out", **options)
        assert message in capsys.readouterr().err


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
    tiny_pipeline(channels=4).save_pretrained(tmp_path / "four")
    with pytest.raises(SystemExit, match="makes 4 channels"):
        run(tmp_path / "four", tmp_path / "out")
