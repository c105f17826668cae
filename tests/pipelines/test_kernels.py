"""The kernels that are chosen for a device compute what the plain ones do."""

import json
import platform
import sys

import pytest
import torch
from conftest import COMPILED_UNET, TINY_UNET, forked
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from diffusers.models.upsampling import Upsample2D
from torch import nn

from pipelines import choose_kernels, sample_images
from pipelines.group_norm import FusedGroupNorm, fuse_group_norms
from pipelines.kernels import FusedUpsample2D

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
REPLACED = (nn.GroupNorm, Upsample2D)


def unet(settings=TINY_UNET):
    torch.manual_seed(0)
    return UNet2DModel(sample_size=8, in_channels=1, out_channels=1, **{**settings, "dropout": 0.0})


def chosen(device, mixed_precision, compiled):
    """The classes of norms and upsamplers, and the attention processors, that a network is left with."""
    model = unet()
    model.compile = lambda mode: None
    choose_kernels(model, device, mixed_precision, compiled)
    layers = {type(module) for module in model.modules() if isinstance(module, REPLACED)}
    return layers | {type(module.processor) for module in model.modules() if isinstance(module, Attention)}


def output_and_gradient(model, precision="no"):
    x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        output = model(x, torch.arange(4), return_dict=False)[0].float()
    output.square().mean().backward()
    return output.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def relative_error(a, b):
    return ((a - b).norm() / b.norm()).item()


def values_and_gradients(layer, x):
    """[output, gradient by x, gradients by the parameters] for the same random gradient by the output."""
    x = x.clone().requires_grad_()
    output = layer(x)
    gradient = torch.randn(output.shape, generator=torch.Generator().manual_seed(2))
    return [output, *torch.autograd.grad(output, (x, *layer.parameters()), gradient.to(output.dtype))]


def replaced(layer, kind):
    """A layer of another class with the same parameters."""
    other = kind.__new__(kind)
    other.__dict__ = layer.__dict__.copy()
    return other


# Which are chosen


def test_each_device_and_precision_has_its_kernels():
    plain = {nn.GroupNorm, Upsample2D, AttnProcessor2_0}
    assert chosen(CPU, "no", compiled=False) == {nn.GroupNorm, FusedUpsample2D, AttnProcessor2_0}
    assert chosen(CPU, "bf16", compiled=False) == {nn.GroupNorm, FusedUpsample2D, AttnProcessor}
    assert chosen(CPU, "no", compiled=True) == {FusedGroupNorm, FusedUpsample2D, AttnProcessor2_0}
    assert chosen(CUDA, "bf16", compiled=False) == plain
    assert chosen(CUDA, "bf16", compiled=True) == plain


@pytest.mark.parametrize(("precision", "tolerance"), [("no", 1e-5), ("bf16", 0.02)])
def test_a_network_with_other_kernels_is_the_same_network(precision, tolerance):
    plain, other = unet(COMPILED_UNET), unet(COMPILED_UNET)
    choose_kernels(other, CPU, precision, compiled=False)
    fuse_group_norms(other)  # as if compiled
    other.compile(backend="aot_eager")  # traced in the same way, without the wait for a C++ compiler
    assert not any(isinstance(module, nn.SiLU) for block in other.down_blocks for module in block.modules())
    assert dict(other.config) == dict(plain.config)
    assert list(other.state_dict()) == list(plain.state_dict())
    for a, b in zip(output_and_gradient(other, precision), output_and_gradient(plain, precision), strict=True):
        assert relative_error(a, b) < tolerance


# What each computes


def fused(norm, activated=False):
    """A `FusedGroupNorm` with the parameters of a norm."""
    layer = replaced(norm, FusedGroupNorm)
    layer.activated = activated
    return layer


def group_norm(num_groups, num_channels):
    """With random parameters."""
    torch.manual_seed(0)
    norm = nn.GroupNorm(num_groups, num_channels, eps=1e-6)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return norm


@pytest.mark.parametrize("activated", [False, True])
@pytest.mark.parametrize("mean", [0, 100])
@pytest.mark.parametrize("shape", [(3, 96, 8, 8), (2, 32, 5, 7), (4, 64, 10)])
def test_fused_group_norm_is_group_norm_and_silu(shape, mean, activated):
    norm = group_norm(32, shape[1])
    x = mean + torch.randn(shape)
    found = values_and_gradients(fused(norm, activated), x)
    expected = values_and_gradients(nn.Sequential(norm, nn.SiLU()) if activated else norm, x)
    for a, b in zip(found, expected, strict=True):
        assert relative_error(a, b) < (1e-4 if mean else 1e-6)


def test_fused_group_norm_of_a_constant_is_its_bias():
    norm = fused(group_norm(4, 16))
    x = torch.full((2, 16, 9, 9), 3.1, requires_grad=True)
    output = norm(x)
    output.sum().backward()
    assert torch.allclose(output, norm.bias.view(1, -1, 1, 1).expand_as(output), atol=1e-2)
    assert x.grad.isfinite().all()


def test_fused_group_norm_of_large_values_is_finite():
    """The exponential of its SiLU overflows."""
    norm = fused(nn.GroupNorm(4, 16), activated=True)
    nn.init.constant_(norm.weight, 1e4)
    x = torch.randn(2, 16, 9, 9, requires_grad=True)
    output = norm(x)
    output.sum().backward()
    assert output.isfinite().all()
    assert x.grad.isfinite().all()
    assert output.max() > 1e4


def test_fused_group_norm_takes_weights_in_bfloat16():
    norm, x = group_norm(4, 16).bfloat16(), torch.randn(2, 16, 8, 8).bfloat16()
    for a, b in zip(values_and_gradients(fused(norm), x), values_and_gradients(norm, x), strict=True):
        assert a.dtype == b.dtype
        assert relative_error(a.float(), b.float()) < 0.01


def test_fused_group_norm_is_taken_in_float32_and_keeps_the_type():
    norm = fused(group_norm(4, 16), activated=True)
    x = torch.randn(2, 16, 8, 8).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = values_and_gradients(norm, x)
    assert all(torch.equal(a, b) for a, b in zip(found, values_and_gradients(norm, x), strict=True))
    assert found[0].dtype == torch.bfloat16
    assert torch.equal(found[0], norm(x.float()).bfloat16())


def test_compiled_group_norm_keeps_nothing_in_float32_for_the_backward_pass():
    layers = (nn.Conv2d(3, 16, 3, padding=1), fused(group_norm(4, 16), activated=True), nn.Conv2d(16, 4, 1))
    network = torch.compile(nn.Sequential(*layers), backend="aot_eager_decomp_partition")
    kept = []
    with torch.autocast("cpu", torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(kept.append, lambda x: x):
        network(torch.randn(2, 3, 8, 8))
    images = [tensor for tensor in kept if tensor is not None and tensor.shape[2:] == (8, 8)]
    assert {tensor.dtype for tensor in images} == {torch.bfloat16}
    assert len(images) == 3  # the inputs of the three layers


def test_activations_that_are_not_silu_stay_where_they_are():
    model = UNet2DModel(sample_size=8, in_channels=1, out_channels=1, **TINY_UNET, act_fn="gelu")
    fuse_group_norms(model)
    norms = [module for module in model.modules() if isinstance(module, FusedGroupNorm)]
    activated = [norm for norm in norms if norm.activated]
    assert activated == [model.conv_norm_out]  # which UNet2DModel follows by SiLU, whatever `act_fn`
    assert isinstance(model.mid_block.resnets[0].nonlinearity, nn.GELU)


@pytest.mark.parametrize("compiling", [False, True])
@pytest.mark.parametrize("size", [(8, 8), (5, 3), (1, 1)])
def test_fused_upsampling_is_upsampling(size, compiling, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    torch.manual_seed(0)
    layer = Upsample2D(6, use_conv=True, out_channels=4)
    x = torch.randn(2, 6, *size)
    found = values_and_gradients(replaced(layer, FusedUpsample2D), x)
    assert found[0].shape == (2, 4, 2 * size[0], 2 * size[1])
    for a, b in zip(found, values_and_gradients(layer, x), strict=True):
        assert relative_error(a, b) < 1e-5


@pytest.mark.parametrize("compiling", [False, True])
def test_fused_upsampling_under_autocast_is_in_bfloat16(compiling, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    with torch.autocast("cpu", torch.bfloat16):
        assert FusedUpsample2D(6, use_conv=True)(torch.randn(2, 6, 4, 4)).dtype == torch.bfloat16


def test_fused_upsampling_to_a_given_size_is_plain_upsampling():
    layer = Upsample2D(6, use_conv=True)
    x = torch.randn(2, 6, 4, 4)
    assert torch.equal(replaced(layer, FusedUpsample2D)(x, (7, 7)), layer(x, (7, 7)))


FREED_AND_TAKEN_AGAIN = """
import resource, sys, torch
from pipelines.kernels import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
def page_faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
page_faults()
print(page_faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc")
def test_freed_memory_is_used_again_without_page_faults(tmp_path):
    faults = {}
    (tmp_path / "script.py").write_text(FREED_AND_TAKEN_AGAIN)
    for what in ("keep", "give back"):
        done = forked([sys.executable, tmp_path / "script.py", what])
        assert done.returncode == 0, done.stderr
        faults[what] = int(done.stdout)
    assert faults["keep"] < 0.01 * faults["give back"]


# Training and sampling with them


@pytest.mark.parametrize("device", ["cpu", *["cuda"] * torch.cuda.is_available()])
def test_compiled_sampling_makes_the_same_images(device):
    """On a GPU as a CUDA graph, whose output each step overwrites."""
    images = []
    for compiled in (False, True):
        model = unet(COMPILED_UNET).to(device)
        choose_kernels(model, torch.device(device), "no", compiled, mode="reduce-overhead")
        pipeline = DDPMPipeline(model, DDPMScheduler())
        pipeline.set_progress_bar_config(disable=True)
        batches = [sample_images(pipeline, range(i, i + 4), num_inference_steps=5) for i in (0, 4, 8)]
        images.append(torch.cat(batches).cpu().float())
    eager, compiled = images
    assert eager.std() > 30
    assert (compiled - eager).abs().mean() < 0.1


def test_fifty_steps_in_bfloat16_follow_those_in_float32(train):
    flags = ("--max_train_steps", 50, "--unet", json.dumps({**TINY_UNET, "dropout": 0.0}), "--train_batch_size", 32)
    runs = [train(name, *flags, "--mixed_precision", name).wait() for name in ("no", "bf16")]
    full, half = ([record["loss"] for record in run.metrics] for run in runs)
    assert full[-1] < 0.8 * full[0]  # there is something to follow
    assert half == pytest.approx(full, rel=0.03)
