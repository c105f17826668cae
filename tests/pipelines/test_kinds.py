"""Pipelines of a U-Net or a transformer, of images or latents, with classes or without: saved, loaded and sampled."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DiffusionPipeline, DiTPipeline
from tiny_networks import CLASSES, tiny_dit, tiny_unet, tiny_vae

from pipelines import ClassConditionalPipeline, load_configs, load_pipeline, make_pipeline, network_of, sample_images
from pipelines.class_conditional import predict_with_guidance

KINDS = {
    "DDPMPipeline": ("unet", False, False),
    "LDMPipeline": ("unet", True, False),
    "ClassConditionalPipeline of images": ("unet", False, True),
    "ClassConditionalPipeline of latents": ("unet", True, True),
    "ClassConditionalPipeline of a transformer": ("dit", False, True),
    "ClassConditionalPipeline of a transformer without classes": ("dit", False, False),
    "DiTPipeline": ("dit", True, True),
    "DiTPipeline without classes": ("dit", True, False),
}


def make(kind, scheduler=None):
    network, has_vae, has_classes = KINDS[kind]
    network = tiny_dit() if network == "dit" else tiny_unet(num_class_embeds=4 if has_classes else None)
    scheduler = scheduler or DDPMScheduler(num_train_timesteps=20, clip_sample=not has_vae)
    pipeline = make_pipeline(network, scheduler, CLASSES if has_classes else None, tiny_vae() if has_vae else None)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("kind", KINDS)
def test_each_is_loaded_as_what_was_saved(kind, tmp_path):
    pipeline = make(kind)
    assert type(pipeline).__name__ == kind.split()[0]
    pipeline.save_pretrained(tmp_path)
    loaded = load_pipeline(str(tmp_path))
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded) is type(pipeline)
    configs, (_, has_vae, has_classes) = load_configs(str(tmp_path)), KINDS[kind]
    assert configs.id2label == (CLASSES if has_classes else None)
    assert configs.image_shape == ((1, 16, 16) if has_vae else (1, 8, 8))
    images = sample_images(pipeline, range(3), num_inference_steps=4)
    assert images.shape == (3, *configs.image_shape)
    assert torch.equal(sample_images(loaded, range(3), num_inference_steps=4), images)


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_depends_on_its_number_and_class_alone(kind):
    pipeline = make(kind)
    images = sample_images(pipeline, [0, 1, 2, 3], num_inference_steps=4)
    again = sample_images(pipeline, [3, 2, 1, 0], num_inference_steps=4)
    assert (images.int() - again.flip(0).int()).abs().max() <= 1
    if KINDS[kind][2]:
        of_class = sample_images(pipeline, [0, 1, 2, 3], num_inference_steps=4, class_labels=[0, 1, 2, 0])
        assert torch.equal(images, of_class)
    else:
        with pytest.raises(ValueError, match="class_labels needs a class-conditional model"):
            sample_images(pipeline, [0], class_labels=[0])
        with pytest.raises(ValueError, match="guidance_scale needs a class-conditional model"):
            sample_images(pipeline, [0], guidance_scale=2)


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_samples_are_those_of_dit_pipeline(scale):
    """By deterministic steps from the same noise, ours and diffusers' own agree."""
    pipeline = make("DiTPipeline", DDIMScheduler(num_train_timesteps=20, clip_sample=False))
    theirs = pipeline([0, 2], scale, torch.manual_seed(3), 4, output_type="np").images
    noise = torch.randn(2, 1, 8, 8, generator=torch.manual_seed(3))
    x, labels = noise, torch.tensor([0, 2])
    pipeline.scheduler.set_timesteps(4)
    with torch.no_grad():
        for t in pipeline.scheduler.timesteps:
            output = predict_with_guidance(pipeline.transformer, x, t, labels, scale)
            x = pipeline.scheduler.step(output, t, x).prev_sample
        images = pipeline.vae.decode(x / 0.5).sample.permute(0, 2, 3, 1) / 2 + 0.5
    np.testing.assert_allclose(images.clamp(0, 1).numpy(), theirs, atol=1e-5)


def test_the_first_channels_alone_are_guided():
    dit, x, t, labels = tiny_dit(channels=4), torch.randn(2, 4, 8, 8), torch.tensor(5), torch.tensor([1, 2])
    with torch.no_grad():
        plain, all_guided, guided = (
            predict_with_guidance(dit, x, t, labels, scale, channels)
            for scale, channels in ((1.0, None), (3.0, None), (3.0, 3))
        )
    assert torch.equal(guided[:, :3], all_guided[:, :3])
    torch.testing.assert_close(guided[:, 3], plain[:, 3])
    assert not torch.allclose(all_guided[:, 3], plain[:, 3], atol=1e-3)


def test_a_learned_variance_is_left_out(tmp_path):
    """facebook/DiT-XL-2-256 has it, and diffusers' former name of the class."""
    dit = tiny_dit()
    config = {**dit.config, "out_channels": 2}
    learned = type(dit).from_config(config)
    weights = dit.state_dict()
    output = weights["proj_out_2.weight"].view(2, 2, 1, -1), weights["proj_out_2.bias"].view(2, 2, 1)
    weights["proj_out_2.weight"] = torch.cat([output[0], torch.randn(2, 2, 1, 16)], dim=2).view(8, -1)
    weights["proj_out_2.bias"] = torch.cat([output[1], torch.randn(2, 2, 1)], dim=2).flatten()
    learned.load_state_dict(weights)
    scheduler = DDPMScheduler(num_train_timesteps=20)
    parts = scheduler, {0: "crane", 1: "crane", 2: "frog"}, tiny_vae()  # ImageNet has two cranes
    make_pipeline(learned.eval(), *parts).save_pretrained(tmp_path)
    for path in (tmp_path / "model_index.json", tmp_path / "transformer" / "config.json"):
        path.write_text(path.read_text().replace("DiTTransformer2DModel", "Transformer2DModel"))
    loaded = load_pipeline(str(tmp_path))
    loaded.set_progress_bar_config(disable=True)
    images = [sample_images(p, range(3), num_inference_steps=4) for p in (loaded, make_pipeline(dit, *parts))]
    assert (images[0].int() - images[1].int()).abs().max() <= 1


STOCK = """
import sys, torch
from diffusers import DiffusionPipeline, DiTPipeline
pixels, latents = (DiffusionPipeline.from_pretrained(folder, trust_remote_code=True) for folder in sys.argv[1:])
assert type(latents) is DiTPipeline
for pipeline in (pixels, latents):
    pipeline.set_progress_bar_config(disable=True)
    labels = pipeline.get_label_ids(["frog", "hound"])
    images = pipeline(class_labels=labels, guidance_scale=1.5, num_inference_steps=2).images
    print(labels, images[1].size)
"""


def test_stock_diffusers_loads_transformers_in_a_process_without_this_project(tmp_path):
    folders = [tmp_path / "pixels", tmp_path / "latents"]
    make("ClassConditionalPipeline of a transformer").save_pretrained(folders[0])
    make("DiTPipeline").save_pretrained(folders[1])
    command = [sys.executable, "-I", "-c", STOCK, *map(str, folders)]
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.split("\n")
    assert found[:2] == ["[2, 1] (8, 8)", "[2, 1] (16, 16)"]


def test_without_classes_the_null_class_can_be_asked_for():
    pipeline = make("ClassConditionalPipeline of a transformer without classes")
    assert len(pipeline([1000, 1000], guidance_scale=1, num_inference_steps=2).images) == 2
    with pytest.raises(ValueError, match=r"there is no class 0: the numbers are \[1000, 1001\)"):
        pipeline([0])


def test_a_pipeline_has_one_network():
    with pytest.raises(ValueError, match="either a unet or a transformer"):
        ClassConditionalPipeline(DDPMScheduler())
    with pytest.raises(ValueError, match="either a unet or a transformer"):
        ClassConditionalPipeline(DDPMScheduler(), unet=tiny_unet(num_class_embeds=4), transformer=tiny_dit())


@pytest.mark.parametrize(
    ("vae", "message"),
    [
        ({"shift_factor": 0.1}, "shift_factor=0.1, which diffusers' pipeline would not undo"),
        ({"scaling_factor": 0}, "scaling_factor=0: not a finite number above 0"),
        ({"latent_channels": 3}, "the network makes 1 channels, and the VAE has latent_channels=3"),
    ],
)
def test_a_vae_that_does_not_fit_is_refused(tmp_path, vae, message):
    pipeline = make("DiTPipeline")
    pipeline.vae.register_to_config(**vae)
    pipeline.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"^{tmp_path}/vae: .*{message}"):
        load_configs(str(tmp_path))


def test_a_vae_without_a_scaling_factor_has_the_first_ones(tmp_path):
    """As VAEs of early diffusers have it."""
    make("DiTPipeline").save_pretrained(tmp_path)
    path = tmp_path / "vae" / "config.json"
    config = json.loads(path.read_text())
    del config["scaling_factor"]
    path.write_text(json.dumps(config))
    assert load_configs(str(tmp_path)).vae["scaling_factor"] == 0.18215


def test_weights_of_a_vae_that_are_not_there_are_named(tmp_path):
    make("DiTPipeline").save_pretrained(tmp_path)
    (tmp_path / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ValueError, match=f"{tmp_path} has no weights .vae/"):
        load_pipeline(str(tmp_path))


def test_the_network_of_each_is_found():
    assert isinstance(make("DiTPipeline"), DiTPipeline)
    for kind in KINDS:
        pipeline = make(kind)
        assert isinstance(pipeline, DiffusionPipeline)
        assert network_of(pipeline) in pipeline.components.values()
