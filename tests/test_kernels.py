"""The kernels that are chosen for a device compute what the plain ones do."""

import json

import pytest
import torch
from conftest import TINY_UNET
from diffusers import UNet2DModel
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0

from training.models import choose_kernels

CPU = torch.device("cpu")


def unet():
    torch.manual_seed(0)
    return UNet2DModel(sample_size=8, in_channels=1, out_channels=1, **{**TINY_UNET, "dropout": 0.0})


def attention_processors(model):
    return {type(module.processor) for module in model.modules() if isinstance(module, Attention)}


def output_and_gradient(model):
    x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", torch.bfloat16):
        output = model(x, torch.arange(4), return_dict=False)[0].float()
    output.square().mean().backward()
    return output.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def test_attention_in_bfloat16_on_a_cpu_is_plain_and_the_same_within_rounding():
    fused, plain = unet(), unet()
    choose_kernels(plain, CPU, "bf16", compiled=False)
    assert attention_processors(fused) == {AttnProcessor2_0}
    assert attention_processors(plain) == {AttnProcessor}
    for a, b in zip(output_and_gradient(fused), output_and_gradient(plain), strict=True):
        assert float((a - b).norm() / a.norm()) < 0.02


@pytest.mark.parametrize(("device", "precision"), [(CPU, "no"), (torch.device("cuda"), "bf16")])
def test_elsewhere_attention_stays_as_it_is(device, precision):
    model = unet()
    choose_kernels(model, device, precision, compiled=False)
    assert attention_processors(model) == {AttnProcessor2_0}


def test_fifty_steps_in_bfloat16_follow_those_in_float32(train):
    flags = ("--max_train_steps", 50, "--unet", json.dumps({**TINY_UNET, "dropout": 0.0}), "--train_batch_size", 32)
    runs = [train(name, *flags, "--mixed_precision", name).wait() for name in ("no", "bf16")]
    full, half = ([record["loss"] for record in run.metrics] for run in runs)
    assert full[-1] < 0.8 * full[0]  # there is something to follow
    assert half == pytest.approx(full, rel=0.03)
