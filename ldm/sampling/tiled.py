"""Latents larger than those of training: denoised in overlapping windows at each step, whose estimates are blended.

Every window is of the training size, so that a network meets the positions and the attention that it knows; at each
step neighbors agree on what they share (Bar-Tal et al. 2023, "MultiDiffusion"; with weights that fall toward a window's
edge: Jiménez 2023, "Mixture of Diffusers").
"""

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from itertools import product

import torch
from torch import Tensor

from ldm.autoencoder.tiling import Window
from ldm.diffusion.conditioners.base import Conditioning
from ldm.sampling.guidance import ConditionalDenoiser


def tiled(
    denoise: ConditionalDenoiser,
    windows: Sequence[Window],
    at_once: int,
    done: Callable[[int], None] = lambda windows: None,
) -> ConditionalDenoiser:
    """The estimated x0 of x (N,c,H,W), blended from those of its windows; of one window, `denoise` itself.

    The spatial conditions are cut with each window. A vector and tokens are said to every window alike: a caption
    describes each of them, and what they say of places is taken to be about the window.

    Args:
        windows: all of one size.
        at_once: rows of one call of `denoise`.
        done: called with how many windows were denoised, in all rows of x, since the last time.
    """
    if len(windows) == 1:
        return denoise

    def blended(x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        if conditioning.spatial is not None:  # a null's sides may be 1
            conditioning = replace(conditioning, spatial=conditioning.spatial.expand(-1, -1, *x.shape[2:]))
        whole = torch.zeros_like(x)
        places = [*product(windows, range(len(x)))]
        for first in range(0, len(places), at_once):
            few = places[first : first + at_once]
            x0 = denoise(torch.cat([window.of(x[row : row + 1]) for window, row in few]), t, _cut(conditioning, few))
            for (window, row), part in zip(few, x0.split(1), strict=True):
                window.add(whole[row : row + 1], part)
            done((first + len(few)) // len(x) - first // len(x))
        return whole

    return blended


def _cut(conditioning: Conditioning, few: Sequence[tuple[Window, int]]) -> Conditioning:
    """The conditioning of some rows, each with its window's part of the spatial slot."""
    slots: dict[str, Tensor] = {}
    for name in (field.name for field in fields(conditioning)):
        if (whole := getattr(conditioning, name)) is not None:
            parts = [(window, whole[row : row + 1]) for window, row in few]
            slots[name] = torch.cat([window.of(part) if name == "spatial" else part for window, part in parts])
    return Conditioning(**slots)
