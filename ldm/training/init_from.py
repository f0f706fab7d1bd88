"""A new run starts from weights that exist: those of any run or converted model (ldm/config/init_from.py).

`prepare` compares the file with the configuration before anything is built. `Weights.load` puts the tensors in their
places, on every rank, before the model is sharded: in both the weights of a diffusion model and its averages.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from ldm.autoencoder.module import AutoencoderKL
from ldm.checkpoints import store
from ldm.checkpoints.store import Verified
from ldm.config.init_from import InitFrom, parsed
from ldm.diffusion.module import LatentDiffusion
from ldm.errors import CheckpointError, ConfigError
from ldm.interop import lora, lora_files
from ldm.latents.datamodule import LatentDataModule
from ldm.latents.manifest import same_encoder
from ldm.latents.statistics import Statistics
from ldm.runtime import distributed
from ldm.training.matching import Match


@dataclass(frozen=True)
class Weights:
    """What a run starts from.

    Attributes:
        section: what the configuration says.
        classes: the names of this run's classes, if it has some.
        params: of the configuration's model.
        resolution: of this run's images or latents, if known.
        verified: the file, where this rank has read it.
    """

    section: InitFrom
    classes: Sequence[str] | None = None
    params: Mapping[str, Any] = field(default_factory=dict)
    resolution: Any = None
    verified: Verified | None = None

    def find(self) -> Verified:
        """The file, the same on every rank (collective); CheckpointError if there is none, or it is damaged."""
        return distributed.from_main(lambda: self.verified or _verified(self.section))

    def match(self, verified: Verified, model: nn.Module) -> Match:
        """The file beside a model, checked."""
        found = Match(verified, self.section, model, self.classes, self.params, self.resolution)
        found.check()
        return found

    def load(self, verified: Verified, model: nn.Module, data: Any) -> Match:
        """Put the weights of the file into `model`; what became of them.

        Raises:
            CheckpointError: the file is of another stage, or cannot be read.
            ConfigError: it does not fit.
        """
        found = self.match(verified, model)
        if isinstance(data, LatentDataModule):
            _check_scale(found, data.manifest.plan.autoencoder, data.manifest.statistics)
        found.load()
        if self.section.adapter is not None:
            assert isinstance(model, LatentDiffusion), "checked by `prepare`"
            adapter = lora_files.read(Path(self.section.adapter))
            for denoiser in (model.denoiser, model.ema.average, *model.ema.extra):
                lora_files.load(denoiser.get_submodule("network"), adapter)
        return found


def prepare(tree: Mapping[str, Any], outline: nn.Module, data: Any, facts: Mapping[str, Any]) -> Weights | None:
    """What a run without a checkpoint starts from, compared with its configuration; None: from random weights.

    Rank 0 reads the file, and prints what becomes of it.

    Args:
        tree: the configuration with every reference filled in.
        outline: the model without values.
        data: data module.
        facts: of it.

    Raises:
        CheckpointError: the file is missing, damaged, or of another stage.
        ConfigError: it does not fit.
    """
    section = parsed(tree.get("init_from"))
    frozen = _frozen(outline)
    if section is None:
        if frozen:
            parts = ", ".join([*frozen, "decoder"])
            raise ConfigError(
                "model.params.train_encoder: this would freeze an encoder of random weights; name the run that it "
                f"comes from: init_from=logs/<run>, or init_from='{{run: logs/<run>, parts: [{parts}]}}'"
            )
        if isinstance(outline, LatentDiffusion) and outline.adapter is not None:
            raise ConfigError(
                "model.params.adapter: this would adapt random weights; name the run that they come from: "
                "init_from=logs/<run>"
            )
        return None
    weights = Weights(section, data.class_names, tree["model"].get("params") or {}, facts.get("resolution"))
    if not distributed.is_main():
        return weights
    verified = _verified(section)
    found = weights.match(verified, outline)
    for part in frozen:
        if not found.takes_all(part):
            raise ConfigError(
                f"init_from: model.params.train_encoder is false, so all of the {part} has to come from here"
            )
    _check_adapter(section, outline, found)
    if isinstance(data, LatentDataModule) and found.manifest is not None:
        plan, statistics = data.expected()
        if statistics is not None or plan.differences(found.manifest.plan):
            _check_scale(found, plan.autoencoder, statistics)
    print("\n".join(found.report()))
    return replace(weights, verified=verified)


def _check_adapter(section: InitFrom, outline: nn.Module, found: Match) -> None:
    """ConfigError if a frozen weight does not come from the file, or the adapter's own file does not fit."""
    adapted = isinstance(outline, LatentDiffusion) and outline.adapter is not None
    if section.adapter is not None and not adapted:
        raise ConfigError("init_from.adapter: this model has no adapter: set model.params.adapter, or leave it out")
    if not adapted:
        return
    denoiser = outline.get_submodule("denoiser")
    frozen = [lora.base_name(name) for name, weight in denoiser.named_parameters() if not weight.requires_grad]
    if lost := [name for name in frozen if name not in found.kept]:
        raise ConfigError(
            f"init_from: the adapter's base is not trained, so all of it has to come from here; {len(lost)} of its "
            f"tensors do not, such as {lost[0]}. Leave out parts, strict: false and resize"
        )
    if section.adapter is not None:
        lora_files.check(denoiser.get_submodule("network"), lora_files.read(Path(section.adapter)))


def _frozen(outline: nn.Module) -> list[str]:
    """The parts of the model that would stay random if they did not come from somewhere."""
    if not isinstance(outline, AutoencoderKL) or outline.train_encoder:
        return []
    return ["encoder"] if outline.quantizer is None else ["encoder", "quantizer"]


def _verified(section: InitFrom) -> Verified:
    try:
        return store.verify(Path(section.run))
    except CheckpointError as error:
        raise CheckpointError(f"init_from: {error}") from error


def _check_scale(found: Match, autoencoder: Mapping[str, Any], own: Statistics | None) -> None:
    """ConfigError if the network comes from latents of the same autoencoder that were standardized differently."""
    if found.manifest is None or not found.takes("network"):
        return
    theirs = found.manifest.statistics
    if not same_encoder(autoencoder, found.manifest.plan.autoencoder) or (own is not None and own.is_like(theirs)):
        return
    here = "the statistics of a cache that is not built yet" if own is None else str(own)
    raise ConfigError(
        f"init_from: {found.file}: its latents were standardized by {theirs}, this run's are by {here}, which its "
        f"network does not know. Set them:\n  data.params.statistics='{theirs}'"
    )
