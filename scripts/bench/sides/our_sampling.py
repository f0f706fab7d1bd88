"""Our sampler, from seeds to pictures, with random weights."""

import torch
from torch import nn

from ldm.autoencoder.codec import AutoencoderCodec
from ldm.diffusion.conditioners.base import Unconditional
from ldm.diffusion.noise_schedules import SqrtLinear
from ldm.diffusion.objectives import DDPM
from ldm.latents.manifest import CacheSpec, Manifest
from ldm.runtime import allocator
from ldm.sampling.generate import generate
from ldm.sampling.pipeline import Pipeline
from ldm.sampling.precision import computing_in
from scripts.bench.child import Built, Place, count, repeat
from scripts.bench.sides.ours import coders, make_unet
from scripts.bench.sizes import UNetSize


def sampling(size: UNetSize, steps: int, place: Place) -> Built:
    """DDIM, then the decoder."""
    allocator.keep_freed_memory()  # as every program does
    encoder, decoder = coders(size.autoencoder)
    network = make_unet(size)
    parameters = count(network, decoder)
    plan = CacheSpec((size.latent, size.side, size.side), 1, "", {}, {"config": {}})
    manifest = Manifest(plan, [0.0] * size.latent, [1.0] * size.latent, [], [])
    denoiser = nn.ModuleDict({"network": network, "conditioner": Unconditional()})
    codec = AutoencoderCodec(encoder, decoder, {}, size.autoencoder.resolution)
    objective = DDPM(SqrtLinear(0.00085, 0.012))  # LDMPipeline's scheduler is given the same
    whole = Pipeline(
        denoiser.requires_grad_(False).eval().to(place.device),
        objective.to(place.device),
        codec.to(place.device),
        manifest,
        0.0,
    )
    pipeline = computing_in(whole, torch.bfloat16 if place.bf16 else torch.float32)

    def step() -> None:
        made = [*generate(pipeline, range(size.images), steps=steps, batch_size=size.images)]
        assert len(made) == size.images

    without_autocast = place._replace(bf16=False)  # the pipeline has its own
    return Built(parameters, repeat(step, without_autocast), [network, decoder])
