"""Guidance: denoisers made of denoisers."""

from collections.abc import Callable

import torch
from torch import Tensor

from ldm.diffusion.conditioning import Conditioning

# denoise(x (N, ...), t () or (N,), conditioning of N rows) -> x0, and the same with the conditioning filled in.
ConditionalDenoiser = Callable[[Tensor, Tensor, Conditioning], Tensor]
Denoiser = Callable[[Tensor, Tensor], Tensor]


def classifier_free(
    denoise: ConditionalDenoiser, conditioning: Conditioning, null: Conditioning, scale: float
) -> Denoiser:
    """x0 = null + scale (conditional - null), on all channels (Ho and Salimans 2022, eq. 6, in their w = scale - 1).

    One call of 2N rows; scale 1 is the conditional denoiser itself, in one call of N rows.
    """
    if scale == 1:
        return lambda x, t: denoise(x, t, conditioning)
    both = conditioning.cat(null)

    def guided(x: Tensor, t: Tensor) -> Tensor:
        # lerp(null, conditional, scale) in one pass; x0 is affine in eps and v, so guiding it is guiding them.
        told, untold = denoise(torch.cat([x, x]), t.expand(len(x)).repeat(2), both).chunk(2)
        return torch.lerp(untold, told, scale)

    return guided
