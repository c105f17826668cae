"""How a U-Net computes on a device, and never what: results stay the same but for rounding."""

import ctypes
import sys

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor
from diffusers.models.upsampling import Upsample2D
from torch import nn

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def choose_kernels(unet, device, mixed_precision, compiled, mode=None):
    """Let the network use what is fastest on a device.

    On a CPU, the backward pass of PyTorch's fused attention takes several times as long in bfloat16 as in float32, and
    half of a training step: there, attention is two matrix products and a softmax. Compiled code chooses the memory
    layout of convolutions itself, channels last, in which `ChannelwiseGroupNorm` and `RepeatingUpsample2D` are several
    times as fast as the layers that they stand for; uncompiled, group normalisation would copy back and forth.

    Args:
        unet: a `UNet2DModel`, changed in place; its weights and config are not.
        mixed_precision: "no", "bf16" or "fp16".
        compiled: compile it, at its first call.
        mode: of `torch.compile`; "reduce-overhead" for CUDA graphs, which suit sampling.
    """
    if device.type == "cpu" and mixed_precision == "bf16":
        for module in unet.modules():
            if isinstance(module, Attention):
                module.set_processor(AttnProcessor())
    if device.type == "cpu" and compiled:
        for module in unet.modules():
            if type(module) in COMPILED_ON_CPU:
                module.__class__ = COMPILED_ON_CPU[type(module)]
    if compiled:
        unet.compile(mode=mode)


class ChannelwiseGroupNorm(nn.GroupNorm):
    """`nn.GroupNorm` that adds up each channel by itself, and then the channels of a group by a matrix product.

    With channels last, a group is a few neighbouring values, 3 of 96 say: too few for vector instructions, and compiled
    code is slow that takes them together. The product also keeps the [N, C] tables from being worked out anew at each
    pixel. Variance is the mean square less the squared mean, in float32.
    """

    def forward(self, x):
        """[N, C, ...] -> the same shape and type."""
        pixels = tuple(range(2, x.ndim))
        at_each_pixel = (..., *[None] * len(pixels))
        group = torch.arange(self.num_channels, device=x.device) // (self.num_channels // self.num_groups)
        group_mean = (group[:, None] == group) * (self.num_groups / self.num_channels)  # [C, C]
        with torch.autocast(x.device.type, enabled=False):
            values = x.float()
            mean = values.mean(pixels) @ group_mean
            variance = (values.square().mean(pixels) @ group_mean - mean.square()).clamp_min(0)
            scale = self.weight * (variance + self.eps).rsqrt()
            shift = self.bias - mean * scale
            return (values * scale[at_each_pixel] + shift[at_each_pixel]).to(x.dtype)


class RepeatingUpsample2D(Upsample2D):
    """`Upsample2D` of a UNet2DModel by a view of each pixel as 2x2: its gradient is a plain sum, where compiled code
    scatters that of `F.interpolate` pixel by pixel."""

    def forward(self, hidden_states, output_size=None):
        """[N, C, H, W] -> [N, C', 2H, 2W], or to `output_size`."""
        if output_size is not None:
            return super().forward(hidden_states, output_size)
        N, C, H, W = hidden_states.shape
        doubled = hidden_states[:, :, :, None, :, None].expand(N, C, H, 2, W, 2).reshape(N, C, 2 * H, 2 * W)
        return self.conv(doubled) if self.use_conv else doubled


COMPILED_ON_CPU = {nn.GroupNorm: ChannelwiseGroupNorm, Upsample2D: RepeatingUpsample2D}


def keep_freed_memory():
    """Let glibc keep what is freed, for the whole process, until it ends; elsewhere, do nothing.

    By default it gives large blocks back to the system at once. Each activation of a network on a CPU is then made of
    new pages again, which the system clears one by one: a tenth to a fifth of a step."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)
