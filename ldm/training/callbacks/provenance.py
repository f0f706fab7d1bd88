"""Where a checkpoint comes from: the configuration, the data and the versions that made it."""

import importlib.metadata
import platform
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol, cast

import pytorch_lightning as pl
import torch

import ldm

FORMAT = 1
"""Of the "ldm" key of a checkpoint."""


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


def versions() -> dict[str, str]:
    """What this process runs on: python, torch, lightning, ldm, and ldm's git commit where there is one."""
    found = {"python": platform.python_version(), "torch": str(torch.__version__)}
    for name in ("pytorch-lightning", "ldm"):
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    root = Path(str(ldm.__file__)).parents[1]
    if (root / ".git").exists():
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        with suppress(OSError, subprocess.SubprocessError):
            found["commit"] = subprocess.check_output(command, text=True, timeout=10, stderr=subprocess.DEVNULL).strip()
    return found
