"""What DiT, SiT and LightningDiT are trained on, which their weights do not say: noise or a velocity, of which latents.

SiT's and LightningDiT's training checkpoints say how they were trained (`args`, `config`), and `--config` may; for all
else the published models stand.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ldm.errors import ConfigError
from ldm.interop import statistics
from ldm.interop.models import Request, node
from ldm.interop.sources import Source, number

SD_SCALE = 0.18215
"""What Stable Diffusion's autoencoder's latents are multiplied by, all channels alike and not centered."""


@dataclass(frozen=True)
class Kind:
    """What tells the three apart.

    Attributes:
        name: for notes and messages.
        backward: t runs from noise (0) to data (1), and the network predicts the velocity in that direction.
        objective: its node, from what is said of the training.
        scale: (mean, std) of the latents per channel, from the source and the number of channels.
    """

    name: str
    backward: bool
    objective: Callable[["Source"], dict[str, Any]]
    scale: Callable[["Source", Request, int], tuple[list[float], list[float]]]


def kind_of(source: Source, tensors: Mapping[str, Tensor], request: Request) -> Kind:
    """Which of the three: as asked; as said by what lies in the file; LightningDiT also by what it alone has."""
    named = str(said(source, "model_type") or said(source, "model") or "").partition("-")[0].lower()
    own = any(name.startswith("feat_rope.") or name.endswith((".w12.weight", ".norm1.weight")) for name in tensors)
    family = request.family or said(source, "family") or (named if named in KINDS else None)
    if family is None and own:
        family = "lightningdit"
    if family not in KINDS:
        asked = "" if family is None else f" `family: {family}` is neither."
        raise ConfigError(
            f"{source.path}: may be a DiT (predicts noise) or a SiT (a velocity, time running the other way), whose "
            f"files have the same tensors.{asked} Say which: --family dit, or --family sit"
        )
    return KINDS[family]


def said(source: Source, word: str) -> Any:
    """What the description or the file's own record of its training says under this word; None: nothing."""
    for tree in (_flat(source.config), source.rest):
        for key, value in tree.items():
            if key.rpartition(".")[2] == word:
                return value
    return None


def _has(source: Source, section: str) -> bool:
    """Whether the description or the file's own record of its training has this section."""
    return any(section in key.split(".")[:-1] for tree in (_flat(source.config), source.rest) for key in tree)


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def _ddpm(source: Source) -> dict[str, Any]:
    return node("diffusion.objectives.DDPM", schedule=node("diffusion.noise_schedules.Linear", start=1e-4, end=0.02))


def _sit_objective(source: Source) -> dict[str, Any]:
    """Of SiT's paths; with its own names for them."""
    prediction, path = said(source, "prediction") or "velocity", said(source, "path_type") or "Linear"
    if prediction != "velocity" or path not in ("Linear", "GVP", "VP"):
        raise ConfigError(
            f"{source.path}: was trained with prediction {prediction} on path {path}; expected velocity, as the "
            f"published models, on Linear, GVP or VP"
        )
    if path == "Linear":
        return node("diffusion.objectives.Flow", time_scale=1.0)
    return node("diffusion.objectives.Interpolant", path=node(f"diffusion.paths.{path}", time_scale=1.0))


def _lightning_objective(source: Source) -> dict[str, Any]:
    """SiT's, with the levels and the direction's loss that it says; of the published models where none of its YAML's
    `transport` is known, whose silence means no.
    """
    made = _sit_objective(source)
    usual = not _has(source, "transport")
    levels, direction = (said(source, word) for word in ("use_lognorm", "use_cosine_loss"))
    if usual if levels is None else levels:
        made["params"]["levels"] = node("diffusion.noise_levels.LogitNormal")
    if usual if direction is None else direction:
        made["params"]["direction_weight"] = 1.0
    return made


def _sd_scale(source: Source, request: Request, channels: int) -> tuple[list[float], list[float]]:
    """Of Stable Diffusion's autoencoder, unless statistics are given."""
    if request.statistics is not None:
        return statistics.read(request.statistics, channels)
    if channels != 4:
        raise ConfigError(
            f"{source.path}: takes latents of {channels} channels, not Stable Diffusion's 4, so their scale is not "
            f"known. Give their mean and standard deviation: --statistics FILE"
        )
    return [0.0] * channels, [1 / SD_SCALE] * channels


def _measured_scale(source: Source, request: Request, channels: int) -> tuple[list[float], list[float]]:
    """Of `latents_stats.pt`, which LightningDiT keeps beside its latents: z = (latent - mean) / std * multiplier.

    A YAML's `data` that is silent means what their code then does, which is not what the published models do.
    """
    whole = _has(source, "data")
    multiplier, normed = said(source, "latent_multiplier"), said(source, "latent_norm")
    default = SD_SCALE if whole else 1.0
    multiplier = number(default if multiplier is None else multiplier, f"{source.path}: latent_multiplier", 0)
    if normed is False or (normed is None and whole):
        return [0.0] * channels, [1 / multiplier] * channels
    if request.statistics is None:
        raise ConfigError(
            f"{source.path}: LightningDiT scales latents by statistics that are in another file. Give it, "
            f"latents_stats.pt of the latents that it was trained on: --statistics FILE"
        )
    mean, std = statistics.read(request.statistics, channels)
    return mean, [one / multiplier for one in std]


KINDS = {
    "dit": Kind("DiT", False, _ddpm, _sd_scale),
    "sit": Kind("SiT", True, _sit_objective, _sd_scale),
    "lightningdit": Kind("LightningDiT", True, _lightning_objective, _measured_scale),
}
