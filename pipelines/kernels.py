"""How a network computes on a device, and never what: results stay the same but for rounding."""

import ctypes
import sys
from functools import partial

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, AttnProcessor
from diffusers.models.upsampling import Upsample2D

from pipelines.group_norm import fuse_group_norms

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def choose_kernels(
    network: torch.nn.Module, device: torch.device, mixed_precision: str, compiled: bool, mode: str | None = None
) -> None:
    """Let the network use what is fastest on a device.

    On a CPU, the process keeps the memory it has freed, and `FusedUpsample2D` halves the time of upsampling. The
    backward pass of PyTorch's fused attention takes several times as long in bfloat16 as in float32, and half of a
    training step: there, attention is two matrix products and a softmax. Compiled code chooses the memory layout of
    convolutions itself, channels last, in which `FusedGroupNorm` is several times as fast as PyTorch's; uncompiled,
    group normalisation would copy back and forth between layouts.

    Args:
        network: of diffusers, on the device, changed in place; its weights and config are not.
        mixed_precision: "no", "bf16" or "fp16".
        compiled: compile it, at its first call.
        mode: of `torch.compile`; "reduce-overhead" for CUDA graphs, which suit sampling.
    """
    if device.type == "cpu":
        keep_freed_memory()
        for module in network.modules():
            if type(module) is Upsample2D and module.use_conv:
                module.__class__ = FusedUpsample2D
            if isinstance(module, Attention) and mixed_precision == "bf16":
                module.set_processor(AttnProcessor())
        if compiled:
            fuse_group_norms(network)
    if compiled:
        network.compile(mode=mode)


class FusedUpsample2D(Upsample2D):
    """`Upsample2D` whose doubling and 3x3 convolution are one transposed convolution, with 4 products an output pixel
    instead of 9.

    Doubling by repetition is a transposed convolution with a 2x2 kernel of ones and stride 2. Behind it, the 3x3 kernel
    w makes that a 4x4 one, w convolved with the ones: in one dimension, w_2, w_2 + w_1, w_1 + w_0, w_0.
    """

    def forward(self, hidden_states: torch.Tensor, output_size: tuple[int, int] | None = None) -> torch.Tensor:
        """[N, C, H, W] -> [N, C', 2H, 2W], or to `output_size`."""
        if output_size is not None:
            return super().forward(hidden_states, output_size)
        weight = F.pad(self.conv.weight.flip(2, 3), [1, 1, 1, 1])
        weight = 4 * F.avg_pool2d(weight, kernel_size=2, stride=1)
        convolution = partial(F.conv_transpose2d, hidden_states, weight.transpose(0, 1), stride=2, padding=1)
        if torch.compiler.is_compiling():
            # Its gradient by a bias takes longer than the other two together; compiled, an addition costs nothing.
            output = convolution()
            return output + self.conv.bias.to(output.dtype)[:, None, None]
        return convolution(bias=self.conv.bias)


def keep_freed_memory() -> None:
    """Let glibc keep what is freed, for the whole process, until it ends; elsewhere, do nothing.

    By default it gives large blocks back to the system at once. Each activation of a network on a CPU is then made of
    new pages again, which the system clears one by one."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)
