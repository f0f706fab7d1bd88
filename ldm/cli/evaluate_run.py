"""What `ldm evaluate` reads of a run, of either stage: how far it has come, its data, what can be measured of it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ldm.autoencoder.lpips import AlexNetLPIPS
from ldm.checkpoints import store
from ldm.errors import CheckpointError, ConfigError
from ldm.training.metrics_table import read_metrics


def kind(path: Path) -> str:
    """Of a run folder or a checkpoint: "autoencoder" or "diffusion"; read from any checkpoint, unverified."""
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    files = [path] if path.is_file() else sorted(folder.glob(f"*{store.SUFFIX}"))
    if not files:
        raise CheckpointError(f"{path}: no checkpoint; expected a run folder that has one, or a checkpoint, to measure")
    for file in files:
        try:
            return str(store.record(file).get("kind"))
        except CheckpointError:
            continue  # a damaged one is dealt with where it is loaded
    return "diffusion"


def training(file: Path, found: Mapping[str, Any]) -> dict[str, Any]:
    """How far the model of a checkpoint has come."""
    batch = (found.get("data") or {}).get("batch_size")
    step = int(found.get("step", 0))
    images = found.get("images_seen") or (None if batch is None else step * batch)
    table = file.parent.parent / "metrics.csv"
    each = images / step if images and step else batch  # of a step, on average: with buckets they may differ
    return {"checkpoint": str(file), "step": step, "images_seen": images, "hours": hours(table, step, each)}


def hours(table: Path, step: int, batch: float | None) -> float | None:
    """Of training up to a step, from the speeds that were logged; None: there are none."""
    if batch is None:
        return None
    rows = [(int(row["step"]), float(row["images_per_second"])) for row in read_metrics(table) if _has_speed(row)]
    before, seconds = 0, 0.0
    for at, speed in rows:
        if at <= step:
            seconds += (at - before) * batch / speed
            before = at
    return seconds / before * step / 3600 if before else None


def _has_speed(row: Mapping[str, str]) -> bool:
    return float(row.get("images_per_second", 0)) > 0


def home(file: Path) -> Path:
    """Where the records of a checkpoint lie."""
    run = file.parent.parent if file.parent.name == "checkpoints" else file.parent
    return run / "evaluation"


def data(config: Mapping[str, Any], file: Path) -> Mapping[str, Any]:
    """The section that says what a run was trained on."""
    if not config.get("data"):
        raise ConfigError(f"{file}: does not say which data it was trained on.")
    found: Mapping[str, Any] = config["data"]
    return found


def perceptual(shape: tuple[int, int, int], metrics: Sequence[str] | None) -> tuple[dict[str, Any], list[str]]:
    """LPIPS by its name, if its weights are there and it fits; otherwise a note, or an error if it was asked for."""
    if metrics is not None and "lpips" not in metrics:
        return {}, []
    smallest = AlexNetLPIPS.TRUNK.smallest
    if shape[0] not in (1, 3) or min(shape[1:]) < smallest:
        reason = f"it compares pictures of 1 or 3 channels and {smallest} pixels or more on a side"
        if metrics is not None:
            raise ConfigError(f"--metrics lpips: {reason}; these have {shape[0]}, and {shape[1]} x {shape[2]} pixels")
        return {}, [f"LPIPS: left out: {reason}"]
    try:
        return {"LPIPS-AlexNet": AlexNetLPIPS()}, []
    except CheckpointError as error:
        if metrics is not None:
            raise
        return {}, [f"LPIPS: left out: {str(error).splitlines()[0]}"]
