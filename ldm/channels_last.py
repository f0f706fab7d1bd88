"""Convolutions in channels_last where that is faster: the channels of a pixel side by side, (N,H,W,C) in memory.

On CPUs oneDNN computes in that layout whatever it is given, and copies NCHW to it and back. In float32 with gradients
that costs little (and with AVX2 alone backward passes are slower in channels_last). Without gradients an autoencoder
takes 1.2 to 1.3 times as long in NCHW, and in bf16 up to 2.4 times: a 3x3 convolution of 64 channels on 128 x 128 takes
19 ms forward and backward, 7.5 in channels_last (two threads, AMX).

What stands in the way is torch's GroupNorm there. Its variance is the mean of squares less the square of the mean, of
which in float32 little is left where the mean is many deviations; and its backward pass takes 27 ms in bf16. The one
below takes 4, and falls back on NCHW for large means.

Only `Encoder`, `Decoder` and LPIPS are laid out so, and attention inside the UNet of latents: the rest of it gains
nothing. GPUs were not measured.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

LAYOUT = torch.channels_last

_HAS_ONEDNN = torch.backends.mkldnn.is_available()  # asked here, since torch.compile cannot ask

MOST = 4.0
"""Deviations that the mean of a group may be for torch's norm of bf16 in channels_last: the error of its variance is
then less than bf16 rounds."""


def fastest_layout(x: Tensor) -> Tensor:
    """The (N,C,H,W), C > 1, that convolutions are to go on with, in the layout in which they are fastest.

    (One of a single channel has no layout.)
    """
    if not runs_on_onednn(x):
        return x
    if torch.is_grad_enabled() and not computes_bf16(x):
        return x
    return x.contiguous(memory_format=LAYOUT)


def runs_on_onednn(x: Tensor) -> bool:
    """Whether convolutions of x are computed here, by oneDNN on the CPU; an exported program may run anywhere."""
    return _HAS_ONEDNN and x.device.type == "cpu" and not torch.compiler.is_exporting()


def computes_bf16(x: Tensor) -> bool:
    """Whether convolutions of x on the CPU compute in bf16, by its type or by autocast."""
    autocast = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
    return autocast or x.dtype == torch.bfloat16


def group_norm(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """torch's of (N,C,H,W), but in channels_last on CPUs precise without gradients, and fast to train in bf16."""
    if _is_channels_last(x) and not torch.compiler.is_compiling():
        if x.dtype == torch.bfloat16:
            result: Tensor = _NormOfBf16.apply(x, weight, bias, groups, eps)
            return result
        if not torch.is_grad_enabled():
            return _in_two_passes(x, groups, weight, bias, eps)
    return F.group_norm(x, groups, weight, bias, eps)


def _in_two_passes(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """The mean first, then the squares of what is left: (N,C,H,W), as precise as torch's in NCHW."""
    each = x.shape[1] // groups  # channels of a group
    number = each * x.shape[2] * x.shape[3]
    mean = _group_sums(_pixel_sums(x), each) / number  # (N, groups)
    centered = x - _pixels(mean.repeat_interleave(each, 1))  # (N,C,H,W)
    variance = _group_sums(_pixel_sums(centered * centered), each) / number  # (N, groups)
    scale = torch.rsqrt(variance + eps).repeat_interleave(each, 1) * weight  # (N,C)
    return torch.addcmul(bias[:, None, None], centered, _pixels(scale))


def _is_channels_last(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=LAYOUT)


def _pixel_sums(x: Tensor) -> Tensor:
    """(N,C,H,W) in channels_last -> sums over the pixels (N,C), float32 or more precise.

    Rows are summed in the tensor's own dtype first: with a dtype argument torch would copy the whole tensor to it.
    """
    return x.permute(0, 2, 3, 1).sum(2).sum(1, dtype=torch.promote_types(x.dtype, torch.float32))


def _group_sums(values: Tensor, each: int) -> Tensor:
    """(N,C) -> sums over groups of `each` channels, (N, groups)."""
    return values.unflatten(1, (-1, each)).sum(2)


def _pixels(values: Tensor) -> Tensor:
    """(N,C) -> (N,C,1,1)."""
    return values[:, :, None, None]


class _NormOfBf16(torch.autograd.Function):
    """GroupNorm of (N,C,H,W), whose gradients are whole passes over the tensor, each of which torch does well.

    With m and r the mean and the reciprocal deviation of a group of n values, y = (x - m) r w + b, and, summed over the
    group, s = sum of w dy and t = sum of w dy (x - m):

        dx = r w dy - (x - m) t r^3 / n - s r / n

    A mean of more than a deviation is subtracted first, since little would be left of products with it; what its
    rounding to bf16 leaves, e, is taken into account. The factors of dx, one a channel, are rounded as well.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
        rows, channels, height, width = x.shape
        shape = rows, channels, height * width, groups, eps
        y, mean, scale = torch.ops.aten.native_group_norm(x, weight, bias, *shape)  # (N,C,H,W), and twice (N, groups)
        if bool((mean.abs() * scale).max() > MOST):
            y, mean, scale = torch.ops.aten.native_group_norm(x.contiguous(), weight, bias, *shape)
            y = y.contiguous(memory_format=LAYOUT)
        ctx.save_for_backward(x, weight, mean, scale)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        x, weight, mean, scale = ctx.saved_tensors
        each = x.shape[1] // mean.shape[1]  # channels of a group
        number = each * x.shape[2] * x.shape[3]
        precise = torch.promote_types(x.dtype, torch.float32)
        m, r = (one.to(precise).repeat_interleave(each, 1) for one in (mean, scale))  # (N, C), by group
        w = weight.to(precise)
        subtracted = torch.where(m.abs() * r > 1, m, 0).to(x.dtype)  # (N, C)
        e = m - subtracted.to(precise)  # (N, C)

        centered = x - _pixels(subtracted)  # (N, C, H, W)
        dy_sum = _pixel_sums(dy)  # (N, C)
        product_sum = _pixel_sums(dy * centered) - e * dy_sum  # (N, C), of dy (x - m)
        s, t = (_group_sums(w * one, each).repeat_interleave(each, 1) for one in (dy_sum, product_sum))  # (N, C)
        slope = -t * r**3 / number  # (N, C)
        constant = -slope * e - s * r / number  # (N, C)
        dx = torch.addcmul(_pixels(constant.to(x.dtype)), centered, _pixels(slope.to(x.dtype)))  # (N, C, H, W)
        dx.addcmul_(dy, _pixels((r * w).to(x.dtype)))
        d_weight = (product_sum * r).sum(0)  # (C,)
        return dx, d_weight.to(weight.dtype), dy_sum.sum(0).to(weight.dtype), None, None
