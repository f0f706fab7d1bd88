"""The model in training as a pipeline that samples, for callbacks."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from ldm.autoencoder.codec import Codec
from ldm.data.datamodule import class_facts
from ldm.diffusion.module import LatentDiffusion
from ldm.latents.datamodule import LatentDataModule
from ldm.sampling.pipeline import Pipeline, load_codec


class LivePipeline:
    """Shares the weights of the model in training; the autoencoder is loaded when it is first asked for.

    Args:
        autoencoder: run folder, checkpoint or folder of diffusers that decodes; None: the one that made the latents.
        trust: packages besides ldm's own that the autoencoder's configuration may name.
        what: needs it, for messages.
        callback: the name of the class, whose parameter `autoencoder` names another.
    """

    def __init__(self, autoencoder: Path | str | None, trust: Sequence[str], what: str, callback: str) -> None:
        self._autoencoder = autoencoder
        self._trust = trust
        self._what = what
        self._where = f"in the parameter autoencoder of {callback}"
        self._codec: Codec | None = None

    def of(self, trainer: pl.Trainer, module: LatentDiffusion) -> Pipeline:
        """On the module's device, with what the run's data says of conditions.

        Raises:
            CheckpointError: the autoencoder is missing, or it is another one.
        """
        data: Any = trainer.datamodule  # type: ignore[attr-defined]  # Lightning's own, set by fit
        manifest = data.manifest
        if self._codec is None:
            self._codec = load_codec(manifest, self._autoencoder, self._what, self._trust, self._where)
        dense = isinstance(data, LatentDataModule)
        facts = {**class_facts(data.train_dataset), **data.dense.facts()} if dense else None
        codec, normals = self._codec.to(module.device), data.randomness.normals
        return Pipeline.from_module(module, codec, manifest, facts=facts, normals=normals)

    def leave_device(self) -> None:
        """The autoencoder goes to the CPU, until it is asked for again."""
        if self._codec is not None:
            self._codec.to("cpu")
