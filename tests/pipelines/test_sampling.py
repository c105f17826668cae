"""Seeded sampling of classes: guidance step by step, and image i depends on (seed, i) and its class alone."""

import math

import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler
from tiny_networks import tiny_conditional_pipeline, tiny_pipeline

from pipelines import sample_images
from pipelines.denoising import denoise_step, denoising_steps
from pipelines.noise import image_generators, noise_maps
from pipelines.sampling import guidance_scales

CPU = torch.device("cpu")


def quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def pipeline():
    return quiet(tiny_conditional_pipeline())


@pytest.fixture
def batches(pipeline, monkeypatch):
    """The batch sizes of the network's calls, from now on."""
    sizes, forward = [], pipeline.unet.forward

    def spy(x, *rest, **more):
        sizes.append(len(x))
        return forward(x, *rest, **more)

    monkeypatch.setattr(pipeline.unet, "forward", spy)
    return sizes


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_the_chain_is_guided_by_the_formula(prediction_type):
    """ε̂ = ε_null + w (ε_label - ε_null), in ε whatever the network predicts; by DDIM, without clipping, in float64."""
    options = {"num_train_timesteps": 20, "prediction_type": prediction_type, "clip_sample": False}
    pipeline = quiet(tiny_conditional_pipeline(DDIMScheduler(**options), channels=3))
    unet, labels, table = pipeline.unet, torch.tensor([2, 0, 1]), pipeline.scheduler.alphas_cumprod.double()

    def epsilon(x, t, classes):
        output, a = unet(x.float(), t, classes).sample.double(), table[t]
        if prediction_type == "epsilon":
            return output
        if prediction_type == "v_prediction":
            return a.sqrt() * output + (1 - a).sqrt() * x
        return (x - a.sqrt() * output) / (1 - a).sqrt()

    x = next(noise_maps(image_generators(4, [0, 1, 2], CPU), (3, 8, 8), 1, CPU)).double()
    with torch.no_grad():
        for t in (15, 10, 5, 0):
            of_null = epsilon(x, t, torch.full_like(labels, 3))
            guided = of_null + 2.5 * (epsilon(x, t, labels) - of_null)
            before = table[t - 5] if t >= 5 else torch.ones(())
            x0 = (x - (1 - table[t]).sqrt() * guided) / table[t].sqrt()
            x = before.sqrt() * x0 + (1 - before).sqrt() * guided
    expected = ((x / 2 + 0.5).clamp(0, 1) * 255).round()
    images = sample_images(pipeline, range(3), 4, 4, class_labels=["frog", "cat", "hound"], guidance_scale=2.5)
    assert (images - expected).abs().max() <= 1


def test_scale_1_is_one_pass_with_the_labels(pipeline, batches):
    images = sample_images(pipeline, [3, 4], 0, 5, class_labels=[2, 0])
    assert batches == [2] * 5
    x = next(noise_maps(image_generators(0, [3, 4], CPU), (1, 8, 8), 1, CPU))
    generators = image_generators(0, [3, 4], CPU)
    next(noise_maps(generators, (1, 8, 8), 1, CPU))
    noise = noise_maps(generators, (1, 8, 8), 4, CPU)
    with torch.no_grad():
        for step in denoising_steps(pipeline.scheduler, 5):
            output = pipeline.unet(x, step.timestep, torch.tensor([2, 0])).sample
            x = denoise_step(step, x, output, next(noise) if step.sigma > 0 else None, 1.0)
    assert torch.equal(images, ((x / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8))
    sample_images(pipeline, [3, 4], 0, 5, guidance_scale=1.5)
    assert batches[-5:] == [4] * 5


def test_guidance_is_of_an_interval_of_noise_levels(pipeline, batches):
    table = pipeline.scheduler.alphas_cumprod.double()
    steps = denoising_steps(pipeline.scheduler, 5)
    sigmas = [math.sqrt((1 - table[step.timestep]) / table[step.timestep]) for step in steps]
    assert sigmas == sorted(sigmas, reverse=True)
    low, high = sigmas[3], sigmas[1]  # the upper bound belongs to it, and the lower one does not
    assert guidance_scales(pipeline.scheduler, steps, 3.0, (low, high)) == [1, 3, 3, 1, 1]
    part = sample_images(pipeline, range(2), 0, 5, guidance_scale=3.0, guidance_interval=(low, high))
    assert batches == [2, 4, 4, 2, 2]
    whole, none = (sample_images(pipeline, range(2), 0, 5, guidance_scale=scale) for scale in (3.0, 1.0))
    assert not torch.equal(part, whole)
    assert not torch.equal(part, none)
    nowhere = sample_images(pipeline, range(2), 0, 5, guidance_scale=3.0, guidance_interval=(1e6, math.inf))
    assert torch.equal(nowhere, none)


def test_a_zero_terminal_snr_is_an_infinite_noise_level():
    options = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"}
    scheduler = DDPMScheduler(num_train_timesteps=20, **options)
    scales = guidance_scales(scheduler, denoising_steps(scheduler, 4), 2.0, (0.0, math.inf))
    assert scales == [2.0] * 4
    assert guidance_scales(scheduler, denoising_steps(scheduler, 4), 2.0, (0.0, 1e6))[0] == 1


def test_an_image_depends_on_its_seed_number_and_class_alone(pipeline):
    def sample(indices, **options):
        return sample_images(
            pipeline, indices, **{"seed": 3, "num_inference_steps": 6, "guidance_scale": 2.0} | options
        )

    alone = sample([7], class_labels=[1])
    for indices, labels in (([7, 1], [1, 2]), ([0, 1, 2, 7], [0, 0, 0, 1]), (range(8), None)):  # 7 mod 3 is 1
        images = sample(indices, class_labels=labels)[list(indices).index(7)]
        assert (images.int() - alone.int()).abs().max() <= 1  # another batch size may round otherwise
    assert not torch.equal(alone, sample([7], class_labels=[2]))
    assert not torch.equal(alone, sample([7], class_labels=[1], seed=4))
    balanced = sample(range(5))
    assert torch.equal(balanced, sample(range(5), class_labels=[0, "dog", "frog", "cat", 1]))


def test_the_noise_of_an_image_is_the_same_for_every_class():
    """The class moves the image through the network alone: one that knows no class makes equal images of all."""
    pipeline = quiet(tiny_conditional_pipeline())
    pipeline.unet.class_embedding.weight.data.zero_()
    first, second = (sample_images(pipeline, range(2), 0, 5, class_labels=labels) for labels in ([0, 1], [2, 2]))
    assert torch.equal(first, second)


def test_a_network_with_classes_needs_no_names_of_them(pipeline):
    """During training there may be none."""
    ours = quiet(DDPMPipeline(pipeline.unet, pipeline.scheduler))
    assert torch.equal(sample_images(ours, range(4), num_inference_steps=3), sample_images(pipeline, range(4), 0, 3))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"class_labels": [0]}, "1 class_labels for 2 images"),
        ({"class_labels": ["cta", 0]}, "no class 'cta'; the nearest name is 'cat'"),
        ({"class_labels": [0, 3]}, r"no class 3: the numbers are \[0, 3\)"),
        ({"guidance_scale": -1}, "guidance_scale=-1 must be in"),
        ({"guidance_scale": math.nan}, "guidance_scale=nan must be in"),
        ({"guidance_interval": (2, 1)}, r"guidance_interval=\(2, 1\) must be"),
        ({"guidance_interval": (-1, 1)}, r"guidance_interval=\(-1, 1\) must be"),
        ({"guidance_interval": (0, math.nan)}, r"guidance_interval=\(0, nan\) must be"),
    ],
)
def test_what_cannot_be_sampled_is_refused(pipeline, options, match):
    with pytest.raises(ValueError, match=match):
        sample_images(pipeline, range(2), **options)


@pytest.mark.parametrize("options", [{"class_labels": [0, 1]}, {"guidance_scale": 2.0}])
def test_an_unconditional_model_has_neither_classes_nor_guidance(options):
    (name,) = options
    with pytest.raises(ValueError, match=f"{name} needs a class-conditional model, and this one is unconditional"):
        sample_images(quiet(tiny_pipeline()), range(2), **options)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_guided_loop_never_waits_for_the_device():
    pipeline = quiet(tiny_conditional_pipeline(DDPMScheduler())).to("cuda")
    options = {"guidance_scale": 2.0, "guidance_interval": (0.2, 5.0)}
    sample_images(pipeline, range(4), 0, 5, **options)  # the first call initialises libraries

    def guarded(steps):
        torch.cuda.set_sync_debug_mode("error")
        yield from steps
        torch.cuda.set_sync_debug_mode("default")

    pipeline.progress_bar = guarded
    try:
        assert sample_images(pipeline, range(4), 0, 60, **options).shape == (4, 1, 8, 8)
    finally:
        torch.cuda.set_sync_debug_mode("default")
