"""How a U-Net computes on a device, and never what: results stay the same but for rounding."""

import ctypes
import sys

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, AttnProcessor
from diffusers.models.upsampling import Upsample2D
from torch import nn

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def choose_kernels(unet, device, mixed_precision, compiled, mode=None):
    """Let the network use what is fastest on a device.

    On a CPU, `FusedUpsample2D` halves the time of upsampling. The backward pass of PyTorch's fused attention takes
    several times as long in bfloat16 as in float32, and half of a training step: there, attention is two matrix
    products and a softmax. Compiled code chooses the memory layout of convolutions itself, channels last, in which
    `ChannelwiseGroupNorm` is several times as fast as PyTorch's; uncompiled, group normalisation would copy back and
    forth between layouts.

    Args:
        unet: a `UNet2DModel`, changed in place; its weights and config are not.
        mixed_precision: "no", "bf16" or "fp16".
        compiled: compile it, at its first call.
        mode: of `torch.compile`; "reduce-overhead" for CUDA graphs, which suit sampling.
    """
    for module in unet.modules() if device.type == "cpu" else ():
        if type(module) is Upsample2D and module.use_conv:
            module.__class__ = FusedUpsample2D
        if type(module) is nn.GroupNorm and compiled:
            module.__class__ = ChannelwiseGroupNorm
        if isinstance(module, Attention) and mixed_precision == "bf16":
            module.set_processor(AttnProcessor())
    if compiled:
        unet.compile(mode=mode)


class ChannelwiseGroupNorm(nn.GroupNorm):
    """`nn.GroupNorm` that adds up each channel by itself, and then the channels of a group by a matrix product.

    With channels last, a group is a few neighbouring values, 3 of 96 say: too few for vector instructions, and compiled
    code is slow that takes them together. The product also keeps the [N, C] tables from being worked out anew at each
    pixel. A group's variance is the mean of its channels' and the variance of their means. Sums are in float32, and of
    differences from a pixel, so that a large mean costs no digits; one pass over x finds them all.
    """

    def forward(self, x):
        """[N, C, ...] -> the same shape and type."""
        pixels = tuple(range(2, x.ndim))
        at_each_pixel = (..., *[None] * len(pixels))
        group = torch.arange(self.num_channels, device=x.device) // (self.num_channels // self.num_groups)
        group_mean = (group[:, None] == group) * (self.num_groups / self.num_channels)  # [C, C]
        with torch.autocast(x.device.type, enabled=False):
            values = x.float()
            origin = values.detach()[(..., *[slice(1)] * len(pixels))]  # the first pixel: [N, C, 1, ...]
            offsets = values - origin
            offset = offsets.mean(pixels)
            channel_mean = origin.flatten(1) + offset
            channel_variance = (offsets.square().mean(pixels) - offset.square()).clamp_min(0)
            mean = channel_mean @ group_mean
            variance = (channel_variance + (channel_mean - mean).square()) @ group_mean
            scale = self.weight * (variance + self.eps).rsqrt()
            shift = self.bias - mean * scale
            return (values * scale[at_each_pixel] + shift[at_each_pixel]).to(x.dtype)


class FusedUpsample2D(Upsample2D):
    """`Upsample2D` whose doubling and 3x3 convolution are one transposed convolution, with 4 products an output pixel
    instead of 9.

    Doubling by repetition is a transposed convolution with a 2x2 kernel of ones and stride 2. Behind it, the 3x3 kernel
    w makes that a 4x4 one, w convolved with the ones: in one dimension, w_2, w_2 + w_1, w_1 + w_0, w_0.
    """

    def forward(self, hidden_states, output_size=None):
        """[N, C, H, W] -> [N, C', 2H, 2W], or to `output_size`."""
        if output_size is not None:
            return super().forward(hidden_states, output_size)
        weight = F.pad(self.conv.weight.flip(2, 3), [1, 1, 1, 1])
        weight = 4 * F.avg_pool2d(weight, kernel_size=2, stride=1)
        return F.conv_transpose2d(hidden_states, weight.transpose(0, 1), self.conv.bias, stride=2, padding=1)


def keep_freed_memory():
    """Let glibc keep what is freed, for the whole process, until it ends; elsewhere, do nothing.

    By default it gives large blocks back to the system at once. Each activation of a network on a CPU is then made of
    new pages again, which the system clears one by one: a tenth to a fifth of a step."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)
