"""What is exported: a checkpoint of ours, opened, with its facts."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ldm.autoencoder.codec import AutoencoderCodec, Codec
from ldm.checkpoints import store
from ldm.diffusion.objectives import Objective
from ldm.interop.exports.usage import Choices
from ldm.latents.manifest import Manifest
from ldm.run_folder import RunFolder


@dataclass(frozen=True)
class Diffusion:
    """What a stage-2 checkpoint holds besides its first stage.

    Attributes:
        denoiser: the modules `network` and `conditioner`.
        objective: what the network was trained on.
        manifest: of the latents: their shape and scale, the classes.
        weights: which ones these are: "ema", the moving average, or "raw", those of the last step.
    """

    denoiser: nn.ModuleDict
    objective: Objective
    manifest: Manifest
    weights: str


@dataclass(frozen=True)
class Trained:
    """A model, on the CPU and without gradients.

    Attributes:
        file: the checkpoint.
        record: its facts (ldm/checkpoints/store.py).
        config: that of its run, under today's names.
        codec: the first stage: the model itself, or that of a diffusion model.
        diffusion: None: the checkpoint is of stage 1.
        hours: of training, from the speeds that were logged; None: not known.
    """

    file: Path
    record: Mapping[str, Any]
    config: Mapping[str, Any]
    codec: Codec
    diffusion: Diffusion | None = None
    hours: float | None = None

    @property
    def weights(self) -> str:
        """Which weights these are: "ema", or "raw", which is all that stage 1 has."""
        return "raw" if self.diffusion is None else self.diffusion.weights

    def license(self, choices: Choices) -> str:
        """Of the weights: as asked for, else that of what they were converted from, else "unknown"."""
        origin: Mapping[str, Any] = self.record.get("origin") or {}
        return choices.license or str(origin.get("license", "unknown"))

    def codec_record(self) -> Mapping[str, Any]:
        """The facts of the first stage's checkpoint; empty if there is none."""
        return store.record(Path(self.codec.path)) if self.holds_autoencoder else {}

    @property
    def run(self) -> RunFolder:
        """The run folder, or the folder of a checkpoint that lies outside of one."""
        parent = self.file.absolute().parent
        return RunFolder(parent.parent if parent.name == "checkpoints" else parent)

    @property
    def params(self) -> Mapping[str, Any]:
        """Of its LightningModule: the nodes of its parts."""
        params: Mapping[str, Any] = self.config["model"]["params"]
        return params

    @property
    def holds_autoencoder(self) -> bool:
        """Whether its first stage is one of ours, which goes along; others are where they came from."""
        return isinstance(self.codec, AutoencoderCodec)

    @property
    def modules(self) -> dict[str, nn.Module]:
        """Its parts by name: `autoencoder`, and of stage 2 `network`, `conditioner` and `objective`."""
        parts: dict[str, nn.Module] = {"autoencoder": self.codec}
        if self.diffusion is not None:
            parts |= {**dict(self.diffusion.denoiser.items()), "objective": self.diffusion.objective}
        return parts
