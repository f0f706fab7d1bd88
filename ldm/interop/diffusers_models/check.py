"""Whether a folder makes the pictures that the model makes: it is loaded as others load it, and one is compared."""

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn, cast

import torch
from torch import Tensor

from ldm.autoencoder.codec import AutoencoderCodec, Codec
from ldm.diffusion.conditioners.base import Conditioner
from ldm.diffusion.objectives import Objective
from ldm.diffusion.paths import DiscreteVP
from ldm.errors import ConfigError, NumericError
from ldm.interop.exports.trained import Diffusion
from ldm.randomness import Draws

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
    scale = 1.0 if batch is None else 1.5
    tolerance = max(CLOSE, ROUNDING * _amplification(diffusion.objective, times))
    pipeline = loaded(folder)
    found = []
    for seed in range(SEEDS):
        noise = drawn(seed, (1, *diffusion.manifest.plan.shape))
        own = ours(codec, diffusion, noise, batch, scale, times)
        other = theirs(pipeline, seed, 1, batch, scale, len(times) - 1)
        found.append(float((own - other).abs().max()))
        if found[-1] <= tolerance:
            return
    _refuse(min(found), tolerance)


def check_first_stage(codec: AutoencoderCodec, name: str, folder: Path) -> None:
    """NumericError unless the autoencoder in a folder gives the same latents and pictures."""
    import diffusers

    model = getattr(diffusers, name).from_pretrained(folder)
    side = 8 * codec.down_factor
    images = drawn(0, (1, codec.in_channels, side, side)).tanh()
    with torch.no_grad():
        output = model.encode(images)
        latents = output.latents if codec.quantizer is not None else output.latent_dist.mean
        mean, _ = codec.encode(images)
        pictures = model.decode(mean).sample.clamp(-1, 1)
    scale = max(1.0, float(mean.abs().max()))
    worst = max(float((latents - mean).abs().max()) / scale, float((pictures - codec.decode(mean)).abs().max()))
    if worst > CLOSE:
        _refuse(worst, CLOSE)


@torch.no_grad()
def ours(
    codec: Codec, diffusion: Diffusion, noise: Tensor, batch: Mapping[str, Any] | None, scale: float, times: Tensor
) -> Tensor:
    """(N,C,H,W) in [-1, 1]: what `ldm sample` makes of the noise (N,c,h,w) with `ddim` at these times.

    Args:
        batch: the rows' conditions; None: unconditional.
        scale: of guidance.
    """
    objective, network, conditioner = diffusion.objective, diffusion.denoiser["network"], _conditioner(diffusion)
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


def theirs(pipeline: Any, seed: int, number: int, batch: Mapping[str, Any] | None, scale: float, steps: int) -> Tensor:
    """The same by a pipeline of diffusers, of `number` rows of noise, `drawn(seed, ...)`."""
    given: dict[str, Any] = {"batch_size": number} if batch is None else {"guidance_scale": scale}
    if batch is not None and "class_label" in batch:
        given["class_labels"] = batch["class_label"].tolist()
    if batch is not None and "caption" in batch:
        given["prompt"] = batch["caption"]
    generator = torch.Generator().manual_seed(seed)
    images = pipeline(num_inference_steps=steps, generator=generator, output_type="np", **given).images
    return torch.from_numpy(images).movedim(-1, 1) * 2 - 1


def loaded(folder: Path) -> Any:
    """The pipeline in a folder, as others load it, silent."""
    import diffusers

    verbosity = diffusers.utils.logging.get_verbosity()
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    try:
        pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, trust_remote_code=True, local_files_only=True)
    except ValueError as error:  # such as code of others that is switched off
        raise ConfigError(
            f"--to diffusers: the folder cannot be compared with the model, since the library does not load it here: "
            f"{' '.join(str(error).split())} --no-check writes it without"
        ) from error
    finally:
        diffusers.utils.logging.set_verbosity(verbosity)
        diffusers.utils.logging.enable_progress_bar()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def drawn(seed: int, shape: tuple[int, ...]) -> Tensor:
    """Standard normal noise, as the library's pipelines draw it from a generator."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _steps(objective: Objective) -> int:
    """Few, and a divisor of the levels."""
    if isinstance(objective.path, DiscreteVP):
        return max(number for number in range(1, 11) if objective.path.steps % number == 0)
    return 10


def _batch(diffusion: Diffusion) -> dict[str, Any] | None:
    """One row with every condition that the model reads: the last class, a text."""
    keys = _conditioner(diffusion).keys
    batch: dict[str, Any] = {"draws": Draws(0, [0], 1)}
    if "class_label" in keys:
        batch["class_label"] = torch.tensor([(diffusion.manifest.plan.num_classes or 1) - 1])
    if "caption" in keys:
        batch["caption"] = ["a photo"]
    return batch if keys else None


def _conditioner(diffusion: Diffusion) -> Conditioner:
    return cast(Conditioner, diffusion.denoiser["conditioner"])


def _amplification(objective: Objective, times: Tensor) -> float:
    """By how much an error of the network's output grows in a step, where it grows most.

    Where hardly any signal is left and the network predicts the noise, that is hundreds of times and more.
    """
    t, s = times[:-1], times[1:]
    alpha_t, sigma_t, alpha_s, sigma_s = objective.alpha(t), objective.sigma(t), objective.alpha(s), objective.sigma(s)
    of_x0 = objective.prediction.x0_error_scale(alpha_t, sigma_t)
    return float(((alpha_s - sigma_s * alpha_t / sigma_t) * of_x0).abs().max())


def _refuse(found: float, tolerance: float) -> NoReturn:
    raise NumericError(
        f"--to diffusers: the folder's pictures differ from the model's by {found:.2g}, expected {tolerance:.2g} at "
        f"most, so it is not kept. Please report it; --to safetensors takes every model, and --no-check keeps a folder "
        f"that is not exact"
    )
