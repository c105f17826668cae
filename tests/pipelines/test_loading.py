"""Pipeline folders: variants of the weights, and broken ones, refused in one line before anything is written."""

import json
import shutil

import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler
from safetensors.torch import load_file, save_file
from tiny_networks import CLASSES, tiny_conditional_pipeline, tiny_pipeline, tiny_unet

from pipelines import ClassConditionalPipeline, load_configs, load_pipeline
from pipelines.loading import weight_variants

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path / "pipeline")
    return tmp_path / "pipeline"


@pytest.mark.parametrize("shard_size", ["10GB", "10KB"])
@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
@pytest.mark.parametrize("variant", [None, "fp16"])
def test_weights_of_a_variant_are_loaded_on_request(folder, variant, safe, shard_size):
    (folder / "unet" / WEIGHTS).unlink()
    unet = tiny_unet()
    expected = unet.state_dict()
    unet.save_pretrained(folder / "unet", variant=variant, safe_serialization=safe, max_shard_size=shard_size)
    assert weight_variants(str(folder), "unet") == {variant: {"safetensors" if safe else "bin"}}
    pipeline = load_pipeline(str(folder), variant)
    torch.testing.assert_close(pipeline.unet.state_dict(), expected, rtol=0, atol=0)
    for other in {None, "fp16", "ema"} - {variant}:
        alternative = f"--variant {variant}" if variant else "no --variant"
        with pytest.raises(ValueError, match=f"has no weights .*, but those for {alternative}$"):
            load_pipeline(str(folder), other)


def test_every_variant_there_is_named(folder):
    for name in ("diffusion_pytorch_model.fp16.bin", "diffusion_pytorch_model-00001-of-00002.bf16.safetensors"):
        (folder / "unet" / name).touch()
    assert weight_variants(str(folder), "unet") == {None: {"safetensors"}, "fp16": {"bin"}, "bf16": {"safetensors"}}
    with pytest.raises(ValueError, match="'ema', but those for no --variant or --variant bf16 or --variant fp16"):
        load_pipeline(str(folder), "ema")


def test_half_precision_weights_compute_in_float32(folder):
    half = {name: tensor.half() for name, tensor in load_file(folder / "unet" / WEIGHTS).items()}
    save_file(half, folder / "unet" / WEIGHTS)
    assert load_pipeline(str(folder)).unet.dtype == torch.float32


def cut_short(path):
    path.write_bytes(path.read_bytes()[:1000])


def change(**tensors):
    """Replace weights, or leave out those that are None."""

    def write(path):
        weights = {**load_file(path), **{name.replace("__", "."): value for name, value in tensors.items()}}
        save_file({name: tensor for name, tensor in weights.items() if tensor is not None}, path)

    return write


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (cut_short, "its weights cannot be loaded"),
        (lambda path: path.write_bytes(b""), "its weights cannot be loaded"),
        (lambda path: path.unlink(), "has no weights"),
        (change(conv_in__weight=torch.ones(2, 2)), "conv_in.weight expected shape"),
        (change(conv_in__weight=None), "its weights lack conv_in.weight, which"),
        (change(conv_in__bias=torch.full((8,), torch.nan)), "its weights are not finite .*: conv_in.bias"),
        (change(conv_in__bias=torch.full((8,), torch.inf)), "its weights are not finite .*: conv_in.bias"),
    ],
)
def test_broken_weights_are_refused(folder, damage, match):
    damage(folder / "unet" / WEIGHTS)
    with pytest.raises((ValueError, OSError), match=f"^{folder}.*{match}"):
        load_pipeline(str(folder))


def test_a_missing_shard_is_refused(folder):
    (folder / "unet" / WEIGHTS).unlink()
    tiny_unet().save_pretrained(folder / "unet", max_shard_size="10KB")
    max((folder / "unet").glob("*-of-*")).unlink()
    with pytest.raises((ValueError, OSError), match=r"its weights cannot be loaded.*-of-"):
        load_pipeline(str(folder))


@pytest.mark.parametrize("name", ["model_index.json", "unet/config.json", "scheduler/scheduler_config.json"])
@pytest.mark.parametrize("content", ["{", "[1]", "null", '"x"', ""])
def test_a_config_that_is_no_json_object_is_refused_by_name(folder, name, content):
    (folder / name).write_text(content)
    with pytest.raises((ValueError, OSError), match=f"^{folder}/{name.split('/')[0]}"):
        load_configs(str(folder))


@pytest.mark.parametrize("part", ["unet", "scheduler"])
def test_a_missing_component_is_refused_by_name(folder, part):
    shutil.rmtree(folder / part)
    with pytest.raises(OSError, match=f"^{folder}/{part}"):
        load_configs(str(folder))


@pytest.mark.parametrize(
    ("name", "settings", "match"),
    [
        ("model_index", {"unet": ["diffusers"]}, "IndexError"),
        ("model_index", {"_class_name": None, "vae": ["diffusers", "VQModel"]}, "vae=VQModel"),
        ("unet/config", {"sample_size": None}, "no sample_size"),
        ("unet/config", {"sample_size": "8"}, "sample_size='8'"),
        ("unet/config", {"sample_size": -8}, "sample_size=-8"),
        ("unet/config", {"sample_size": [8]}, r"sample_size=\[8\]"),
        ("unet/config", {"sample_size": 9}, "Expected"),
        ("unet/config", {"sample_size": 10**9}, "overflow"),
        ("unet/config", {"in_channels": True, "out_channels": True}, "in_channels=True"),
        ("unet/config", {"block_out_channels": None}, "TypeError"),
        ("unet/config", {"norm_num_groups": 0}, "ZeroDivisionError"),
        ("unet/config", {"norm_num_groups": 7}, "divisible"),
        ("unet/config", {"down_block_types": ["Magic", "DownBlock2D"]}, "Magic"),
        ("scheduler/scheduler_config", {"num_train_timesteps": "20"}, "num_train_timesteps='20' must be"),
        ("scheduler/scheduler_config", {"num_train_timesteps": 0}, "num_train_timesteps=0 must be"),
        ("scheduler/scheduler_config", {"num_train_timesteps": 2.5}, r"num_train_timesteps=2\.5 must be"),
        ("scheduler/scheduler_config", {"num_train_timesteps": 10**12}, r"must be a whole number in \[1, 1000000\]"),
        ("scheduler/scheduler_config", {"beta_start": "a"}, "TypeError"),
        ("scheduler/scheduler_config", {"beta_start": float("nan")}, "alphas_cumprod outside"),
        ("scheduler/scheduler_config", {"beta_end": 2}, "alphas_cumprod outside"),
        ("scheduler/scheduler_config", {"beta_schedule": "magic"}, "magic"),
        (
            "scheduler/scheduler_config",
            {"trained_betas": [0.1]},
            "has 1 values, and num_train_timesteps is 20",
        ),
        ("scheduler/scheduler_config", {"steps_offset": "a"}, "steps_offset='a' must be"),
        ("scheduler/scheduler_config", {"steps_offset": -1}, "steps_offset=-1 must be"),
        ("scheduler/scheduler_config", {"timestep_spacing": "magic"}, "timestep_spacing='magic' must be one of"),
        ("scheduler/scheduler_config", {"clip_sample_range": "a"}, "clip_sample_range='a' must be"),
        ("scheduler/scheduler_config", {"clip_sample_range": -1}, "clip_sample_range=-1 must be"),
        ("scheduler/scheduler_config", {"prediction_type": [1]}, r"prediction_type=\[1\] must be"),
        ("scheduler/scheduler_config", {"variance_type": "magic"}, "variance_type='magic' must be one of"),
        ("scheduler/scheduler_config", {"variance_type": "learned"}, "variance_type='learned' is not implemented"),
        ("scheduler/scheduler_config", {"thresholding": True}, "thresholding=True is not implemented"),
    ],
)
def test_a_config_that_makes_no_image_is_refused_by_name(folder, name, settings, match):
    path = folder / f"{name}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    with pytest.raises((ValueError, NotImplementedError), match=f"^{folder}.*{match}"):
        load_configs(str(folder))


def test_configs_are_found_in_the_oldest_layout(tmp_path):
    """google/ddpm-cifar10-32 and its siblings keep both configs beside model_index.json."""
    tiny_pipeline().save_pretrained(tmp_path)
    for name in ("unet", "scheduler"):
        for path in (tmp_path / name).iterdir():
            path.rename(tmp_path / path.name)
        (tmp_path / name).rmdir()
    configs = load_configs(tmp_path)
    assert configs.network["sample_size"] == 8
    assert isinstance(configs.scheduler, DDPMScheduler)
    assert configs.id2label is None
    load_pipeline(str(tmp_path))


def test_conditional_networks_without_names_of_their_classes_are_refused(tmp_path):
    tiny_pipeline(num_class_embeds=10).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="class-conditional, and a DDPMPipeline does not name the classes"):
        load_configs(tmp_path)


@pytest.fixture
def conditional(tmp_path):
    tiny_conditional_pipeline(DDIMScheduler(num_train_timesteps=20)).save_pretrained(tmp_path / "conditional")
    return tmp_path / "conditional"


def test_each_kind_of_pipeline_is_loaded_as_what_it_is(folder, conditional):
    assert type(load_pipeline(str(folder))) is DDPMPipeline
    pipeline = load_pipeline(str(conditional))
    assert type(pipeline) is ClassConditionalPipeline
    assert type(pipeline.scheduler) is DDIMScheduler
    assert pipeline.labels["hound"] == 1
    assert load_configs(conditional).id2label == CLASSES
    expected = tiny_conditional_pipeline().unet.state_dict()
    torch.testing.assert_close(pipeline.unet.state_dict(), expected, rtol=0, atol=0)


def test_no_code_of_a_folder_is_run(folder, conditional):
    (conditional / "pipeline.py").write_text("raise SystemExit('run')")
    load_pipeline(str(conditional))
    for kind in ("evil", ["pipeline", "Evil"], ["evil", "ClassConditionalPipeline"]):
        for name in ("pipeline.py", "evil.py"):
            (folder / name).write_text("raise SystemExit('run')")
        edit_index(folder, _class_name=kind)
        if isinstance(kind, str):
            assert type(load_pipeline(str(folder))) is DDPMPipeline
            continue
        with pytest.raises(ValueError, match=f"^{folder} is a .*{kind[1]}.*; the pipelines loaded here are"):
            load_pipeline(str(folder))
    edit_index(folder, _class_name="DDPMPipeline", unet=["evil", "UNet2DModel"])
    load_pipeline(str(folder))


def edit_index(folder, **settings):
    path = folder / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"id2label": None}, "must have id2label"),
        ({"id2label": "cat"}, 'id2label must name the classes, {"0": "airplane", ...}'),
        ({"id2label": ["cat", "dog", "frog"]}, "is a .* of id2label=dog, "),
        ({"id2label": {"0": "cat", "1": "dog", "2": 3}}, "must name the classes"),
        ({"id2label": {"0": "cat", "1": "dog"}}, "id2label has 2 names, and must name .* embeddings for, 0 to 2"),
        ({"id2label": {"0": "cat", "1": "dog", "x": "frog"}}, "must name .* 0 to 2"),
        ({"_class_name": "DDPMPipeline"}, "class-conditional, and a DDPMPipeline does not name the classes"),
    ],
)
def test_names_of_classes_that_are_damaged_are_refused(conditional, settings, match):
    edit_index(conditional, **settings)
    with pytest.raises(ValueError, match=f"^{conditional}.*{match}"):
        load_configs(conditional)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"num_class_embeds": 10}, "id2label has 3 names, .* embeddings for, 0 to 8"),
        ({"num_class_embeds": 10**9}, "id2label has 3 names"),
        ({"num_class_embeds": None}, "num_class_embeds=None"),
        ({"num_class_embeds": 0}, ""),
        ({"num_class_embeds": "4"}, ""),
        ({"class_embed_type": "timestep"}, "class_embed_type='timestep'; only plain class labels"),
    ],
)
def test_networks_with_other_conditions_are_refused(conditional, settings, match):
    path = conditional / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    with pytest.raises(ValueError, match=f"^{conditional}.*{match}"):
        load_configs(conditional)
