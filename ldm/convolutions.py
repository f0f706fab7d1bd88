"""Convolutions by other operators of torch, where these are faster on CPUs: the same sums but for rounding.

Of the nine pixels that a 3x3 convolution of an upsampled picture reads, only four differ. As a transposed convolution
of stride 2, whose 4x4 kernel is the 3x3 one with neighbors added, it takes four ninths of the products, and the
upsampled picture is never stored: 0.4 to 0.8 of the time in float32, forward and backward. In bf16 oneDNN's transposed
convolution is slower than upsampling and convolving, and for few pixels so is making the kernel.

A 1x1 convolution of NCHW is a product of matrices for each picture, without oneDNN's copies to its own layout and back:
half to nine tenths of the time, in float32 and in bf16.

A 3x3 convolution takes a quarter of the products by tiles (ldm/winograd.py). Where the processor has AVX2 alone, that
is 0.5 to 0.9 of the time in float32, forward and backward, for many channels. With AVX-512 products are faster and
memory is not: a whole step gains nothing.

A layer that is more than a convolution's weight (wrapped, as by LoRA, or parametrized) is called as it is, and exported
programs hold convolutions. Hooks of a convolution that is replaced are not called. Processors other than x86 and GPUs
were not measured.
"""

from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm import winograd
from ldm.channels_last import computes_bf16, runs_on_onednn

MANY_PIXELS = 1024
"""From how many pixels of a batch on, before upsampling, adding the kernel's neighbors costs less than it saves."""

AVX2_ALONE = torch.backends.cpu.get_cpu_capability() == "AVX2"
"""Whether 3x3 convolutions may be computed by tiles. (Asked here, since torch.compile cannot ask.)"""

MANY_CHANNELS = 128
"""From how many channels on, of both input and output, tiles pay."""

MANY_TILES = 32
"""From how many tiles of a batch on they pay, and one for every WEIGHTS_OF_A_TILE pairs of channels."""

WEIGHTS_OF_A_TILE = 2048

LARGE_PICTURE = 2**21
"""Up to how many values of a picture, input or output, tiles are used: they take up to eight times its memory."""


def upsampled(x: Tensor) -> Tensor:
    """Nearest-neighbor upsampling by 2: (N, C, H, W) -> (N, C, 2H, 2W)."""
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


def convolved_upsampled(x: Tensor, convolution: nn.Conv2d) -> Tensor:
    """convolution(upsampled(x)), of size 3, stride 1, padding 1: (N, C, H, W) -> (N, C', 2H, 2W)."""
    # Sizes are asked last: exporting and compiling for any size would keep the answer as a condition.
    if _can_be_replaced(convolution, x) and _is_float32(x) and x.shape[0] * x.shape[2] * x.shape[3] >= MANY_PIXELS:
        return F.conv_transpose2d(x, transposed_kernel(convolution.weight), convolution.bias, stride=2, padding=1)
    return convolution(upsampled(x))


def transposed_kernel(weight: Tensor) -> Tensor:
    """The kernel (C, C', 4, 4) of the transposed convolution, of that (C', C, 3, 3) of the convolution."""
    spread = F.pad(weight.flip(2, 3).transpose(0, 1), (1, 1, 1, 1))  # (C, C', 5, 5)
    rows = spread[:, :, 1:] + spread[:, :, :-1]  # (C, C', 4, 5)
    return rows[..., 1:] + rows[..., :-1]  # (C, C', 4, 4)


def pointwise(x: Tensor, layer: nn.Module) -> Tensor:
    """layer(x), which may be a convolution of size 1, stride 1: (N, C, H, W) -> (N, C', H, W)."""
    if not _can_be_replaced(layer, x) or layer.bias is None or not x.is_contiguous():
        return layer(x)
    c_out, c_in = layer.weight.shape[:2]
    # In the backward pass each picture makes a gradient (C', C), which must be smaller than its input and output.
    if x.shape[2] * x.shape[3] * (c_in + c_out) <= c_in * c_out:
        return layer(x)
    kernels = layer.weight.flatten(1).expand(x.shape[0], -1, -1)  # (N, C', C)
    y = torch.baddbmm(layer.bias[:, None], kernels, x.flatten(2))  # (N, C', H W)
    return y.unflatten(2, x.shape[2:])  # (N, C', H, W)


def convolved(x: Tensor, layer: nn.Module) -> Tensor:
    """layer(x), which may be a convolution of size 3, stride 1, padding 1: (N, C, H, W) -> (N, C', H, W).

    Where it is computed by tiles it can be differentiated once.
    """
    if not AVX2_ALONE or torch.compiler.is_compiling() or not _can_be_replaced(layer, x) or not _is_3x3(layer):
        return layer(x)
    precise = x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    if not precise or not _pays_in_tiles(x, *layer.weight.shape[:2]):
        return layer(x)
    return winograd.convolve(x, layer.weight, layer.bias)


def _is_3x3(layer: nn.Conv2d) -> bool:
    shape = layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.groups, layer.padding_mode
    return shape == ((3, 3), (1, 1), (1, 1), (1, 1), 1, "zeros")


def _pays_in_tiles(x: Tensor, c_out: int, c_in: int) -> bool:
    rows, _, height, width = x.shape
    if min(c_in, c_out) < MANY_CHANNELS or max(c_in, c_out) * height * width > LARGE_PICTURE:
        return False
    if height % winograd.TILE or width % winograd.TILE:
        return False
    tiles = rows * height * width // winograd.TILE**2
    return tiles >= max(MANY_TILES, c_in * c_out // WEIGHTS_OF_A_TILE)


def _is_float32(x: Tensor) -> bool:
    return x.dtype == torch.float32 and not computes_bf16(x)


def _can_be_replaced(layer: nn.Module, x: Tensor) -> TypeGuard[nn.Conv2d]:
    """Whether the layer is a convolution of x by its weight alone, where other operators are faster."""
    return type(layer) is nn.Conv2d and runs_on_onednn(x)
