"""Training a transformer, and training in a VAE's latents: whole runs, killed, resumed and shared out, and what is
refused."""

import json
import os
import threading
import time
from contextlib import ExitStack

import datasets
import numpy as np
import pytest
import torch
from conftest import REPOSITORY, TINY, Run, forked
from diffusers import DiTPipeline, DiTTransformer2DModel
from safetensors.torch import load_file
from tiny_networks import tiny_unet, tiny_vae

from pipelines import load_pipeline
from training.folder_lock import folder_lock

SMALL_DIT = ("--model", "dit", "--dit", '{"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8}')
CLASSES = ("--class_conditional", "--class_dropout", 0.3)
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae")
    tiny_vae().save_pretrained(folder)
    return folder


@pytest.fixture
def in_latents(vae, tmp_path):
    return ("--vae", vae, "--latents_dir", tmp_path / "latents", "--random_flip")


@pytest.fixture(params=["pixels", "latents"])
def flags(request, in_latents):
    return (*SMALL_DIT, *CLASSES, *(in_latents if request.param == "latents" else ()))


def test_a_run_that_is_killed_and_resumed_is_the_same(train, flags):
    whole = train("whole", *flags, "--max_train_steps", 12).wait()
    train("run", *flags, "--max_train_steps", 6).wait()
    resumed = train("run", *flags, "--max_train_steps", 12, "--resume_from_checkpoint", "latest").wait()
    warned = [line for line in resumed.output.splitlines() if "resuming with" in line or "has changed" in line]
    assert warned == ["resuming with --max_train_steps 12, which was 6"]
    assert resumed.metrics == whole.metrics
    assert (resumed.folder / WEIGHTS).read_bytes() == (whole.folder / WEIGHTS).read_bytes()
    assert "Removed shared tensor" not in resumed.output
    saved = load_file(whole.folder / "checkpoint-12" / "model.safetensors")
    tables = [name for name in saved if "embedding_table" in name]
    assert tables == ["transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight"]  # shared, so saved once


def test_two_processes_match_one_with_twice_the_batch(train, tmp_path, vae):
    # Adam's epsilon is large: its updates would follow the signs of gradients, and rounding would decide them
    common = [*SMALL_DIT, *CLASSES, "--vae", vae, "--random_flip", "--adam_epsilon", 1e-2, "--max_train_steps", 12]
    one = train("one", *common, "--latents_dir", tmp_path / "of_one", "--train_batch_size", 16)
    script = ["-m", "accelerate.commands.launch", "--num_processes=2", REPOSITORY / "train_adaptive_ddpm.py", *TINY]
    flags = [*common, "--latents_dir", tmp_path / "of_two", "--output_dir", tmp_path / "two"]
    done = forked(["python", *script, *flags])
    assert done.returncode == 0, done.stdout + done.stderr
    one.wait()
    ours, theirs = (load_file(folder / WEIGHTS) for folder in (tmp_path / "two", one.folder))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    for path in (tmp_path / "of_one" / "train").iterdir():
        assert (tmp_path / "of_two" / "train" / path.name).read_bytes() == path.read_bytes()


def test_what_it_leaves_is_a_pipeline_of_latents(train, in_latents):
    run = train("run", *SMALL_DIT, *CLASSES, *in_latents, "--max_train_steps", 4, "--eval_batch_size", 10).wait()
    assert "latents 1x4x4 of 1,797 images of digits" in run.output
    pipeline = DiTPipeline.from_pretrained(run.folder)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(pipeline.get_label_ids(["3", "7"]), guidance_scale=1.5, num_inference_steps=2).images
    assert images[1].size == (8, 8)
    assert not pipeline.scheduler.config.clip_sample
    assert isinstance(load_pipeline(str(run.folder)), DiTPipeline)
    card = (run.folder / "README.md").read_text()
    assert f'pipeline = DiTPipeline.from_pretrained("{run.folder}")' in card
    assert 'pipeline(pipeline.get_label_ids(["0"]), guidance_scale=1.5)' in card
    written = (run.folder / ".written_files").read_text().split()
    assert {"vae/config.json", "transformer/config.json"} <= set(written)
    train("run", *SMALL_DIT, *CLASSES, *in_latents, "--max_train_steps", 1, "--overwrite_output_dir").wait()


def test_weights_of_all_blocks_are_saved_and_trained(train):
    run = train("run", *SMALL_DIT, "--max_train_steps", 4, "--model", "dit").wait()
    weights = load_file(run.folder / WEIGHTS)
    saved = DiTTransformer2DModel.from_pretrained(run.folder / "transformer")
    assert weights.keys() == saved.state_dict().keys()  # a copy of the embedding for each block, as diffusers has it
    name = "norm1.emb.class_embedder.embedding_table.weight"
    tables = [weights[f"transformer_blocks.{i}.{name}"] for i in range(2)]
    assert torch.equal(*tables)
    assert weights["proj_out_2.weight"].any()  # which began as zero


def test_without_labels_it_learns_of_the_null_class_alone(train):
    runs = [train(name, *SMALL_DIT, "--max_train_steps", steps).wait() for name, steps in (("one", 1), ("more", 8))]
    tables = [
        load_file(run.folder / WEIGHTS)["transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight"]
        for run in runs
    ]
    moved = (tables[1] - tables[0]).abs().amax(1)
    assert moved[1000] > 1e-4
    assert moved[:1000].max() < 1e-5  # weight decay
    assert "image = pipeline([1000], guidance_scale=1).images[0]" in (runs[0].folder / "README.md").read_text()


def test_a_unet_in_latents(train, in_latents):
    kinds = {}
    for name, more in (("classes", CLASSES), ("none", ())):
        run = train(name, *in_latents, *more, "--max_train_steps", 2).wait()
        kinds[name] = json.loads((run.folder / "model_index.json").read_text())["_class_name"]
        assert load_pipeline(str(run.folder)).unet.config.sample_size == 4
    assert kinds == {"classes": ["pipeline", "ClassConditionalPipeline"], "none": "LDMPipeline"}


def test_scores_and_validation_in_latents(train, in_latents):
    more = ("--validation_split", 0.1, "--validation_steps", 2, "--max_train_steps", 4)
    run = train("run", *SMALL_DIT, *in_latents, *more).wait()
    losses = [record["validation_loss"] for record in run.metrics if "validation_loss" in record]
    assert len(losses) == 2
    assert all(0 < loss < 2 for loss in losses)
    again = train("again", *SMALL_DIT, *in_latents, *more).wait()
    assert again.metrics == run.metrics
    assert "Encoding" not in again.output


def test_a_feature_extractor_that_cannot_be_is_refused_before_anything_is_encoded(train, in_latents, tmp_path):
    run = train("run", *in_latents, "--eval_steps", 3, "--eval_feature_extractor", tmp_path / "absent").wait(1)
    assert f"--eval_feature_extractor {tmp_path}/absent" in run.output.splitlines()[-1]
    assert not (tmp_path / "latents").exists()


def test_the_cache_has_a_folder_for_each_part_of_the_images(train, vae, tmp_path):
    """The images to train on stay the same, and those to measure the validation loss on do not."""
    pixels = np.random.default_rng(0).integers(0, 256, (90, 8, 8), np.uint8)
    features = datasets.Features({"image": datasets.Image()})
    parts = {"train": pixels[:50], "validation": pixels[50:70], "test": pixels[70:]}
    saved = {name: datasets.Dataset.from_dict({"image": list(part)}, features) for name, part in parts.items()}
    datasets.DatasetDict(saved).save_to_disk(tmp_path / "images")
    common = (*SMALL_DIT, "--vae", vae, "--dataset_name", tmp_path / "images", "--cache_dir", tmp_path / "cache")
    outputs = []
    for split, more in [("validation", ()), ("test", ()), ("validation", ()), ("test", ("--white_level", 300))]:
        flags = (*more, "--validation_split", split, "--validation_steps", 1, "--max_train_steps", 1)
        outputs.append(train(f"run{len(outputs)}", *common, *flags).wait().output)
    assert len(list((tmp_path / "cache" / "adaptive_ddpm_latents").glob("*/index.json"))) == 5
    assert "Encoding" not in outputs[2]


WAITING = """
import sys
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from accelerate import Accelerator, InitProcessGroupKwargs
from training.latents import lock_when_free

accelerator = Accelerator(cpu=True, kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=3))])
accelerator.wait_for_everyone()
Path(sys.argv[2], str(accelerator.process_index)).touch()
with ExitStack() as held:
    lock_when_free(held, Path(sys.argv[1]), accelerator)
    accelerator.wait_for_everyone()
"""


def test_processes_wait_longer_than_their_timeout_for_another_run(tmp_path):
    (tmp_path / "wait.py").write_text(WAITING)
    (tmp_path / "started").mkdir()
    held = ExitStack()
    held.enter_context(folder_lock(tmp_path / "latents"))

    def release():
        while len(list((tmp_path / "started").iterdir())) < 2:
            time.sleep(0.1)
        time.sleep(6)
        held.close()

    threading.Thread(target=release, daemon=True).start()
    script = [tmp_path / "wait.py", tmp_path / "latents", tmp_path / "started"]
    launch = ["python", "-m", "accelerate.commands.launch", "--num_processes=2", *map(str, script)]
    done = forked(launch, env={**os.environ, "PYTHONPATH": str(REPOSITORY)})
    assert done.returncode == 0, done.stdout + done.stderr
    assert (done.stdout + done.stderr).count("waiting: --latents_dir") == 1


def test_latents_of_something_else_are_refused(train, in_latents, tmp_path):
    train("run", *SMALL_DIT, *in_latents, "--max_train_steps", 1).wait()
    tiny_vae(seed=1).save_pretrained(tmp_path / "other")
    found = train("other_vae", *SMALL_DIT, *in_latents, "--vae", tmp_path / "other").wait(1).output.splitlines()[-1]
    assert "--latents_dir" in found
    assert "holds other latents: vae sha256 was" in found


@pytest.fixture(scope="module")
def refused(tmp_path_factory):
    """refused("--flag", value): what a run says that ends before it has written anything."""
    folder = tmp_path_factory.mktemp("refused")

    def run(*flags):
        found = Run(folder / "run", flags).wait(None)
        assert found.process.exitcode in (1, 2)
        assert not found.folder.exists()
        lines = found.output.splitlines()
        found.log_path.unlink()
        return lines[-1]

    return run


def test_what_cannot_be_a_vae_is_refused(refused, vae, tmp_path):
    tiny_unet().save_pretrained(tmp_path / "unet")
    assert f"--vae {tmp_path}/unet: is a UNet2DModel, and must be an AutoencoderKL" in refused(
        "--vae", tmp_path / "unet"
    )
    assert f"--vae {tmp_path}/nowhere: " in refused("--vae", tmp_path / "nowhere")
    shifted = tiny_vae()
    shifted.register_to_config(shift_factor=0.5)
    shifted.save_pretrained(tmp_path / "shifted")
    assert "shift_factor=0.5" in refused("--vae", tmp_path / "shifted")
    assert "--latents_dir x: needs --vae" in refused("--latents_dir", "x")


def test_images_that_the_vae_or_the_patches_do_not_divide_are_refused(refused, vae):
    assert "--resolution 7: is no multiple of 2" in refused("--vae", vae, "--resolution", 7)
    found = refused("--vae", vae, "--resolution", 6, *SMALL_DIT)
    assert "--dit patch_size 2: does not divide the side of what it is trained on, 3" in found
    found = refused("--vae", vae, "--image_mode", "RGB")
    assert "--vae: encodes images of 1 channel(s), and these have 3; pass --image_mode L" in found


def test_a_run_does_not_go_on_in_the_latents_of_another_vae(train, in_latents, tmp_path):
    train("run", *SMALL_DIT, *in_latents, "--max_train_steps", 1).wait()
    resume = ("--resume_from_checkpoint", "latest", "--max_train_steps", 2)
    tiny_vae(seed=1).save_pretrained(tmp_path / "other")
    others = ("--vae", tmp_path / "other", "--latents_dir", tmp_path / "others")
    for flags in ((*in_latents, *others), ()):
        found = train("run", *SMALL_DIT, *flags, *resume).wait(1).output.splitlines()[-1]
        assert "was trained on the latents of VAE {'sha256'" in found
    assert "would go on on pixels" in found
    assert not (tmp_path / "others").exists()
    train("pixels", *SMALL_DIT, "--max_train_steps", 1).wait()
    found = train("pixels", *SMALL_DIT, *in_latents, *resume).wait(1).output.splitlines()[-1]
    assert "was trained on pixels, and would go on on the latents of VAE" in found


def test_another_kind_of_network_is_not_resumed(train):
    train("run", "--max_train_steps", 1).wait()
    found = train("run", *SMALL_DIT, "--resume_from_checkpoint", "latest").wait(1).output.splitlines()[-1]
    assert "--model dit: the network in" in found
    assert "is a UNet2DModel" in found
