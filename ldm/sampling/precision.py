"""What a pipeline computes in: float32, or bfloat16 by autocast, which the network and the decoder alone are run under.

Noise, samplers, guidance, conditioners, the scale of the latents and the encoder compute in float32 either way.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ldm.diffusion.conditioners.base import Conditioning
from ldm.diffusion.objectives import Network
from ldm.runtime.autocast import convert_weights

if TYPE_CHECKING:  # its `load` calls `computing_in`
    from ldm.sampling.pipeline import Pipeline


def computing_in(pipeline: "Pipeline", compute: torch.dtype) -> "Pipeline":
    """The pipeline that computes in `compute`, and takes the place of the given one.

    For bfloat16 the weights of their large layers are rounded in place, once instead of at every call. So adapters and
    whatever else wants the weights as they were trained comes before.

    Raises:
        ValueError: neither float32 nor bfloat16, or float32 of weights that are rounded already.
    """
    if compute == pipeline.compute:
        return pipeline
    if compute != torch.bfloat16:
        raise ValueError(f"compute: expected torch.bfloat16, or torch.float32 of a pipeline as loaded, found {compute}")
    for part in (pipeline.denoiser["network"], *pipeline.codec.decoders):
        convert_weights(part, compute)
    return replace(pipeline, compute=compute)


def autocast(pipeline: "Pipeline") -> AbstractContextManager[object]:
    """What the network and the decoder are called within.

    In float32 whatever surrounds it goes on, since previews in training are made in the run's own precision.
    """
    if pipeline.compute == torch.float32:
        return nullcontext()
    return torch.autocast(pipeline.device.type, pipeline.compute)


def network(pipeline: "Pipeline") -> Network:
    """The network, computing in the pipeline's precision."""

    def call(x: Tensor, noise_level: Tensor, conditioning: Conditioning) -> Tensor:
        with autocast(pipeline):
            output: Tensor = pipeline.denoiser["network"](x, noise_level, conditioning)
            return output

    return call
