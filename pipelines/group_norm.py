"""Group normalisation and SiLU in one, for compiled code on a CPU."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DModel
from diffusers.models.resnet import ResnetBlock2D
from torch import nn


def fuse_group_norms(unet: UNet2DModel) -> None:
    """Make each `nn.GroupNorm` of a `UNet2DModel` a `FusedGroupNorm`, and move the SiLU behind it into it.

    A residual block has one SiLU for all its places, so that of the time embedding moves into the layer behind.
    """
    for module in unet.modules():
        if type(module) is nn.GroupNorm:
            module.__class__ = FusedGroupNorm
    for block in unet.modules():
        plain = isinstance(block, ResnetBlock2D) and block.time_embedding_norm == "default" and not block.skip_time_act
        if plain and type(block.nonlinearity) is nn.SiLU:
            block.norm1.activated = block.norm2.activated = True
            block.nonlinearity = nn.Identity()
            if block.time_emb_proj is not None:
                block.time_emb_proj.__class__ = SiLULinear
    if type(getattr(unet, "conv_act", None)) is nn.SiLU:  # a transformer has none
        unet.conv_norm_out.activated, unet.conv_act = True, nn.Identity()


class FusedGroupNorm(nn.GroupNorm):
    """`nn.GroupNorm`, and SiLU behind it where `activated`. All sums are in float32."""

    activated = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, C, ...] -> the same shape and type."""
        return GroupNormSiLU.apply(x, self.weight, self.bias, self.num_groups, self.eps, self.activated)


class SiLULinear(nn.Linear):
    """`nn.Linear` of its input's SiLU."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(F.silu(x))


class GroupNormSiLU(torch.autograd.Function):
    """y = (x - mean) / std * weight + bias, with mean and std of a group of channels, and then SiLU or nothing.

    Written for what Inductor makes of it with channels last. There, a group is a few neighbouring values, 3 of 96
    say: too few for vector instructions, so that sums over pixels are by channel. Each pass over the pixels is y = x
    * scale + shift and little more; matrix products make these [N, C] tables, because what they make is not worked
    out anew at each pixel. What reads more than four tensors, or takes an exponential, and is used twice, Inductor
    writes to memory in float32, which takes longer than to make it twice: hence no more than four, and `sigmoid`
    (`realize_reads_threshold` and `heavy_ops` in torch/_inductor).
    """

    @staticmethod
    @torch.autocast("cpu", enabled=False)
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        num_groups: int,
        eps: float,
        activated: bool,
    ) -> torch.Tensor:
        pixels = tuple(range(2, x.ndim))
        values, weight, bias = x.float(), weight.float(), bias.float()
        # Differences from a pixel, so that a large mean costs no digits; one pass adds up both sums.
        origin = values[(..., *[slice(1)] * len(pixels))]
        offsets = values - origin
        offset = offsets.mean(pixels)
        channel_variance = (offsets.square().mean(pixels) - offset.square()).clamp_min(0)
        channel_mean = in_groups(origin.flatten(1) + offset, num_groups)
        mean = channel_mean.mean(2)  # [N, G]
        variance = (in_groups(channel_variance, num_groups) + (channel_mean - mean[..., None]).square()).mean(2)
        inverse_std = (variance + eps).rsqrt()
        weights = weight * group_members(weight, num_groups)
        scale = inverse_std @ weights  # [N, C]
        shift = torch.addmm(bias, -mean * inverse_std, weights)
        ctx.save_for_backward(x, weight, mean, inverse_std, scale, shift)
        ctx.activated = activated
        y = values * at_each_pixel(scale, x) + at_each_pixel(shift, x)
        return (y * sigmoid(y) if activated else y).to(x.dtype)

    @staticmethod
    @torch.autocast("cpu", enabled=False)  # compiled, it would be as the forward pass's
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """dL/dx = g scale - (mean(g w) + z mean(g w z)) / std; g = dL/dy, z = (x - mean) / std, means of a group."""
        x, weight, mean, inverse_std, scale, shift = ctx.saved_tensors
        num_groups, pixels = mean.shape[1], tuple(range(2, x.ndim))
        values, g = x.float(), gradient.float()
        if ctx.activated:
            # The other way round than above: what both passes have in common would be kept, in float32.
            y = at_each_pixel(shift, x) + at_each_pixel(scale, x) * values
            g = g * sigmoid(y) * (1 + y * (1 - sigmoid(y)))
        sums, sums_by_x = g.sum(pixels), (g * values).sum(pixels)  # [N, C]

        members = group_members(weight, num_groups)
        group_size = x[0].numel() // num_groups
        mean_gw, mean_gwx = (torch.cat([sums, sums_by_x]) @ (weight * members).T / group_size).chunk(2)  # [N, G]
        slope = -inverse_std.pow(3) * (mean_gwx - mean * mean_gw)
        constant = -inverse_std * mean_gw - slope * mean
        by_x, by_one = (torch.cat([slope, constant]) @ members).chunk(2)
        dx = g * at_each_pixel(scale, x) + values * at_each_pixel(by_x, x) + at_each_pixel(by_one, x)

        sums_by_deviation = in_groups(sums_by_x, num_groups) - mean[..., None] * in_groups(sums, num_groups)
        dweight = (sums_by_deviation * inverse_std[..., None]).sum(0).flatten()
        return dx.to(x.dtype), dweight, sums.sum(0), None, None, None


def in_groups(table: torch.Tensor, num_groups: int) -> torch.Tensor:
    """[N, C] as [N, G, C/G]."""
    return table.unflatten(1, (num_groups, -1))


def group_members(weight: torch.Tensor, num_groups: int) -> torch.Tensor:
    """[G, C]: 1 where a channel is of a group, else 0."""
    group = torch.arange(len(weight), device=weight.device) // (len(weight) // num_groups)
    return (torch.arange(num_groups, device=weight.device)[:, None] == group).float()


def at_each_pixel(table: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """[N, C] as [N, C, 1, ...], to be taken with `x`."""
    return table[(..., *[None] * (x.ndim - 2))]


def sigmoid(y: torch.Tensor) -> torch.Tensor:
    """`torch.sigmoid`, by an exponential that Inductor does not take for one: see `GroupNormSiLU`."""
    return 1 / (1 + torch.exp2(y * (-1 / math.log(2))))
