"""What a converted first stage goes on to be trained with: what the original was, as far as its file tells.

The published training of latent-diffusion and taming-transformers: L1 and LPIPS, a KL or codebook term, a patch
discriminator whose weight is adaptive; Adam at 4.5e-6 for each image of the batch. A description's `lossconfig`
replaces the published numbers. ldm/autoencoder/losses.py says how they are expressed here.
"""

from collections.abc import Mapping
from typing import Any

from ldm.autoencoder.lpips import VGG16
from ldm.errors import CheckpointError
from ldm.interop.models import BATCH_SIZE, node
from ldm.weights import cache

_BOUND = 1e4
"""Of the adaptive weight, in the published code."""
_BETA = 0.25
"""Of the published quantizers. With `legacy`, which they have, it is the weight of the codebook's term and the
commitment's is 1: a quarter of a loss whose commitment is 4."""
COMMITMENT = 1 / _BETA
_LPIPS = "model.params.loss.params.perceptual={target: ldm.autoencoder.lpips.LPIPS}"


def training(
    described: Mapping[str, Any],
    encoder: Mapping[str, Any],
    resolution: int,
    discriminator: Mapping[str, Any] | None,
    logvar: float,
    learning_rate: object = None,
    steps: object = None,
) -> tuple[dict[str, Any], list[str]]:
    """({loss, optimizer} of AutoencoderKL's parameters, sentences on what they are).

    Args:
        described: the original's `lossconfig.params`; {}: the published numbers.
        encoder: parameters of its node.
        resolution: of the images, pixels.
        discriminator: node of the one in the file; None: it has none.
        logvar: log-variance, which no published optimizer changes.
        learning_rate: for each image of the batch, if described.
        steps: that the original was trained for, in its own count, if known.
    """
    quantized = not encoder["moments"]
    percept, notes = perceptual(encoder["in_channels"], number(described.get("perceptual_weight"), 1.0))
    loss = {"logvar": logvar, "learn_logvar": False} | percept
    values = encoder["in_channels"] * resolution**2
    if quantized:
        factor = 2 ** (len(encoder["channel_mult"]) - 1)
        # Theirs are means over the values of an image and of a latent; ours are sums.
        ratio = encoder["in_channels"] * factor**2 / encoder["latent_channels"]
        loss["kl_weight"] = number(described.get("codebook_weight"), 1.0) * _BETA * ratio
    else:
        loss["kl_weight"] = number(described.get("kl_weight"), 1e-6)
    if discriminator is None:
        notes.append("The file has no discriminator: it is trained without the adversarial term, unless one is added.")
    else:
        done = int(number(steps, 0))
        start = max(0, int(number(described.get("disc_start"), 0)) - done) if done else 0
        kind = "Vanilla" if described.get("disc_loss") == "vanilla" else "Hinge"
        loss |= {
            "discriminator": discriminator,
            "adversarial": node(f"autoencoder.losses.{kind}"),
            "adversarial_weight": number(described.get("disc_weight"), 0.75 if quantized else 0.5),
            "max_adversarial_weight": _BOUND * values if quantized else _BOUND,
            "disc_start": start,
        }
        notes.append(f"Its discriminator came along, and is used from step {start} on.")
    adam = {"lr": number(learning_rate, 4.5e-6) * BATCH_SIZE, "betas": [0.5, 0.9], "fused": True}
    optimizer = {"target": "torch.optim.Adam", "partial": True, "params": adam}
    return {"loss": node("autoencoder.losses.AutoencoderLoss", **loss), "optimizer": optimizer}, notes


def perceptual(channels: int, weight: float) -> tuple[dict[str, Any], list[str]]:
    """LPIPS where it can be had; else a sentence that says how to get it."""
    if weight <= 0 or channels not in (1, 3):
        return {}, []
    try:
        cache.find_any(VGG16.files)
    except CheckpointError:
        return {}, [
            f"LPIPS's weights were not on this machine, so it is trained without that term, which the original had: "
            f"`ldm weights --fetch` brings them, and {_LPIPS} adds it."
        ]
    return {"perceptual": node("autoencoder.lpips.LPIPS"), "perceptual_weight": weight}, []


def number(value: object, default: float) -> float:
    """A value of a description, which may be anything, or the default if it is no number."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else default
