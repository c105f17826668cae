"""The whole chain against diffusers' own pipelines; and image i depends on (seed, i) alone."""

import copy
import itertools

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler
from diffusers.pipelines.ddim import pipeline_ddim
from diffusers.pipelines.ddpm import pipeline_ddpm
from diffusers.schedulers import scheduling_ddim, scheduling_ddpm
from tiny_networks import tiny_unet

from pipelines import load_pipeline, sample_images
from pipelines.noise import image_generators, noise_maps
from pipelines.sampling import check_finite_samples

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def unet():
    return tiny_unet(dropout=0.5)  # so that a network left in training mode shows


def make_pipeline(unet, scheduler):
    pipeline = DDPMPipeline(unet=unet, scheduler=scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def replay(seed, batch_size, shape, count):
    """A stand-in for diffusers' randn_tensor that gives it our noise: first x_T, then a map a step."""
    generators = image_generators(seed, list(range(batch_size)), CPU)
    maps = itertools.chain(noise_maps(generators, shape, 1, CPU), noise_maps(generators, shape, count, CPU))
    return lambda *_, **__: next(maps).clone()


@pytest.mark.parametrize("count", [1, 12, 60])
def test_chain_is_the_stock_ddpm_pipeline(unet, count, monkeypatch):
    scheduler = DDPMScheduler(num_train_timesteps=60)
    noise = replay(5, 3, (1, 8, 8), count - 1)  # the last step, at t = 0, has none
    for module in (pipeline_ddpm, scheduling_ddpm):
        monkeypatch.setattr(module, "randn_tensor", noise)
    stock = DDPMPipeline(unet=unet, scheduler=scheduler)
    stock.set_progress_bar_config(disable=True)
    theirs = stock(batch_size=3, num_inference_steps=count, output_type="np").images
    theirs = torch.from_numpy(theirs).permute(0, 3, 1, 2)
    ours = sample_images(make_pipeline(unet, scheduler), range(3), seed=5, num_inference_steps=count)
    assert ours.dtype == torch.uint8
    assert (ours - theirs * 255).abs().max() < 0.51  # half a grey level: rounding to uint8


@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_chain_is_the_stock_ddim_pipeline(unet, eta, monkeypatch):
    scheduler = DDIMScheduler(num_train_timesteps=100)
    noise = replay(5, 3, (1, 8, 8), 9)
    first = noise()
    monkeypatch.setattr(pipeline_ddim, "randn_tensor", lambda *_, **__: first)
    # the last step's σ is zero: diffusers asks for its noise all the same
    steps = [noise() for _ in range(9)] + [torch.zeros_like(first)]
    monkeypatch.setattr(scheduling_ddim, "randn_tensor", lambda *_, **__: steps.pop(0))
    stock = DDIMPipeline(unet=unet, scheduler=scheduler)
    stock.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 10, "eta": eta, "use_clipped_model_output": True}
    theirs = stock(batch_size=3, output_type="np", **options).images
    theirs = torch.from_numpy(theirs).permute(0, 3, 1, 2)
    ours = sample_images(make_pipeline(unet, scheduler), range(3), seed=5, num_inference_steps=10, eta=eta)
    assert (ours - theirs * 255).abs().max() < 0.51


def test_an_image_does_not_depend_on_its_batch(unet):
    pipeline = make_pipeline(unet, DDPMScheduler(num_train_timesteps=60))
    alone, *others = (sample_images(pipeline, indices, seed=3) for indices in ([7], [7, 1], [0, 1, 2, 7], range(8)))
    for images in others:
        seven = images[[len(images) - 1]] if len(images) > 2 else images[:1]
        assert (seven.int() - alone.int()).abs().max() <= 1  # the network may round otherwise for another batch size
    assert not torch.equal(alone, sample_images(pipeline, [8], seed=3))
    assert not torch.equal(alone, sample_images(pipeline, [7], seed=4))


def test_sampling_leaves_a_training_run_as_it_was(unet):
    scheduler = DDPMScheduler(num_train_timesteps=20)
    before = scheduler.timesteps.clone()
    pipeline = make_pipeline(unet, scheduler)
    expected, state = sample_images(pipeline, range(2)), torch.random.get_rng_state()
    unet.train()
    try:
        images = sample_images(pipeline, range(2))
        assert unet.training
    finally:
        unet.eval()
    assert torch.equal(images, expected)  # dropout was off
    assert torch.equal(scheduler.timesteps, before)
    assert scheduler.num_inference_steps is None
    assert torch.equal(torch.random.get_rng_state(), state)
    images.add_(1)  # an ordinary tensor, not one of inference mode


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_loop_never_waits_for_the_device(unet):
    pipeline = make_pipeline(unet, DDPMScheduler()).to("cuda")

    def guarded(steps):
        torch.cuda.set_sync_debug_mode("error")
        yield from steps
        torch.cuda.set_sync_debug_mode("default")

    sample_images(pipeline, range(4), num_inference_steps=3)  # the first call initialises libraries
    pipeline.progress_bar = guarded
    try:
        assert sample_images(pipeline, range(4), num_inference_steps=60).shape == (4, 1, 8, 8)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        unet.to("cpu")


def test_refuses_an_empty_batch(unet):
    with pytest.raises(ValueError, match="indices is empty"):
        sample_images(make_pipeline(unet, DDPMScheduler()), [])


def test_images_that_are_not_finite_are_refused_by_number(unet):
    pipeline = make_pipeline(copy.deepcopy(unet), DDPMScheduler(num_train_timesteps=20))
    with torch.no_grad():
        pipeline.unet.conv_in.bias.fill_(3e38)  # finite itself; its square is not
        with pytest.raises(FloatingPointError, match=r"2 of 2 images .* number 5; .*its arithmetic overflows"):
            sample_images(pipeline, [5, 6])
        pipeline.unet.conv_in.weight[0] = torch.nan
    with pytest.raises(FloatingPointError, match=r"neither are the weights of its UNet2DModel \(conv_in\.weight, "):
        sample_images(pipeline, [5, 6])


def test_one_image_that_is_not_finite_is_told_from_the_others(unet):
    images = torch.zeros(3, 1, 2, 2)
    check_finite_samples(unet, images, [7, 8, 9])
    images[1, 0, 1, 1] = torch.inf
    with pytest.raises(FloatingPointError, match=r"1 of 3 images .* number 8;"):
        check_finite_samples(unet, images, [7, 8, 9])


@pytest.mark.parametrize("scheduler", [DDPMScheduler(num_train_timesteps=20), DDIMScheduler(num_train_timesteps=20)])
def test_stock_folders_are_sampled_alike(unet, scheduler, tmp_path):
    DDPMPipeline(unet=unet, scheduler=scheduler).save_pretrained(tmp_path / "stock")
    ours = load_pipeline(str(tmp_path / "stock"))
    ours.set_progress_bar_config(disable=True)
    assert type(ours) is DDPMPipeline
    assert type(ours.scheduler) is type(scheduler)
    expected = sample_images(make_pipeline(unet, scheduler), range(2), num_inference_steps=5)
    assert torch.equal(sample_images(ours, range(2), num_inference_steps=5), expected)
