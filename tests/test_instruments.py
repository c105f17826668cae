"""The instruments in benchmarks/: what they compute, by closed form, and that they run."""

import json
import multiprocessing
import os
import subprocess
import sys
from functools import partial
from itertools import chain, repeat
from types import SimpleNamespace

import pytest
import torch
from conftest import REPOSITORY, TINY_UNET, fork_all_but_the_first
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from tiny_networks import tiny_vae

sys.path.insert(0, str(REPOSITORY / "benchmarks"))
import cached_latents
import density_learning
import gradient_probe
import method_pictures
import run_costs
import sampler_cost
import swap_test
import throughput
import training_memory

from images import open_images, sample_posterior
from images.encoding import encode
from recipes import parse_options
from samplers import METHODS, NoiseSchedule, checked_weights, epsilon_loss_scale
from training.network import build_network
from training.options import TrainingOptions

T = 100


@pytest.fixture
def pipelines(tmp_path):
    """Folders of two tiny pipelines with different random weights, for 8x8 grey images."""
    folders = []
    for seed in range(2):
        torch.manual_seed(seed)
        unet = UNet2DModel(sample_size=8, in_channels=1, out_channels=1, **TINY_UNET)
        folders.append(str(tmp_path / f"pipeline{seed}"))
        DDPMPipeline(unet, DDPMScheduler(num_train_timesteps=T)).save_pretrained(folders[-1])
    return folders


# As `python benchmarks/NAME.py` does: its folder is where Python looks first, and nobody has named the repository
IMPORT_EACH = """
import importlib, sys
from pathlib import Path

found, folder = sys.path[1:], Path(sys.argv[1])
for script in sorted(folder.glob("*.py")):
    if "__main__" in script.read_text():
        sys.path[:] = [str(folder), *found]
        for name, module in [*sys.modules.items()]:
            file = str(getattr(module, "__file__", None) or "")
            if file.startswith(f"{folder.parent}/") and not file.startswith(sys.prefix):  # an environment may be inside
                del sys.modules[name]
        importlib.import_module(script.stem)
        print(script.stem)
"""


def test_every_benchmark_finds_the_project_by_itself(tmp_path):
    benchmarks = REPOSITORY / "benchmarks"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", IMPORT_EACH, str(benchmarks)]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    assert {"density_learning", "throughput"} < set(run.stdout.split())


def test_moments_of_gradients_with_a_known_mean():
    """A partner of c times the same noise, plus other noise: its cosine is (|mean|^2 + 5c) / (|mean|^2 + 5)."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(20_000, 2, 5, generator=generator)
    own, other = noise.unbind(1)
    mean = torch.arange(5.0)
    shared = dict(zip(gradient_probe.PARTNERS, (-1.0, -0.8, -0.6, 0.6, 0.0), strict=True))
    partners = [c * own + (1 - c * c) ** 0.5 * other for c in shared.values()]
    moments = gradient_probe.moments_of(mean + torch.stack([own, *partners], 1))
    square = float(mean.square().sum())
    assert moments["second_moment"] == pytest.approx(square + 5, rel=0.02)
    assert moments["mean_square"] == pytest.approx(square, rel=0.02)
    for name, c in shared.items():
        assert moments[f"cosine of {name}"] == pytest.approx((square + 5 * c) / (square + 5), abs=0.02), name


def test_the_best_density_has_a_relative_variance_of_one():
    """With G_t ∝ E[l_t] that is sqrt(E[l_t]), and the uniform one's variance is given by Cauchy-Schwarz."""
    schedule = NoiseSchedule.from_scheduler(DDPMScheduler(num_train_timesteps=T))
    timesteps = list(range(5, T, 10))
    losses = torch.exp(-torch.arange(10.0))[:, None].expand(10, 4)
    objectives = {name: checked_weights(name, schedule) for name in ("none", "min_snr", "p2", "bell")}
    ratios = gradient_probe.relative_variances(7 * losses.mean(1), losses, objectives, timesteps, torch.ones(T))
    assert set(ratios) == set(objectives)
    for name, ratio in ratios.items():
        assert ratio["root_mean_loss"] == pytest.approx(1, rel=1e-5), name
    root = losses[:, 0].sqrt()
    assert ratios["none"]["uniform"] == pytest.approx(float(10 * root.square().sum() / root.sum() ** 2), rel=1e-5)
    assert ratios["none"]["root_mean_square_loss"] > 1.1
    scale = epsilon_loss_scale(schedule, "v_prediction")
    G = scale[timesteps] * losses.mean(1)
    ratios = gradient_probe.relative_variances(G, losses, objectives, timesteps, scale)
    assert ratios["none"]["root_mean_loss"] == pytest.approx(1, rel=1e-5)


def test_what_a_density_has_learned_is_recorded_from_losses_that_are_kept(tmp_path, monkeypatch):
    smoothings = ("each timestep by itself", "nearest 40 draws, twice")
    monkeypatch.setattr(
        density_learning, "SMOOTHINGS", {name: density_learning.SMOOTHINGS[name] for name in smoothings}
    )
    files = ["--losses", str(tmp_path / "made" / "losses.pt"), "--output_json", str(tmp_path / "learning.json")]
    sizes = ["--train_updates", "1", "--train_batch_size", "2", "--losses_per_timestep", "1", "--seeds", "1"]
    unet = '{"block_out_channels": [8, 8], "norm_num_groups": 4}'
    density_learning.main([*files, *sizes, "--draws", "20", "60", "--", "--dataset_name", "digits", "--unet", unet])
    record = json.loads((tmp_path / "learning.json").read_text())["excess_variance"]
    own = ("epsilon, scaled_logit_normal", "flow, scaled_logit_normal")
    assert set(record) == {"epsilon, none", "flow, flow", *own}
    for case, result in record.items():
        assert 0 < result["known"] < result["uniform"], case
        for batches in ("batches of 1", "batches of 4"):
            assert list(result[batches]) == list(smoothings)
            assert all(row["60"][0] >= 0 for row in result[batches].values())
    losses = torch.load(tmp_path / "made" / "losses.pt")
    assert losses["flow"]["flow"].shape == (1000, 1)


def test_the_gradient_probe_runs(pipelines, tmp_path):
    options = gradient_probe.ProbeOptions(
        pipeline=pipelines[0], output_json=str(tmp_path / "probe.json"), num_bins=4, examples=3, device="cpu"
    )
    gradient_probe.main(options)
    results = json.loads((tmp_path / "probe.json").read_text())
    assert results["timesteps"] == [12, 37, 62, 87]
    for metric in results["metrics"].values():
        assert all(moment > 0 for moment in metric["second_moment"])
        assert all(ratio >= 0.999 for ratio in metric["relative_variance"]["bell"].values())


def test_a_swapped_network_is_the_strong_one_in_its_segment_alone():
    weak, strong = torch.nn.Module(), torch.nn.Module()
    weak.forward, strong.forward = lambda x, t, class_labels: "weak", lambda x, t, class_labels: "strong"
    weak.config, weak.dtype, weak.device = {}, torch.float32, torch.device("cpu")
    unet = swap_test.SwappedUNet(weak, strong, 10, 20)
    assert [unet(None, torch.tensor([t])) for t in (9, 10, 19, 20)] == ["weak", "strong", "strong", "weak"]


def test_the_swap_test_runs(pipelines, regnet, tmp_path):
    weak, strong = pipelines
    options = swap_test.SwapOptions(
        weak=weak,
        strong=strong,
        output_json=str(tmp_path / "swap.json"),
        boundaries=[0, 50, T],
        eval_num_images=330,
        eval_num_inference_steps=2,
        eval_feature_extractor=regnet,
    )
    swap_test.main(options)
    results = json.loads((tmp_path / "swap.json").read_text())
    assert results["weak"] != results["strong"]
    assert [row["segment"] for row in results["segments"]] == [[0, 50], [50, T]]
    assert sum(row["share_of_nats"] for row in results["segments"]) == pytest.approx(1, rel=1e-4)


def test_the_benchmark_of_cached_latents_runs_the_same_network_on_both(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["benchmarks/cached_latents.py"])
    tiny_vae().save_pretrained(tmp_path / "vae")
    path = tmp_path / "cached_latents.json"
    flags = ["--dataset_name", "digits", "--vae", tmp_path / "vae", "--latents_dir", tmp_path / "latents"]
    flags += ["--model", "dit", "--dit", '{"num_layers": 1, "num_attention_heads": 1, "attention_head_dim": 8}']
    flags += ["--class_conditional", "--random_flip", "--repeats", 2, "--steps_per_repeat", 1, "--output_json", path]
    cached_latents.main(parse_options(cached_latents.CachedLatentsOptions, [str(flag) for flag in flags]))
    results = json.loads(path.read_text())
    rates = results["steps_per_second"]
    assert rates["cached"]["min"] > 0 < rates["online"]["min"]
    ratio = results["cached_over_online"]
    assert ratio["min"] <= ratio["median"] <= ratio["max"]
    with pytest.raises(SystemExit, match="--vae: must be given"):
        cached_latents.main(parse_options(cached_latents.CachedLatentsOptions, ["--dataset_name", "digits"]))


def test_encoding_a_batch_is_drawing_from_the_posterior_that_is_cached():
    """In double precision of neither: float16 is what the cache rounds to."""
    vae, images = tiny_vae(), open_images("digits", split="train[:4]").decode_all(show_progress=False)
    flips, noise = torch.tensor([True, False, False, True]), torch.randn(4, 1, 4, 4)
    moments = encode(vae, images, mirrored=True).half()
    expected = sample_posterior(moments, noise, flips)
    found = cached_latents.encoder(vae)(images, flips, lambda shape: noise.view(shape))
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3)


def fork_contestants(monkeypatch, after):
    """Let so many contestants have an interpreter of their own, as they do in use; then, fork them from the server."""
    methods = chain(repeat("spawn", after), repeat("forkserver"))
    contexts = SimpleNamespace(get_context=lambda _: multiprocessing.get_context(next(methods)))
    monkeypatch.setattr(throughput, "multiprocessing", contexts)


def test_the_memory_of_a_step_is_counted_from_shapes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(training_memory, "CASES", {f"of {n}": ("unet", n, 3, 8) for n in (2, 4)})
    path = tmp_path / "memory.json"
    training_memory.main(training_memory.MemoryOptions(str(path)))
    record = json.loads(path.read_text())
    two, four = record["networks"].values()
    unet = build_network(TrainingOptions(), 3, 8)
    assert two["parameters"] == four["parameters"] == sum(parameter.numel() for parameter in unet.parameters())
    assert two["bytes_of_weights_and_the_like"] == 5 * 4 * two["parameters"]
    assert four["bytes_of_activations"] == 2 * two["bytes_of_activations"]
    assert four["bytes_with_gradient_checkpointing"] < four["bytes_of_activations"]
    assert f"{two['parameters']:,}" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="is there already"):
        training_memory.main(training_memory.MemoryOptions(str(path)))


def test_the_throughput_benchmark_runs(tmp_path, monkeypatch):
    fork_contestants(monkeypatch, after=1)
    monkeypatch.setattr(sys, "argv", ["benchmarks/throughput.py"])
    path = tmp_path / "throughput.json"
    flags = ["--dataset_name", "digits", "--resolution", 8, "--unet", json.dumps(TINY_UNET), "--repeats", 1]
    flags += ["--steps_per_repeat", 1, "--sampling_batch_size", 2, "--sampling_steps", 2, "--data_images", 64]
    flags = [str(flag) for flag in [*flags, "--output_json", path]]
    throughput.main(parse_options(throughput.ThroughputOptions, flags))
    results = json.loads(path.read_text())
    for kind in ("training", "sampling"):
        rates = results[f"{kind}_images_per_second"]
        ratio = rates["ours"]["median"] / rates["diffusers"]["median"]
        assert rates["ours_over_diffusers"]["median"] == pytest.approx(ratio, rel=1e-6)
    assert set(results["sampler_milliseconds"]) == set(METHODS)
    assert 0 < results["arithmetic"]["fraction"] < 1
    assert 0 < results["convolutions_share_of_step"] < 1
    assert all(memory > 100 for memory in results["peak_memory_mib"].values())


def test_the_share_of_convolutions_is_that_of_the_time():
    images, matrix = torch.randn(8, 32, 32, 32, requires_grad=True), torch.randn(400, 400)
    convolution = torch.nn.Conv2d(32, 32, 3)
    share = partial(throughput.share_of_convolutions, device=torch.device("cpu"))
    assert share(lambda: [matrix @ matrix for _ in range(20)]) == 0
    assert share(lambda: convolution(images).sum().backward()) > 0.5
    assert 0 < share(lambda: (convolution(images).sum().backward(), [matrix @ matrix for _ in range(20)])) < 1


def test_the_arithmetic_of_a_step_is_that_of_its_convolutions_and_products():
    """Without attention: as much again for the gradients by weights and by inputs, but for the first layers' inputs."""
    blocks = {"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2, "add_attention": False}
    flags = ["--dataset_name", "digits", "--resolution", "8", "--unet", json.dumps(TINY_UNET | blocks)]
    options = parse_options(throughput.ThroughputOptions, flags)
    unet = throughput.build_network(options, channels=1, resolution=8)
    forward = {}

    def count(layer, _, output):
        forward[layer] = 2 * layer.weight[0].numel() * output.numel()

    for layer in unet.modules():
        if isinstance(layer, (torch.nn.Conv2d, torch.nn.Linear)):
            layer.register_forward_hook(count)
    unet(torch.randn(1, 1, 8, 8), 0)
    for block in unet.up_blocks:
        for upsampler in block.upsamplers or ():
            forward[upsampler.conv] *= 4 / 9
    first_layers = forward[unet.conv_in] + forward[unet.time_embedding.linear_1]
    expected = 3 * sum(forward.values()) - first_layers

    found = throughput.arithmetic(throughput.make_accelerator(options), (1, 8, 8), options, images_per_second=500)
    assert found["gflop_per_image"] == pytest.approx(expected / 1e9, rel=1e-6)
    assert found["fraction"] == pytest.approx(500 * expected / 1e12 / found["matrix_product_tflop_per_second"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data_images", "8", "--train_batch_size", "16"], r"--data_images 8, of 1797: must be at least"),
        (["--unet", '{"norm_num_groups": 5}'], "a contestant has failed"),
    ],
)
def test_a_throughput_benchmark_that_cannot_be_ends_with_a_message(flags, message, monkeypatch):
    fork_contestants(monkeypatch, after=0)
    options = parse_options(throughput.ThroughputOptions, ["--resolution", "8", *flags])
    with pytest.raises(SystemExit, match=message):
        throughput.main(options)


def test_the_run_costs_benchmark_runs(tmp_path, monkeypatch):
    fork_all_but_the_first(run_costs, monkeypatch)
    flags = ["--resolution", 8, "--unet", json.dumps(TINY_UNET), "--train_batch_size", 4, "--ddpm_num_steps", 20]
    flags += ["--ddpm_num_inference_steps", 2]
    own = ["--num_processes", 2, "--steps", 2, "--repeats", 1, "--output_json", tmp_path / "costs.json"]
    run_costs.main([str(part) for part in [*own, "--", *flags]])
    (costs,) = json.loads((tmp_path / "costs.json").read_text())["processes"].values()
    assert set(costs) == {"images_per_second", "start_up_seconds", "save_seconds"}
    assert all(row["min"] > 0 for row in costs.values())


def test_a_batch_that_cannot_be_shared_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="--num_processes 3: must divide"):
        run_costs.main(["--num_processes", "3", "--output_json", "x.json", "--", "--train_batch_size", "4"])


def test_the_pictures_of_the_method_are_made_and_small(tmp_path):
    method_pictures.main(method_pictures.PictureOptions(output_dir=str(tmp_path)))
    made = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert set(made) == {path.name for path in (REPOSITORY / "docs").glob("method_*.png")}
    assert max(made.values()) < 100_000


def test_the_cost_of_a_sampler_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(sampler_cost, "CALLS", 2)
    monkeypatch.setattr(sampler_cost, "STEPS", 1)
    path = tmp_path / "cost.json"
    sampler_cost.main(sampler_cost.SamplerCostOptions(output_json=str(path), repeats=1))
    results = json.loads(path.read_text())
    for method in ("adaptive", "ddpm"):
        parts = [
            results["microseconds"][f"{method}.{name}"]["median"] for name in ("sample", "noise", "losses", "update")
        ]
        assert results["microseconds"][method]["median"] == pytest.approx(sum(parts))
        share = results["microseconds"][method]["median"] / results["microseconds"]["step"]["median"]
        assert results["share_of_step"][method] == pytest.approx(share)


def test_the_replay_of_a_call_has_its_tensor_operations(monkeypatch):
    monkeypatch.setattr(sampler_cost, "CALLS", 3)
    total = torch.zeros(2)
    replay = sampler_cost.replay_of(lambda: total.add_(1))
    assert total.tolist() == [3, 3]
    replay()
    assert total.tolist() == [4, 4]


def test_rings_of_frequencies_have_the_cycles_of_fft2():
    """One wave of (2, 1) cycles an image has all its power in the ring of their length, rounded."""
    i = torch.arange(8.0)
    wave = torch.cos(2 * torch.pi * (2 * i[:, None] + i[None]) / 8)
    power = torch.fft.fft2(wave).abs().square()[None]
    rings, lengths = method_pictures.rings_of(power)
    means = method_pictures.by_ring(power, rings)
    assert [int(length) for length, mean in zip(lengths, means, strict=True) if mean > 1e-6] == [2]
