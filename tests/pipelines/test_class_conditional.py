"""Class-conditional pipelines: the formula of guidance, names of classes, and folders that stock diffusers loads."""

import functools
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler, UniPCMultistepScheduler
from tiny_networks import CLASSES, tiny_conditional_pipeline, tiny_unet

from pipelines import ClassConditionalPipeline
from pipelines.class_conditional import predict_with_guidance, read_id2label
from training.output import OutputDir
from training.saving import save_pipeline


def generate(pipeline, labels=(2, 0), **options):
    """Float32 [B, H, W, C] in [0, 1], from one generator."""
    pipeline.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 3, "output_type": "np", "generator": torch.manual_seed(7)} | options
    return pipeline(list(labels), **options).images


@pytest.fixture(scope="module")
def pipeline():
    return tiny_conditional_pipeline()


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.5, 4.0])
def test_guidance_is_the_formula(scale):
    unet, x, t = tiny_unet(num_class_embeds=4), torch.randn(2, 1, 8, 8), torch.tensor(5)
    labels, null = torch.tensor([2, 0]), torch.tensor([3, 3])
    with torch.no_grad():
        of_label, of_null = unet(x, t, labels).sample, unet(x, t, null).sample
        assert not torch.allclose(of_label, of_null, atol=1e-3)
        guided = predict_with_guidance(unet, x, t, labels, scale)
        torch.testing.assert_close(guided, of_null + scale * (of_label - of_null))
        assert torch.equal(predict_with_guidance(unet, x, t, labels, 1.0), of_label)


@pytest.mark.parametrize(("scale", "images"), [(1, [2, 2, 2]), (1.5, [4, 4, 4]), (0, [4, 4, 4])])
def test_only_guidance_costs_a_second_pass(pipeline, monkeypatch, scale, images):
    batches, forward = [], pipeline.unet.forward
    monkeypatch.setattr(
        pipeline.unet, "forward", lambda x, *rest, **more: (batches.append(len(x)), forward(x, *rest, **more))[1]
    )
    generate(pipeline, guidance_scale=scale)
    assert batches == images


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("scheduler", [DDPMScheduler, DDIMScheduler, EulerDiscreteScheduler, UniPCMultistepScheduler])
def test_any_scheduler_and_prediction_type(scheduler, prediction_type):
    pipeline = tiny_conditional_pipeline(scheduler(num_train_timesteps=20, prediction_type=prediction_type), channels=3)
    images = generate(pipeline)
    assert images.shape == (2, 8, 8, 3)
    assert np.isfinite(images).all()
    assert np.array_equal(images, generate(pipeline))


def test_ddim_steps_from_the_clipped_image_as_sample_images_does():
    pipeline = tiny_conditional_pipeline(DDIMScheduler(num_train_timesteps=20), channels=3)
    step, asked = pipeline.scheduler.step, []

    @functools.wraps(step)  # with its signature
    def watched(*tensors, **options):
        asked.append(options["use_clipped_model_output"])
        return step(*tensors, **options)

    pipeline.scheduler.step = watched
    generate(pipeline, num_inference_steps=3)
    assert asked == [True] * 3


def test_the_output_is_of_the_type_asked_for(pipeline):
    arrays = generate(pipeline)
    tensors = generate(pipeline, output_type="pt")
    assert np.array_equal(tensors.permute(0, 2, 3, 1).numpy(), arrays)
    pictures = generate(pipeline, output_type="pil")
    assert [(picture.mode, picture.size) for picture in pictures] == [("L", (8, 8))] * 2
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline("cat", num_inference_steps=1, output_type="np", return_dict=False)
    assert [image.shape for image in images] == [(1, 8, 8, 1)]


def test_names_and_numbers_are_the_same_classes(pipeline):
    assert pipeline.labels == {"cat": 0, "dog": 1, "dog, hound": 1, "frog": 2, "hound": 1}
    assert pipeline.get_label_ids(["hound", 2, "dog, hound", np.int64(0), torch.tensor(1)]) == [1, 2, 1, 0, 1]
    assert pipeline.get_label_ids("cat") == pipeline.get_label_ids(0) == [0]
    assert np.array_equal(generate(pipeline, ["frog", "cat"]), generate(pipeline, (2, 0)))
    assert not np.array_equal(generate(pipeline, ["cat", "cat"]), generate(pipeline, (2, 0)))


def test_a_name_that_classes_share_is_the_name_of_none():
    pipeline = tiny_conditional_pipeline(id2label={0: "crane, bird", 1: "crane, machine", 2: "frog"})
    assert set(pipeline.labels) == {"crane, bird", "crane, machine", "bird", "machine", "frog"}


@pytest.mark.parametrize(
    ("labels", "match"),
    [
        (["cta"], "there is no class 'cta'; the nearest name is 'cat'"),
        (["Frogs", 0], "there is no class 'Frogs'; the nearest name is 'frog'"),
        ([3], r"there is no class 3: the numbers are \[0, 3\)"),
        ([0, -1], "there is no class -1"),
        ([1.5], "must be a name or a number, not 1.5"),
        ([], "class_labels is empty"),
    ],
)
def test_classes_that_are_not_there_are_refused(pipeline, labels, match):
    with pytest.raises(ValueError, match=match):
        pipeline(labels)


@pytest.mark.parametrize("scale", [-1, float("nan"), float("inf")])
def test_a_scale_out_of_range_is_refused(pipeline, scale):
    with pytest.raises(ValueError, match=r"guidance_scale=.* must be in \[0, inf\)"):
        pipeline([0], guidance_scale=scale)


@pytest.mark.parametrize(
    ("id2label", "num_class_embeds", "match"),
    [
        ({0: "a"}, 3, "id2label has 1 names, and must name the classes that the network has embeddings for, 0 to 1"),
        ({0: "a", 2: "b"}, 3, "must name the classes that the network has"),
        ({0: "a", "zero": "b"}, 3, "must name the classes that the network has"),
        ({0: "a", 1: 2}, 3, "must name the classes"),
        (["a", "b"], 3, "must name the classes"),
        ({}, 1, "num_class_embeds=1"),
        ({0: "a"}, None, "num_class_embeds=None"),
        ({0: "a"}, 10**12, "has 1 names"),
    ],
)
def test_names_that_are_not_those_of_the_network_are_refused(id2label, num_class_embeds, match):
    with pytest.raises(ValueError, match=match):
        read_id2label(id2label, {"num_class_embeds": num_class_embeds})


def test_classes_without_names_are_named_by_their_numbers():
    assert tiny_conditional_pipeline(id2label=None).labels == {"0": 0, "1": 1, "2": 2}
    with pytest.raises(ValueError, match="num_class_embeds=None"):
        ClassConditionalPipeline(DDPMScheduler(), unet=tiny_unet())


STOCK = """
import sys
import numpy as np, torch
from diffusers import DiffusionPipeline

folder, out = sys.argv[1:]
images = []
for options in ({"custom_pipeline": folder}, {}):
    pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True, **options)
    assert type(pipeline).__module__.startswith("diffusers_modules."), type(pipeline)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.manual_seed(7)
    images.append(pipeline(["frog", 0], num_inference_steps=3, output_type="np", generator=generator).images)
pipeline.save_pretrained(out)
np.save(out + ".npy", images)
"""


def test_stock_diffusers_loads_a_folder_in_a_process_without_this_project(pipeline, tmp_path):
    """By its own code, under either way of asking; and saves it again."""
    pipeline.save_pretrained(tmp_path / "saved")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-I", "-c", STOCK, str(tmp_path / "saved"), str(tmp_path / "again")]
    process = subprocess.run(command, cwd="/", env=environment, capture_output=True, text=True, timeout=120)
    assert process.returncode == 0, process.stderr
    for images in np.load(tmp_path / "again.npy"):
        assert np.array_equal(images, generate(pipeline))
    for name in ("saved", "again"):
        index = json.loads((tmp_path / name / "model_index.json").read_text())
        assert index["_class_name"] == ["pipeline", "ClassConditionalPipeline"]
        assert index["id2label"] == {str(number): label for number, label in CLASSES.items()}
    code = [(tmp_path / name / "pipeline.py").read_text() for name in ("saved", "again")]
    assert code[0] == code[1]


def test_a_run_saves_the_code_too(pipeline, tmp_path):
    save_pipeline(pipeline, OutputDir(tmp_path))
    assert (tmp_path / "pipeline.py").is_file()
    assert sorted(path.name for path in tmp_path.iterdir() if not path.name.startswith(".")) == [
        "model_index.json",
        "pipeline.py",
        "scheduler",
        "unet",
    ]
