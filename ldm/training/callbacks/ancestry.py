"""Where a run's weights come from, and the scale of the latents that they know: a resumed run keeps both.

New weights are loaded before the first step, and every checkpoint says so.
"""

import json
from typing import Any

import pytorch_lightning as pl

from ldm.errors import CheckpointError
from ldm.files import write_text
from ldm.latents.datamodule import LatentDataModule
from ldm.latents.manifest import Manifest
from ldm.run_folder import RunFolder
from ldm.runtime import distributed
from ldm.training.callbacks.checkpoints import raise_together
from ldm.training.init_from import Weights

_FACTS = ("origin", "init_from")
"""Of a checkpoint: handed on from the one that is resumed."""


class Ancestry(pl.Callback):
    """Must come after `Provenance`, which writes a checkpoint's other facts.

    Args:
        folder: the run folder, of rank 0.
        weights: what the run starts from; None: from nothing, or it is resumed.
    """

    def __init__(self, folder: RunFolder, weights: Weights | None) -> None:
        self._folder = folder
        self._weights = weights
        self._facts: dict[str, Any] = {}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        # Before Lightning calls the model's configure_model, which shards it.
        if self._weights is None:
            return
        weights, self._weights = self._weights, None
        verified, failure = weights.find(), None
        try:
            found = weights.load(verified, pl_module, trainer.datamodule)  # type: ignore[attr-defined]  # Lightning's
        except Exception as error:
            failure = error
        raise_together(failure, CheckpointError, "load the weights to start from")
        record = self._facts["init_from"] = distributed.from_main(lambda: found.record())
        if trainer.is_global_zero:
            write_text(self._folder.init_from_file, json.dumps(record, indent=2) + "\n")

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        facts = checkpoint.get("ldm") or {}
        self._facts = {name: facts[name] for name in _FACTS if name in facts}
        data = trainer.datamodule  # type: ignore[attr-defined]  # Lightning's own
        if isinstance(data, LatentDataModule) and "latents" in facts:
            data.keep_scale(Manifest.from_dict(facts["latents"]))

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if "ldm" in checkpoint:
            checkpoint["ldm"] |= self._facts
