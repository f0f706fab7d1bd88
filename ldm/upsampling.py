"""Nearest-neighbor upsampling by 2 with the 3x3 convolution that follows it, as one operation where that is faster.

Of the nine pixels that such a convolution reads, only four differ. The same sums are a transposed convolution of stride
2, whose 4x4 kernel is the 3x3 one with neighbors added: four ninths of the products, and the upsampled picture is
never stored. On CPUs in float32 it takes 0.4 to 0.8 of the time, forward and backward. In bf16 oneDNN's is slower
than upsampling and convolving, and for few pixels so is making the kernel. GPUs were not measured.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.channels_last import computes_bf16

MANY_PIXELS = 1024
"""From how many pixels of a batch on, before upsampling, adding the kernel's neighbors costs less than it saves."""


def upsampled(x: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, C, 2H, 2W), each pixel four times."""
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


def convolved_upsampled(x: Tensor, convolution: nn.Conv2d) -> Tensor:
    """convolution(upsampled(x)) but for rounding: (N, C, H, W) -> (N, C', 2H, 2W).

    Args:
        convolution: of size 3, stride 1, padding 1. One that is wrapped or parametrized (LoRA) is called as it is.
    """
    if type(convolution) is nn.Conv2d and _is_faster_as_one(x, convolution.weight):
        return F.conv_transpose2d(x, transposed_kernel(convolution.weight), convolution.bias, stride=2, padding=1)
    return convolution(upsampled(x))


def transposed_kernel(weight: Tensor) -> Tensor:
    """The kernel (C, C', 4, 4) of the transposed convolution, of that (C', C, 3, 3) of the convolution."""
    spread = F.pad(weight.flip(2, 3).transpose(0, 1), (1, 1, 1, 1))  # (C, C', 5, 5)
    rows = spread[:, :, 1:] + spread[:, :, :-1]  # (C, C', 4, 5)
    return rows[..., 1:] + rows[..., :-1]  # (C, C', 4, 4)


def _is_faster_as_one(x: Tensor, weight: Tensor) -> bool:
    if x.device.type != "cpu" or not torch.backends.mkldnn.is_available() or torch.compiler.is_exporting():
        return False
    pixels = x.shape[0] * x.shape[2] * x.shape[3]
    return x.dtype == weight.dtype == torch.float32 and not computes_bf16(x) and pixels >= MANY_PIXELS
