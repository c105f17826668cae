"""The main job, on real digits: images in, a stock diffusers pipeline out."""

import json
import math
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
import torch_fidelity
from conftest import ADAPTING, COMPILED_UNET, REPOSITORY, TINY, TINY_UNET, forked
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.training_utils import EMAModel
from PIL import Image
from safetensors.torch import load_file

from images import open_images
from pipelines import sample_images
from samplers import METHODS
from scoring.feature_extractors import load_extractor
from training.denoiser import Denoiser
from training.options import TrainingOptions
from training.state import build_average

# Adam turns rounding into steps of full length where a gradient is zero (attention's key bias), and flips the signs of
# small ones; with a large epsilon it is SGD with momentum, under which equal gradients stay equal within rounding.
SMOOTH = ("--unet", json.dumps({**TINY_UNET, "dropout": 0.0}), "--adam_epsilon", "1", "--learning_rate", "0.1")


def weights(folder):
    return load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")


def distance(a, b):
    """Largest relative difference between two sets of weights."""
    return max(float((a[k] - b[k]).norm() / (b[k].norm() + 1e-12)) for k in b)


def noise_from_image(script):
    """Tie each image's noise to its pixels, in place of its position in the batch."""

    original = Denoiser.epsilon_errors

    def with_own_noise(self, images, noise, timesteps, labels):
        seeds = ((images + 1) * 127.5).round().long().flatten(1) @ torch.arange(1, images[0].numel() + 1)
        noise = [torch.randn(images[0].shape, generator=torch.Generator().manual_seed(int(s))) for s in seeds]
        return original(self, images, torch.stack(noise), timesteps, labels)

    Denoiser.epsilon_errors = with_own_noise


def test_a_run_leaves_everything_it_promises(train):
    run = train("run", "--logger", "tensorboard", "--save_images_epochs", 1, "--train_batch_size", 80).wait()
    assert run.folder.joinpath("model_index.json").exists()
    index = json.loads((run.folder / "model_index.json").read_text())
    assert index["_class_name"] == "DDPMPipeline"
    assert index["unet"] == ["diffusers", "UNet2DModel"]
    assert index["scheduler"] == ["diffusers", "DDPMScheduler"]
    assert [r["step"] for r in run.metrics] == [4, 8, 12, 16, 20, 24]
    assert [r["images"] for r in run.metrics] == [80 * r["step"] for r in run.metrics]
    assert run.metrics[-1]["loss"] < run.metrics[0]["loss"]
    for name in ("final", "step-0000023"):  # 23 * 80 is the first multiple of the batch after one epoch of 1797
        assert Image.open(run.folder / "samples" / f"{name}.png").size[0] > 8
    assert Image.open(run.folder / "timestep_density.png").size[0] > 400
    assert list(run.folder.glob("logs/**/events.out.tfevents*"))
    summary = json.loads((run.folder / "training_summary.json").read_text())
    assert set(summary["seconds"]) == {"setup", "train", "save", "preview"}
    assert summary["stopped_by"] == "steps"
    card = (run.folder / "README.md").read_text()
    for part in (
        "digits",
        "adaptive",
        "scaled_logit_normal",
        "max_train_steps 24",
        "samples/final.png",
        "from_pretrained",
    ):
        assert part in card
    assert sorted(p.name for p in run.folder.glob("checkpoint-*")) == ["checkpoint-18", "checkpoint-24"]


def test_the_result_loads_in_diffusers_alone(train, tmp_path):
    run = train("run").wait()
    code = (
        "import sys; from diffusers import DDPMPipeline;"
        f"p = DDPMPipeline.from_pretrained({str(run.folder)!r}); p.set_progress_bar_config(disable=True);"
        "image = p(num_inference_steps=2).images[0]; assert image.size == (8, 8), image.size;"
        "assert not {'samplers', 'pipelines', 'images', 'training'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=120)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns(train, method):
    run = train(method, "--method", method, "--max_train_steps", 60, "--logging_steps", 10).wait()
    uniform_loss = [
        sum(v for v in r["loss_by_timestep"] if v is not None) / sum(v is not None for v in r["loss_by_timestep"])
        for r in run.metrics
    ]
    assert uniform_loss[-1] < 0.8 * uniform_loss[0]


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
def test_prediction_types_and_schedules(train, prediction_type, schedule):
    flags = ("--prediction_type", prediction_type, "--ddpm_beta_schedule", schedule, "--max_train_steps", 8)
    run = train("run", *flags).wait()
    assert all(math.isfinite(r["loss"]) for r in run.metrics)
    scheduler = DDPMPipeline.from_pretrained(run.folder).scheduler.config
    assert (scheduler.prediction_type, scheduler.beta_schedule) == (prediction_type, schedule)


def test_one_guess_has_the_same_epsilon_errors_whatever_it_is_a_prediction_of():
    """A network that guesses some x_0 can say so as eps, v or x_0."""
    images, guess, noise = torch.randn(3, 4, 1, 8, 8).clamp(-1, 1)
    timesteps = torch.tensor([3, 200, 600, 990])
    errors = []
    for prediction_type in ("epsilon", "v_prediction", "sample"):
        scheduler = DDPMScheduler(prediction_type=prediction_type)
        abar = scheduler.alphas_cumprod[timesteps].view(-1, 1, 1, 1)

        def unet(noisy, timesteps, return_dict, prediction_type=prediction_type, abar=abar):
            eps = (noisy - abar.sqrt() * guess) / (1 - abar).sqrt()
            v = abar.sqrt() * eps - (1 - abar).sqrt() * guess
            return [{"epsilon": eps, "v_prediction": v, "sample": guess}[prediction_type]]

        errors.append(Denoiser(unet, scheduler).epsilon_errors(images, noise, timesteps).abs())
    torch.testing.assert_close(errors[1], errors[0], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(errors[2], errors[0], rtol=1e-3, atol=1e-4)


def test_cifar10_recipe_is_ddpm():
    """35.7 M parameters, the settings of google/ddpm-cifar10-32, fixed-large variance, as published."""
    from train_adaptive_ddpm import command_line
    from training.network import build_network
    from training.noise_schedule import build_noise_scheduler

    options = command_line(["--config", str(REPOSITORY / "configs" / "cifar10.yaml")])
    unet = build_network(options, channels=3, resolution=options.resolution)
    assert sum(p.numel() for p in unet.parameters()) == 35_746_307
    published = UNet2DModel(
        act_fn="silu", attention_head_dim=None, block_out_channels=[128, 256, 256, 256], center_input_sample=False,
        down_block_types=["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"], downsample_padding=0,
        flip_sin_to_cos=False, freq_shift=1, in_channels=3, layers_per_block=2, mid_block_scale_factor=1,
        norm_eps=1e-6, norm_num_groups=32, out_channels=3, resnet_time_scale_shift="default", sample_size=32,
        time_embedding_type="positional", up_block_types=["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    )  # fmt: skip
    ours, theirs = ({k: v for k, v in u.config.items() if not k.startswith("_")} for u in (unet, published))
    assert {k: v for k, v in ours.items() if v != theirs[k]} == {"dropout": 0.1}
    assert build_noise_scheduler(options).config.variance_type == "fixed_large"
    assert (options.adam_beta1, options.learning_rate, options.lr_warmup_steps) == (0.9, 2e-4, 5000)
    assert (options.train_batch_size, options.ema_max_decay, options.random_flip) == (128, 0.9999, True)


def test_default_unet_is_ddpms_at_any_resolution():
    from training.unet import default_unet_config

    assert default_unet_config(32)["block_out_channels"] == [128, 256, 256, 256]
    assert default_unet_config(32)["down_block_types"][1] == "AttnDownBlock2D"
    assert default_unet_config(256)["block_out_channels"] == [128, 128, 256, 256, 512, 512]
    for resolution in (8, 16, 28, 32, 48, 64, 100, 128, 256):
        config = default_unet_config(resolution)
        assert resolution % 2 ** (len(config["block_out_channels"]) - 1) == 0
        assert resolution >> (len(config["block_out_channels"]) - 1) >= 4


def test_accumulated_batches_add_up_to_one(train):
    """With the noise tied to the image, 2 x 8 images with accumulation train as 16 do."""
    flags = (*SMOOTH, *ADAPTING)
    whole = train("whole", *flags, "--train_batch_size", 16, tamper=noise_from_image).wait()
    parts = train(
        "parts", *flags, "--train_batch_size", 8, "--gradient_accumulation_steps", 2, tamper=noise_from_image
    ).wait()
    assert distance(weights(parts.folder), weights(whole.folder)) < 1e-4
    assert parts.metrics[-1]["images"] == whole.metrics[-1]["images"] == 24 * 16
    assert max(parts.metrics[-1]["density"]) > 1.5 * min(parts.metrics[-1]["density"])
    assert parts.metrics[-1]["density"] == pytest.approx(whole.metrics[-1]["density"], rel=1e-3)
    assert parts.metrics[-1]["loss"] == pytest.approx(whole.metrics[-1]["loss"], rel=1e-4)


def train_two_processes(folder, *flags, run=forked):
    """Train as the README says for several processes on a CPU, to the letter by subprocess.run; returns the folder."""
    launch = ["accelerate.commands.launch", "--config_file", REPOSITORY / "accelerate_configs" / "cpu.yaml"]
    command = [sys.executable, "-m", *launch, "--num_processes=2", "--main_process_port=0"]
    command += [REPOSITORY / "train_adaptive_ddpm.py", *TINY, "--output_dir", folder, *flags]
    result = run([str(part) for part in command], capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    return folder


def record_draws(path, script):
    """Keep the timesteps and the noise of every batch that goes through the network."""
    original, batches = Denoiser.epsilon_errors, []

    def recording(self, images, noise, timesteps, labels):
        batches.append((timesteps, noise))
        torch.save(batches, path)
        return original(self, images, noise, timesteps, labels)

    Denoiser.epsilon_errors = recording


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize(("method", "paired"), [("adaptive", True), ("ddpm", False)])
def test_neighbours_in_t_get_opposite_noise_where_the_sampler_says_so(train, tmp_path, method, paired, parts):
    flags = ("--method", method, "--train_batch_size", 32 // parts, "--gradient_accumulation_steps", parts)
    train("run", *flags, "--max_train_steps", 3, tamper=partial(record_draws, tmp_path / "draws.pt")).wait()
    batches = torch.load(tmp_path / "draws.pt")
    for step in range(3):
        step_parts = batches[step * parts : (step + 1) * parts]
        timesteps, noise = (torch.stack(part, 1).flatten(0, 1) for part in zip(*step_parts, strict=True))
        assert torch.equal(noise[:16], -noise[16:]) == paired
        near = float((timesteps[:16] - timesteps[16:]).abs().double().mean())
        assert (near <= 1000 / 16) == paired  # every other gap of those between 32 draws


def test_an_error_filter_changes_what_is_trained_but_not_what_the_losses_by_timestep_mean(train):
    """They are plain mean squares, to be compared between methods; `loss` is what is trained."""
    flags = ("--method", "ddpm", "--max_train_steps", 3, "--logging_steps", 1, "--train_batch_size", 64)
    runs = [train(name, *flags, "--error_filter", name) for name in ("none", "wiener")]
    plain, filtered = (run.wait().metrics[0] for run in runs)
    assert distance(weights(runs[0].folder), weights(runs[1].folder)) > 1e-4
    assert plain["loss_by_timestep"] == filtered["loss_by_timestep"]
    assert plain["loss"] == pytest.approx(sum(plain["loss_by_timestep"]) / 20, rel=0.1)
    assert abs(filtered["loss"] / plain["loss"] - 1) > 0.01


@pytest.mark.parametrize(("sampler", "run"), [("adaptive", subprocess.run), ("speed", forked)])
def test_two_processes_match_one_with_twice_the_batch(train, tmp_path, sampler, run):
    """Real processes over gloo. Equality within rounding shows that the ranks see different images, labels, timesteps
    and noise, together those of one process, and that their sampler tables agree."""
    flags = [*SMOOTH, "--timestep_sampler", sampler, "--random_flip"]
    flags += ADAPTING if sampler == "adaptive" else ["--class_conditional", "--class_dropout", 0.5]
    one = train("one", *flags, "--train_batch_size", 16)
    two = train_two_processes(tmp_path / "two", *flags, run=run)
    one.wait()
    assert distance(weights(two), weights(one.folder)) < 1e-4
    states = [torch.load(two / "checkpoint-24" / f"process_state_{rank}.pt") for rank in (0, 1)]
    single = torch.load(one.folder / "checkpoint-24" / "process_state_0.pt")
    probabilities = single["sampler"]["probabilities"]
    assert probabilities.max() > 1.5 * probabilities.min()
    for name, table in states[0]["sampler"].items():
        if torch.is_tensor(table) and name != "pending":  # which holds what each process alone has seen
            assert torch.equal(table, states[1]["sampler"][name]), name
            torch.testing.assert_close(table, single["sampler"][name], rtol=1e-3, atol=1e-4)
    log = [json.loads(line) for line in (two / "metrics.jsonl").read_text().splitlines()]
    for ours, theirs in zip(log, one.metrics, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)
        assert ours["images"] == theirs["images"]


def test_fifty_compiled_steps_match_eager_ones(train):
    flags = (*SMOOTH, *ADAPTING, "--max_train_steps", 50, "--unet", json.dumps(COMPILED_UNET))
    eager, compiled = train("eager", *flags).wait(), train("compiled", *flags, "--compile").wait()
    assert distance(weights(compiled.folder), weights(eager.folder)) < 1e-4
    for name in ("loss", "density", "weight"):
        curves = [np.array([record[name] for record in run.metrics]) for run in (compiled, eager)]
        np.testing.assert_allclose(*curves, rtol=1e-3, err_msg=name)
    assert "warm_up" in json.loads((compiled.folder / "training_summary.json").read_text())["seconds"]


def test_the_average_of_weights_is_that_of_diffusers():
    weights = [torch.nn.Parameter(torch.randn(shape)) for shape in [(3, 4), (5,)]]
    ours = build_average(TrainingOptions(), torch.nn.ParameterList(weights))
    theirs = EMAModel(weights, use_ema_warmup=True, inv_gamma=18, power=1, decay=0.9999)
    for _ in range(20):
        for weight in weights:
            weight.data += torch.randn(weight.shape)
        ours.step(weights)
        theirs.step(weights)
    state, expected = ours.state_dict(), theirs.state_dict()
    torch.testing.assert_close(state.pop("shadow_params"), expected.pop("shadow_params"))
    assert state == expected
    assert ours.cur_decay_value == theirs.cur_decay_value == pytest.approx(19 / (19 + 18))


def test_an_average_goes_on_by_the_flags_of_the_run_that_resumes_it():
    weights = torch.nn.ParameterList([torch.ones(3)])
    first = build_average(TrainingOptions(), weights)
    for _ in range(5):
        first.step(weights)
    with torch.no_grad():
        weights[0].mul_(2)
    for flags, decay in (({"ema_power": 0.75, "ema_inv_gamma": 1.0}, 1 - 6**-0.75), ({"use_ema": False}, 0.0)):
        resumed = build_average(TrainingOptions(**flags), weights)
        resumed.load_state_dict(first.state_dict())
        resumed.step(weights)
        torch.testing.assert_close(resumed.shadow_params[0], torch.full((3,), 2 - decay))


def test_bf16_trains(train):
    run = train("run", "--mixed_precision", "bf16", "--max_train_steps", 8).wait()
    assert weights(run.folder)["conv_in.weight"].dtype == torch.float32
    assert all(math.isfinite(r["loss"]) for r in run.metrics)


def test_time_budget_counts_training_alone(train):
    run = train("run", "--max_train_steps", 100000, "--max_train_seconds", 2, "--save_images_epochs", 1).wait()
    summary = json.loads((run.folder / "training_summary.json").read_text())
    assert summary["stopped_by"] == "seconds"
    assert 2 <= summary["seconds"]["train"] < 4
    assert len(run.metrics) * 4 >= summary["steps"]


# The score during training


def scores(folder):
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: record["fd"] for record in records if "fd" in record}


def test_the_score_in_training_is_that_of_the_saved_pipeline(train, tmp_path, regnet, few_digits):
    """Of the same images, by torch-fidelity; and of two processes that of one."""
    flags = ("--eval_steps", 12, "--eval_num_images", 330, "--eval_num_inference_steps", 3, "--train_batch_size", 16)
    flags = [*SMOOTH, *flags, "--eval_feature_extractor", regnet, "--dataset_name", few_digits]
    two = train_two_processes(tmp_path / "two", *flags, "--train_batch_size", 8)
    run = train("run", *flags).wait()
    assert list(scores(run.folder)) == [12, 24]
    for step, score in scores(run.folder).items():
        assert scores(two)[step] == pytest.approx(score, rel=1e-3)

    pipeline = DDPMPipeline.from_pretrained(run.folder)
    images = sample_images(pipeline, range(330), seed=0, num_inference_steps=3)
    reference = open_images(few_digits).decode_all(show_progress=False)
    assert torch_fidelity_distance(images, reference, regnet) == pytest.approx(scores(run.folder)[24], rel=1e-3)
    seconds = json.loads((run.folder / "training_summary.json").read_text())["seconds"]
    assert seconds["eval"] > seconds["train"] / 20  # timed apart


def torch_fidelity_distance(images, reference, extractor):
    class Images(torch.utils.data.Dataset):
        def __init__(self, images):
            self.images = images.expand(-1, 3, -1, -1)

        def __len__(self):
            return len(self.images)

        def __getitem__(self, index):
            return self.images[index]

    extractor = load_extractor(str(extractor))
    metrics = torch_fidelity.calculate_metrics(
        input1=Images(images),
        input2=Images(reference),
        feature_extractor=extractor.name,
        feature_extractor_weights_path=extractor.weights_path,
        fid=True,
        cuda=False,
        verbose=False,
        save_cpu_ram=True,
    )
    return metrics[torch_fidelity.KEY_METRIC_FID]


def test_scores_come_by_seconds_too(train, regnet, few_digits):
    flags = ("--max_train_steps", 10**6, "--max_train_seconds", 3, "--eval_seconds", 1, "--eval_num_images", 330)
    flags = (*flags, "--eval_num_inference_steps", 2, "--eval_feature_extractor", regnet)
    run = train("run", *flags, "--dataset_name", few_digits).wait()
    assert 1 <= len(scores(run.folder)) <= 3
    refused = train("few", "--eval_steps", 5, "--eval_num_images", 320, "--eval_feature_extractor", regnet).wait(1)
    assert "--eval_num_images 320: must exceed the extractor's 320 features" in refused.output
