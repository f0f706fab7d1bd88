"""What is measured of a run after its training, for the loggers that the run has."""

import os
from collections.abc import Mapping
from pathlib import Path

from ldm.errors import LockError
from ldm.run_folder import RunFolder
from ldm.training.defaults import wandb_id
from ldm.training.loggers import FencedWandb


def send_to_wandb(run: Path | None, values: Mapping[str, float], step: int, project: str) -> list[str]:
    """Add `evaluation/<metric>` to the run in wandb, if it logs there; notes for the user.

    Args:
        run: the run folder; None: there is none.
        values: by metric.
        step: of the checkpoint.
        project: the wandb project.
    """
    mode = os.environ.get("WANDB_MODE")
    if run is None or not (run / "wandb").is_dir() or mode == "disabled":
        return []
    name = run.absolute().name
    try:
        with RunFolder(run).owned():  # wandb lets one process write to a run
            logger = FencedWandb(run, project, name, wandb_id(name), offline=mode == "offline")
            logger.log_metrics({f"evaluation/{metric}": value for metric, value in values.items()}, step)
            logger.finalize("success")
            logger.close()
    except LockError:
        return ["the run is being trained, so that this is not sent to wandb; evaluate it again after its end"]
    return ["wandb: some of it was lost; the record has it"] if logger.lost else []
