"""Convolutions in channels_last where that is faster: the channels of a pixel side by side, (N,H,W,C) in memory.

On CPUs oneDNN computes in that layout whatever it is given, and copies NCHW to it and back. In float32 with gradients
that costs little (and with AVX2 alone backward passes are slower in channels_last). Without gradients an autoencoder
takes 1.2 to 1.3 times as long in NCHW, and in bf16 up to 2.4 times: a 3x3 convolution of 64 channels on 128 x 128 takes
19 ms forward and backward, 7.5 in channels_last (two threads, AMX). What stood in the way of training so was torch's
GroupNorm, whose backward pass takes 27 ms there in bf16; the one below takes 4.

Only the autoencoder, LPIPS included, is laid out so: the UNet of latents gains nothing, and GPUs were not measured.
"""

from typing import Any

import torch
from torch import Tensor, nn

LAYOUT = torch.channels_last


def fastest_layout(x: Tensor) -> Tensor:
    """The input (N,C,H,W) of a network of convolutions, in the layout in which they are faster from there on."""
    if x.device.type != "cpu" or torch.compiler.is_exporting():
        return x
    if torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu"):
        return x
    return x.contiguous(memory_format=LAYOUT)


class GroupNorm(nn.GroupNorm):
    """torch's, with another backward pass for bf16 in channels_last."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != torch.bfloat16 or not torch.is_grad_enabled() or not _is_channels_last(x):
            return super().forward(x)
        result: Tensor = _ChannelsLast.apply(x, self.weight, self.bias, self.num_groups, self.eps)
        return result


def _is_channels_last(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=LAYOUT)


class _ChannelsLast(torch.autograd.Function):
    """GroupNorm of (N,C,H,W), whose gradients are whole passes over the tensor, each of which torch does well.

    With m and r the mean and the reciprocal deviation of a group of n values, y = (x - m) r w + b, and, summed over the
    group, s = sum of w dy and t = sum of w dy (x - m):

        dx = r w dy - (x - m) t r^3 / n - s r / n

    m is subtracted first, rounded to the type of x, since little would be left of products with a large mean; what the
    rounding has left of it, e, is taken into account.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
        rows, channels, height, width = x.shape
        y, mean, scale = torch.ops.aten.native_group_norm(
            x, weight, bias, rows, channels, height * width, groups, eps
        )  # (N,C,H,W), and twice (N, groups)
        ctx.save_for_backward(x, weight, mean, scale)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        x, weight, mean, scale = ctx.saved_tensors
        rows, channels, height, width = x.shape
        each = channels // mean.shape[1]  # channels of a group
        number = each * height * width
        precise = torch.promote_types(x.dtype, torch.float32)
        m, r, w = mean.to(precise), scale.to(precise), weight.to(precise)
        rounded = m.to(x.dtype)
        e = m - rounded.to(precise)  # (N, groups)

        def of_channels(values: Tensor) -> Tensor:
            return values.repeat_interleave(each, 1)  # (N, C)

        def spread(values: Tensor) -> Tensor:
            return values[:, :, None, None].to(x.dtype)  # (N, C, 1, 1)

        centered = x - spread(of_channels(rounded))  # (N, C, H, W)
        # First over rows, in the tensor's type, then precisely: given a type, torch would copy all of it to that first.
        parts = [one.permute(0, 2, 3, 1).sum(2) for one in (dy, dy * centered)]  # each (N, H, C)
        dy_sum, with_e = (part.sum(1, dtype=precise) for part in parts)  # (N, C)
        product_sum = with_e - of_channels(e) * dy_sum  # (N, C), of dy (x - m)
        s, t = ((w * one).view(rows, -1, each).sum(2) for one in (dy_sum, product_sum))  # (N, groups)
        slope = -t * r**3 / number  # (N, groups)
        constant = -slope * e - s * r / number  # (N, groups)
        dx = torch.addcmul(spread(of_channels(constant)), centered, spread(of_channels(slope)))  # (N, C, H, W)
        dx.addcmul_(dy, spread(of_channels(r) * w))
        d_weight = (product_sum * of_channels(r)).sum(0)  # (C,)
        return dx, d_weight.to(weight.dtype), dy_sum.sum(0).to(weight.dtype), None, None
