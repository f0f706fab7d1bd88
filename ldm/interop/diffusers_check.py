"""Whether a folder makes the pictures that the model makes: it is loaded as others load it, and one is compared."""

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.autoencoder.codec import Codec
from ldm.interop.trained import Diffusion

CLOSE = 1e-4
"""The largest difference of two pictures in [-1, 1] that are the same in fp32."""
ROUNDING = 1e-5
"""The largest relative difference of two outputs of the same network in fp32."""
SEEDS = 3
"""Of so many pictures one must be the same: rounding may choose another code of a codebook, rarely."""


def check_pipeline(codec: Codec, diffusion: Diffusion, folder: Path) -> None:
    """NumericError unless the pipeline in a folder makes the same picture of the same noise."""
    times = diffusion.objective.timesteps(_steps(diffusion.objective))
    batch = _batch(diffusion)
    noises = [_noise(seed, (1, *diffusion.manifest.plan.shape)) for seed in range(SEEDS)]
    scale = 1.0 if batch is None else 1.5
    pipeline = _pipeline(folder)
    tolerance = max(CLOSE, ROUNDING * _amplification(diffusion.objective, times))
    found = []
    for noise in noises:
        own = ours(codec, diffusion, noise, batch, scale, times)
        other = theirs(pipeline, noise, batch, scale, len(times) - 1)
        found.append(float((own - other).abs().max()))
        if found[-1] <= tolerance:
            return
    _refuse(folder, min(found), tolerance)


def check_first_stage(codec: Codec, name: str, folder: Path) -> None:
    """NumericError unless the autoencoder in a folder gives the same latents and pictures."""
    import diffusers

    model = getattr(diffusers, name).from_pretrained(folder)
    side = 8 * codec.encoder.down_factor
    images = _noise(0, (1, codec.encoder.in_channels, side, side)).tanh()
    with torch.no_grad():
        output = model.encode(images)
        latents = output.latents if codec.quantizer is not None else output.latent_dist.mean
        mean, _ = codec.encode(images)
        pictures = model.decode(mean).sample.clamp(-1, 1)
    scale = max(1.0, float(mean.abs().max()))
    worst = max(float((latents - mean).abs().max()) / scale, float((pictures - codec.decode(mean)).abs().max()))
    if worst > CLOSE:
        _refuse(folder, worst, CLOSE)


@torch.no_grad()
def ours(
    codec: Codec, diffusion: Diffusion, noise: Tensor, batch: Mapping[str, Any] | None, scale: float, times: Tensor
) -> Tensor:
    """(N,C,H,W) in [-1, 1]: what `ldm sample` makes of the noise (N,c,h,w) with `ddim` at these times.

    Args:
        batch: the rows' conditions; None: unconditional.
        scale: of guidance.
    """
    objective, (network, conditioner) = diffusion.objective, diffusion.denoiser.values()
    none = conditioner.null(len(noise))
    given = none if batch is None else conditioner(batch)
    x = noise * torch.hypot(objective.alpha(times[0]), objective.sigma(times[0]))
    for t, s in pairwise(times):
        x0 = objective.denoise(network, x, t, given)
        if scale != 1:
            x0 = torch.lerp(objective.denoise(network, x, t, none), x0, scale)
        eps = (x - objective.alpha(t) * x0) / objective.sigma(t)
        x = objective.alpha(s) * x0 + objective.sigma(s) * eps
    return codec.decode(diffusion.manifest.unstandardize(x))


def theirs(pipeline: Any, noise: Tensor, batch: Mapping[str, Any] | None, scale: float, steps: int) -> Tensor:
    """The same by a pipeline of diffusers."""
    given = {} if batch is None else {_ARGUMENTS[key]: _plain(value) for key, value in batch.items()}
    if batch is not None:
        given["guidance_scale"] = scale
    with _drawn(pipeline, noise):
        images = pipeline(num_inference_steps=steps, output_type="np", **given).images
    return torch.from_numpy(images).permute(0, 3, 1, 2) * 2 - 1
