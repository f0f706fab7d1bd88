"""Where a checkpoint comes from: the configuration, the data and the versions that made it."""

from collections.abc import Mapping
from typing import Any, Protocol, cast

import pytorch_lightning as pl

from ldm.checkpoints.store import FORMAT
from ldm.runtime.versions import versions


class Describes(Protocol):
    """A module that describes its checkpoints: `kind`, `latents`, `metrics`, in plain containers."""

    def checkpoint_facts(self) -> dict[str, Any]: ...


class Provenance(pl.Callback):
    """Writes the key "ldm" of every checkpoint: what it is, and what made it.

    Args:
        config: the run's resolved configuration, in plain containers.
        facts: of the data module (`data.facts()`), for a run that starts from the checkpoint.
    """

    def __init__(self, config: Mapping[str, Any], facts: Mapping[str, Any] | None = None) -> None:
        self._config = dict(config)
        self._facts = None if facts is None else dict(facts)
        self._versions = versions()

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        clock = trainer.datamodule.state_dict() if trainer.datamodule is not None else {}  # type: ignore[attr-defined]
        checkpoint["ldm"] = {
            "format": FORMAT,
            "config": self._config,
            "data": self._facts,
            "step": trainer.global_step,
            "images_seen": clock.get("images_seen", 0),
            "versions": self._versions,
            **cast(Describes, pl_module).checkpoint_facts(),
        }
