"""The sampling loop against diffusers' own schedulers and pipelines, and against the paper."""

import copy
import itertools

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, DiffusionPipeline, UNet2DModel
from diffusers.pipelines.ddim import pipeline_ddim
from diffusers.pipelines.ddpm import pipeline_ddpm
from diffusers.schedulers import scheduling_ddim, scheduling_ddpm

from pipelines import UnconditionalPipeline, denoising_steps, load_configs, make_grid_image, unconditional
from pipelines.unconditional import denoise_step, image_generators, image_seed, noise_maps

CPU = torch.device("cpu")
CLIPS = ({"clip_sample": False}, {"clip_sample": True}, {"clip_sample": True, "clip_sample_range": 0.5})
SPACINGS = (
    {"timestep_spacing": "leading"},
    {"timestep_spacing": "trailing"},
    {"timestep_spacing": "linspace"},
)
OFFSETS = ({"steps_offset": 0}, {"steps_offset": 1})


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        dropout=0.5,  # so that a network left in training mode shows
    ).eval()


def make_pipeline(unet, scheduler):
    pipeline = UnconditionalPipeline(unet=unet, scheduler=scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


# The step


def assert_steps_agree(scheduler, count, monkeypatch, **step_kwargs):
    """Every step of the chain from the same x_t, output and noise; `scheduler` decides what is expected."""
    steps = denoising_steps(scheduler, count, **step_kwargs)
    scheduler.set_timesteps(count)
    assert [step.timestep for step in steps] == scheduler.timesteps.tolist()
    generator = torch.Generator().manual_seed(0)
    clip = scheduler.config.clip_sample_range if scheduler.config.clip_sample else None
    for step in steps:
        x, output, noise = torch.randn(3, 2, 1, 4, 4, generator=generator)
        for module in (scheduling_ddpm, scheduling_ddim):
            monkeypatch.setattr(module, "randn_tensor", lambda *_, noise=noise, **__: noise)
        theirs = scheduler.step(output, torch.tensor(step.timestep), x, **step_kwargs).prev_sample
        ours = denoise_step(step, x, output, noise if step.sigma > 0 else None, clip)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5, msg=lambda m: f"{scheduler.config}: {m}")


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_small_log", "fixed_large"])
def test_ddpm_step_is_diffusers(prediction_type, variance_type, monkeypatch):
    for clip, spacing, offset, zero_snr in itertools.product(CLIPS, SPACINGS, OFFSETS, (False, True)):
        if zero_snr and prediction_type == "epsilon":
            continue  # x_0 is not to be had from ε alone where the signal is zero: infinite in diffusers
        scheduler = DDPMScheduler(
            prediction_type=prediction_type,
            variance_type=variance_type,
            rescale_betas_zero_snr=zero_snr,
            **clip | spacing | offset,
        )
        assert_steps_agree(scheduler, 7, monkeypatch)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_ddim_step_is_diffusers(prediction_type, eta, monkeypatch):
    for clip, spacing, offset, to_one in itertools.product(CLIPS, SPACINGS, OFFSETS, (False, True)):
        scheduler = DDIMScheduler(
            prediction_type=prediction_type,
            rescale_betas_zero_snr=prediction_type != "epsilon",
            set_alpha_to_one=to_one,
            **clip | spacing | offset,
        )
        assert_steps_agree(scheduler, 7, monkeypatch, eta=eta)


@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"])
def test_all_steps_of_a_full_chain(beta_schedule, monkeypatch):
    assert_steps_agree(DDPMScheduler(beta_schedule=beta_schedule), 1000, monkeypatch)


def test_fixed_large_log_is_the_variance_it_means():
    """diffusers' own step is NaN here: it takes the square root of log(β_t)."""
    log, plain = (DDPMScheduler(variance_type=kind) for kind in ("fixed_large_log", "fixed_large"))
    assert denoising_steps(log, 10) == denoising_steps(plain, 10)


def test_trailing_steps_never_leave_the_table():
    scheduler = DDPMScheduler(timestep_spacing="trailing")
    scheduler.set_timesteps(61)
    assert scheduler.timesteps[-1] == -1  # diffusers' rounding, and why it is cut off here
    timesteps = [step.timestep for step in denoising_steps(scheduler, 61)]
    assert len(timesteps) == 61
    assert timesteps[-1] >= 0


# Skip schedules


def official_quadratic(trained, count):
    """`runners/diffusion.py` of the DDIM authors' code."""
    return [int(s) for s in list(np.linspace(0, np.sqrt(trained * 0.8), count) ** 2)]


@pytest.mark.parametrize("count", [2, 10, 20, 100, 1000])
def test_quadratic_timesteps_are_the_official_ones(count):
    steps = denoising_steps(DDIMScheduler(), count, skip_schedule="quadratic")
    assert [step.timestep for step in steps] == sorted(set(official_quadratic(1000, count)), reverse=True)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_quadratic_step_is_equation_12(eta):
    scheduler = DDIMScheduler(clip_sample=False)
    steps = denoising_steps(scheduler, 10, eta, "quadratic")
    previous = [step.timestep for step in steps[1:]] + [-1]
    x, output, noise = torch.randn(3, 2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    for step, s in zip(steps, previous, strict=True):
        a_t, a_s = (
            scheduler.alphas_cumprod[step.timestep],
            scheduler.alphas_cumprod[s] if s >= 0 else torch.tensor(1.0),
        )
        sigma = eta * ((1 - a_s) / (1 - a_t)).sqrt() * (1 - a_t / a_s).sqrt()
        x0 = (x - (1 - a_t).sqrt() * output) / a_t.sqrt()
        expected = a_s.sqrt() * x0 + (1 - a_s - sigma**2).sqrt() * output + sigma * noise
        ours = denoise_step(step, x, output, noise, None)
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_ddpm_walks_a_quadratic_subsequence_as_diffusers_walks_custom_timesteps(monkeypatch):
    scheduler = DDPMScheduler()
    steps = denoising_steps(scheduler, 10, skip_schedule="quadratic")
    scheduler.set_timesteps(timesteps=[step.timestep for step in steps])
    x, output, noise = torch.randn(3, 2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *_, **__: noise)
    for step in steps:
        theirs = scheduler.step(output, torch.tensor(step.timestep), x).prev_sample
        torch.testing.assert_close(denoise_step(step, x, output, noise, 1.0), theirs, rtol=1e-5, atol=1e-5)


# The whole chain


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
    ours = make_pipeline(unet, scheduler).sample(range(3), seed=5, num_inference_steps=count)
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
    theirs = stock(batch_size=3, num_inference_steps=10, eta=eta, output_type="np").images
    theirs = torch.from_numpy(theirs).permute(0, 3, 1, 2)
    ours = make_pipeline(unet, scheduler).sample(range(3), seed=5, num_inference_steps=10, eta=eta)
    assert (ours - theirs * 255).abs().max() < 0.51


# One stream of noise for each image


def test_an_image_does_not_depend_on_its_batch(unet):
    pipeline = make_pipeline(unet, DDPMScheduler(num_train_timesteps=60))
    alone, *others = (pipeline.sample(indices, seed=3) for indices in ([7], [7, 1], [0, 1, 2, 7], range(8)))
    for images in others:
        seven = images[[len(images) - 1]] if len(images) > 2 else images[:1]
        assert (seven.int() - alone.int()).abs().max() <= 1  # the network may round otherwise for another batch size
    assert not torch.equal(alone, pipeline.sample([8], seed=3))
    assert not torch.equal(alone, pipeline.sample([7], seed=4))


def test_noise_is_the_same_bits_in_every_batch_and_new_at_every_step():
    shape, count = (1, 8, 8), 120  # three draws
    alone = torch.stack([m.clone() for m in noise_maps(image_generators(1, [5], CPU), shape, count, CPU)])
    both = torch.stack([m.clone() for m in noise_maps(image_generators(1, [9, 5], CPU), shape, count, CPU)])
    assert alone.shape == (count, 1, *shape)
    assert torch.equal(alone[:, 0], both[:, 1])
    assert len(torch.unique(alone[..., 0, 0])) == count
    assert abs(alone.mean()) < 0.05
    assert abs(alone.std() - 1) < 0.05


def test_large_images_draw_fewer_steps_at_once(monkeypatch):
    monkeypatch.setattr(unconditional, "NOISE_VALUES", 3 * 64)
    maps = noise_maps(image_generators(0, [0, 1], CPU), (1, 8, 8), 10, CPU)
    assert next(maps)._base.shape[1] == 3


def test_no_two_images_share_a_generator():
    seeds = {image_seed(seed, index) for seed in range(20) for index in range(1000)}
    assert len(seeds) == 20_000
    for seed in (0, 1, 2**32 - 1):  # the CPU generator reads the low 32 bits only
        assert len({image_seed(seed, index) & 0xFFFFFFFF for index in range(50_000)}) == 50_000
    for bad in ((-1, 0), (2**32, 0), (0, -1), (0, 2**32)):
        with pytest.raises(ValueError, match=r"must be in \[0, 2\*\*32\)"):
            image_seed(*bad)


def test_sampling_leaves_a_training_run_as_it_was(unet):
    scheduler = DDPMScheduler(num_train_timesteps=20)
    before = scheduler.timesteps.clone()
    pipeline = make_pipeline(unet, scheduler)
    expected, state = pipeline.sample(range(2)), torch.random.get_rng_state()
    unet.train()
    try:
        images = pipeline.sample(range(2))
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

    pipeline.sample(range(4), num_inference_steps=3)  # the first call initialises libraries
    pipeline.progress_bar = guarded
    try:
        assert pipeline.sample(range(4), num_inference_steps=60).shape == (4, 1, 8, 8)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        unet.to("cpu")


# Refusals


@pytest.mark.parametrize(
    ("scheduler", "arguments", "error", "match"),
    [
        (DDPMScheduler(thresholding=True), {}, NotImplementedError, "thresholding"),
        (DDPMScheduler(variance_type="learned_range"), {}, NotImplementedError, "learned_range"),
        (DDPMScheduler(prediction_type="flow"), {}, ValueError, "flow"),
        (DDPMScheduler(), {"eta": 0.5}, ValueError, r"eta=0\.5 belongs to DDIM"),
        (DDIMScheduler(), {"eta": 1.5}, ValueError, r"eta=1\.5 must be in \[0, 1\]"),
        (
            DDPMScheduler(),
            {"num_inference_steps": 0},
            ValueError,
            r"num_inference_steps=0 must be in \[1, 1000\]",
        ),
        (DDPMScheduler(), {"num_inference_steps": 1001}, ValueError, r"num_inference_steps=1001"),
        (DDPMScheduler(steps_offset=1), {}, ValueError, "steps_offset=1"),
        (DDIMScheduler(), {"skip_schedule": "cubic"}, ValueError, "cubic"),
        (DDIMScheduler(), {"skip_schedule": "quadratic", "num_inference_steps": 1}, ValueError, "2 or more"),
        (object(), {}, ValueError, "object is not a DDPMScheduler"),
        (DDPMScheduler(rescale_betas_zero_snr=True), {}, ValueError, "'epsilon' with a zero terminal SNR"),
        (DDIMScheduler(rescale_betas_zero_snr=True), {}, ValueError, "'epsilon' with a zero terminal SNR"),
    ],
)
def test_refuses_by_name(scheduler, arguments, error, match):
    with pytest.raises(error, match=match):
        denoising_steps(scheduler, **arguments)


def test_refuses_an_empty_batch(unet):
    with pytest.raises(ValueError, match="indices is empty"):
        make_pipeline(unet, DDPMScheduler()).sample([])


def test_images_that_are_not_finite_are_refused_by_number(unet):
    pipeline = make_pipeline(copy.deepcopy(unet), DDPMScheduler(num_train_timesteps=20))
    with torch.no_grad():
        pipeline.unet.conv_in.bias.fill_(3e38)  # finite itself; its square is not
        with pytest.raises(FloatingPointError, match=r"2 of 2 images .* number 5; .*its arithmetic overflows"):
            pipeline.sample([5, 6])
        pipeline.unet.conv_in.weight[0] = torch.nan
    with pytest.raises(FloatingPointError, match=r"neither are the network's weights \(conv_in\.weight, "):
        pipeline.sample([5, 6])


def test_one_image_that_is_not_finite_is_told_from_the_others(unet):
    pipeline = make_pipeline(unet, DDPMScheduler())
    images = torch.zeros(3, 1, 2, 2)
    pipeline._check_finite(images, [7, 8, 9])
    images[1, 0, 1, 1] = torch.inf
    with pytest.raises(FloatingPointError, match=r"1 of 3 images .* number 8;"):
        pipeline._check_finite(images, [7, 8, 9])


# Folders


@pytest.mark.parametrize("scheduler", [DDPMScheduler(num_train_timesteps=20), DDIMScheduler(num_train_timesteps=20)])
def test_stock_folders_load_and_ours_load_in_stock(unet, scheduler, tmp_path):
    DDPMPipeline(unet=unet, scheduler=scheduler).save_pretrained(tmp_path / "stock")
    ours = UnconditionalPipeline.from_pretrained(tmp_path / "stock")
    ours.set_progress_bar_config(disable=True)
    assert type(ours.scheduler) is type(scheduler)
    assert len(ours(batch_size=2, num_inference_steps=2).images) == 2  # the stock call still works
    ours.save_pretrained(tmp_path / "ours")
    assert type(DiffusionPipeline.from_pretrained(tmp_path / "ours")) is DDPMPipeline
    expected = make_pipeline(unet, scheduler).sample(range(2), num_inference_steps=5)
    assert torch.equal(ours.sample(range(2), num_inference_steps=5), expected)


def test_configs_are_found_in_the_oldest_layout(unet, tmp_path):
    """google/ddpm-cifar10-32 and its siblings keep both configs beside model_index.json."""
    DDPMPipeline(unet=unet, scheduler=DDPMScheduler()).save_pretrained(tmp_path)
    for name in ("unet", "scheduler"):
        for path in (tmp_path / name).iterdir():
            path.rename(tmp_path / path.name)
        (tmp_path / name).rmdir()
    unet_config, scheduler = load_configs(tmp_path)
    assert unet_config["sample_size"] == 8
    assert isinstance(scheduler, DDPMScheduler)


def test_conditional_networks_are_refused(tmp_path):
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        norm_num_groups=4,
        num_class_embeds=10,
    )
    DDPMPipeline(unet=unet, scheduler=DDPMScheduler()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="class-conditional"):
        load_configs(tmp_path)


# Pictures


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_grid_shows_each_image_enlarged(channels, mode):
    images = torch.arange(5, dtype=torch.uint8).mul(50).view(5, 1, 1, 1).expand(5, channels, 8, 8)
    grid = make_grid_image(images, columns=3)
    assert grid.mode == mode
    assert grid.size == (3 * 66 + 2, 2 * 66 + 2)  # 64 pixels each, and two between
    middles = [np.array(grid)[2 + 66 * (i // 3) + 32, 2 + 66 * (i % 3) + 32] for i in range(5)]
    assert [int(np.max(middle)) for middle in middles] == [0, 50, 100, 150, 200]


def test_grid_sizes_and_refusals():
    image = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    assert make_grid_image(image, scale=2).size == (16, 16)
    assert make_grid_image(image.expand(10, 3, 8, 8), scale=1).size == (4 * 10 + 2, 3 * 10 + 2)
    for wrong in (image[:0], image[:, :2], image.float(), image[0]):
        with pytest.raises(ValueError, match="expected uint8"):
            make_grid_image(wrong)
