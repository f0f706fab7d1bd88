"""What a latent diffusion model of CompVis is that its tensors do not say: from its YAML, or as it was published."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ldm.config.load import build
from ldm.errors import ConfigError
from ldm.interop.compvis.published import PUBLISHED, Published
from ldm.interop.models import node
from ldm.interop.sources import Source, number, whole

# What CompVis' LatentDiffusion takes where a YAML says nothing (ldm/models/diffusion/ddpm.py).
_THEIR_DEFAULTS = {
    "timesteps": 1000,
    "beta_schedule": "linear",
    "linear_start": 1e-4,
    "linear_end": 2e-2,
    "cosine_s": 8e-3,
    "loss_type": "l2",
    "parameterization": "eps",
    "original_elbo_weight": 0.0,
    "scale_factor": 1.0,
    "scale_by_std": False,
}
# What sets models apart that have the same shapes, as far as it is no size.
_DECIDING = ("parameterization", "linear_start", "linear_end", "scale_factor")
# Parameters of UNetModel that change what it computes, which ours does not have, and what they must be.
_UNSUPPORTED: Mapping[str, Any] = {
    "dims": 2,
    "conv_resample": True,
    "num_heads_upsample": -1,
    "num_attention_blocks": None,
    "disable_self_attentions": None,
    "disable_middle_self_attn": False,
}
_PREDICTIONS = {"eps": "Eps", "x0": "X0", "v": "V"}


@dataclass(frozen=True)
class Description:
    """Settings, by their names in `model.params` of a YAML.

    Attributes:
        path: of the file, for messages.
        params: what the YAML says, with their code's defaults where it is a whole one.
        alike: the published models that have these shapes.
    """

    path: str
    params: Mapping[str, Any]
    alike: Sequence[Published]

    @property
    def _agreeing(self) -> Sequence[Published]:
        """Those that the YAML does not contradict, if there are any."""
        agreeing = [
            one
            for one in self.alike
            if all(self.params.get(key, one.params[key]) == one.params[key] for key in _DECIDING)
        ]
        return agreeing or self.alike

    def setting(self, key: str) -> Any:
        """ConfigError if nothing says it."""
        if key in self.params:
            return self.params[key]
        said = [one.params.get(key, _THEIR_DEFAULTS.get(key)) for one in self._agreeing]
        return self._only(f"model.params.{key}", said)

    def number(self, key: str, least: float = -math.inf) -> float:
        """The setting; ConfigError if it is not a finite number above that."""
        return number(self.setting(key), self._key(key), least)

    def _key(self, name: str) -> str:
        return f"{self.path}: model.params.{name}"

    def heads(self) -> dict[str, int]:
        """{"num_heads": n} or {"num_head_channels": n}, of our UNet."""
        unet = part(self.params, "unet_config")
        for key in ("num_head_channels", "num_heads"):  # theirs ignores num_heads beside num_head_channels
            if (value := unet.get(key, -1)) != -1:
                return {key: whole(value, self._key(f"unet_config.params.{key}"))}
        found = self._only("model.params.unet_config.params.num_heads", [dict(one.heads) for one in self.alike])
        return dict(found)

    def image_size(self) -> int | None:
        """The side of the latents; None: nothing says.

        Raises:
            ConfigError: published models of several sizes have these shapes.
        """
        agreeing, written = self._agreeing, self.params.get("image_size")
        misled = written is not None and [*agreeing] != [] and all(one.misleading_size == written for one in agreeing)
        if written is not None and not misled:
            return whole(written, self._key("image_size"))
        if not agreeing:
            return None
        return int(self._only("model.params.image_size", [one.params["image_size"] for one in agreeing]))

    def condition_key(self) -> str | None:
        """What their code calls the condition; None: nothing says it."""
        if (written := self.params.get("cond_stage_key")) is not None:
            return str(written)
        said = {one.params.get("cond_stage_key") for one in self._agreeing}
        return said.pop() if len(said) == 1 else None

    def label_dropout(self, knows_null: Callable[[Published], bool]) -> float:
        """The share of images that it was trained on without their condition.

        Args:
            knows_null: whether a published model's null condition is that of this one, whose share is then taken if the
                YAML gives no `ucg_rate`.
        """
        written = part(self.params, "cond_stage_config").get("ucg_rate", self.params.get("ucg_rate"))
        if written is None:
            return max((one.label_dropout for one in self.alike if knows_null(one)), default=0.0)
        if not 0 <= (rate := number(written, self._key("ucg_rate"))) < 1:
            raise ConfigError(f"{self._key('ucg_rate')}: expected a share from 0 to below 1, found {written!r}")
        return rate

    def objective(self) -> dict[str, Any]:
        """The node of our objective.

        Raises:
            ConfigError: a schedule, prediction or loss that ldm does not have.
        """
        prediction = self._known("parameterization", _PREDICTIONS)
        steps = whole(self.setting("timesteps"), self._key("timesteps"))
        parts: dict[str, Any] = {"schedule": self._schedule(), "steps": steps}
        if prediction != "Eps":
            parts["prediction"] = node(f"diffusion.predictions.{prediction}")
        if self._known("loss_type", {"l1": "Absolute", "l2": "Squared"}) == "Absolute":
            parts["distance"] = node("diffusion.weightings.Absolute")
        if (weight := self.number("original_elbo_weight")) > 0:
            parts["weighting"] = node("diffusion.weightings.PlainAndVLB", vlb_weight=weight)
        return node("diffusion.objectives.DDPM", **parts)

    def scale(self, source: Source) -> float:
        """What latents are multiplied by: the file's own buffer before everything else."""
        if (buffer := source.tensors.get("scale_factor")) is not None:
            return number(buffer, f"{self.path}: its tensor scale_factor", 0)
        if self.setting("scale_by_std") and self.number("scale_factor") == 1:
            raise ConfigError(
                f"{self.path}: model.params.scale_factor: this model's latents were scaled by their own deviation "
                f"(scale_by_std), and the file does not hold the factor: write it into the YAML"
            )
        return self.number("scale_factor", 0)

    def _schedule(self) -> dict[str, Any]:
        if self.params.get("given_betas") is not None:
            raise ConfigError(f"{self.path}: model.params.given_betas: expected a schedule by its name, found a list")
        # Their names are the wrong way round.
        kind = self._known("beta_schedule", {"linear": "SqrtLinear", "sqrt_linear": "Linear", "cosine": "Cosine"})
        if kind == "Cosine":
            return node("diffusion.noise_schedules.Cosine", offset=self.number("cosine_s"))
        ends = {"start": self.number("linear_start", 0), "end": self.number("linear_end", 0)}
        return node(f"diffusion.noise_schedules.{kind}", **ends)

    def _known(self, key: str, names: Mapping[str, str]) -> str:
        found = self.setting(key)
        if not isinstance(found, str) or found not in names:
            raise ConfigError(f"{self._key(key)}: expected {' or '.join(names)}, found {found!r}")
        return names[found]

    def _only(self, key: str, said: Sequence[Any]) -> Any:
        """The one value that published models have; ConfigError if there are several, or none."""
        different = [value for place, value in enumerate(said) if value not in said[:place]]
        if len(different) == 1 and different[0] is not None:
            return different[0]
        if len(different) > 1:
            why = f"it is {' or '.join(map(str, different))} in published models of the same shapes"
        else:
            why = "no published model that is known here has these shapes"
        raise ConfigError(
            f"{self.path}: {key}: the tensors do not say it, and {why}. Name the YAML that belongs to the model: "
            f"--config FILE (one that says this key alone is enough if the rest is as published)"
        )


def described(source: Source, unet: Mapping[str, Any], *, linear: bool) -> Description:
    """Reads the YAML as data: nothing that it names is imported.

    Args:
        unet: our UNet's parameters, as its tensors say them.

    Raises:
        ConfigError: the YAML is of another model, or asks for what our UNet cannot do.
    """
    params = part(source.config, "model")
    theirs = part(params, "unet_config")
    _check_unet(theirs, unet, str(source.path))
    alike = [one for one in PUBLISHED if one.has(unet, linear)]
    return Description(str(source.path), (_THEIR_DEFAULTS if theirs else {}) | dict(params), alike)


def check_schedule(objective: Mapping[str, Any], source: Source) -> None:
    """ConfigError if the file's own table of alphas is of another schedule."""
    if (table := source.tensors.get("alphas_cumprod")) is None:
        return
    path = build(objective).path
    ours, theirs = path.alpha(torch.arange(1.0, path.steps + 1)).square(), table.float()
    if ours.shape != theirs.shape or not torch.allclose(ours, theirs, rtol=1e-3, atol=1e-6):
        betas = source.tensors.get("betas", table)
        raise ConfigError(
            f"{source.path}: model.params.linear_start, linear_end, timesteps or beta_schedule: not those of the file, "
            f"which has {len(theirs)} levels and betas from {float(betas[0]):.6g} to {float(betas[-1]):.6g}; "
            f"name its own YAML with --config"
        )


def part(tree: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """`params` of the node there; {} if there is none."""
    found = tree.get(key)
    params = found.get("params") if isinstance(found, Mapping) else None
    return params if isinstance(params, Mapping) else {}


def _check_unet(theirs: Mapping[str, Any], unet: Mapping[str, Any], path: str) -> None:
    levels = range(len(unet["channel_mult"]))
    found: dict[str, Any] = {
        "in_channels": unet["in_channels"] + unet["spatial_channels"],
        "out_channels": unet["in_channels"],
        "model_channels": unet["model_channels"],
        "channel_mult": unet["channel_mult"],
        "num_res_blocks": unet["num_res_blocks"],
        "use_scale_shift_norm": unet["scale_shift"],
        "context_dim": unet["context_dim"],
    }
    if len(levels) > 1:
        found["resblock_updown"] = unet["resample_in_blocks"]
    if unet["context_dim"] is not None:
        found["transformer_depth"] = unet["transformer_depth"]
    for key, value in found.items():
        if key in theirs and theirs[key] != value:
            raise ConfigError(
                f"{path}: model.params.unet_config.params.{key}: {theirs[key]} in the YAML, {value} in the file: "
                f"it is another model's; name the right one with --config"
            )
    if isinstance(theirs.get("attention_resolutions"), list):
        # Down factors; those beyond the deepest level do nothing.
        written = [level for level in levels if 2**level in theirs["attention_resolutions"]]
        if written != unet["attention_levels"]:
            raise ConfigError(
                f"{path}: model.params.unet_config.params.attention_resolutions: attention at levels {written} in the "
                f"YAML, {unet['attention_levels']} in the file: it is another model's; name the right one with --config"
            )
    for key, must in _UNSUPPORTED.items():
        if key in theirs and theirs[key] != must:
            raise ConfigError(
                f"{path}: model.params.unet_config.params.{key}: expected {must}, as in all models that can be "
                f"converted, found {theirs[key]!r}"
            )
