"""What is measured of a run reaches wandb where the run logs there, and nothing else happens."""

from pathlib import Path
from typing import Any, ClassVar

import pytest

from ldm.run_folder import RunFolder
from ldm.training import evaluations
from ldm.training.evaluations import send_to_wandb
from tests.forked import Forked


class Told:
    """In place of FencedWandb.

    Attributes:
        calls: what it was told, of all objects.
    """

    calls: ClassVar[list[Any]] = []
    lost = 0

    def __init__(self, save_dir: Path, project: str, name: str, id: str, offline: bool) -> None:
        self.calls.append((save_dir, project, name, id, offline))

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self.calls.append((metrics, step))

    def finalize(self, status: str) -> None:
        self.calls.append(status)

    def close(self) -> None:
        self.calls.append("closed")


@pytest.fixture
def told(monkeypatch):
    Told.calls.clear()
    monkeypatch.setattr(evaluations, "FencedWandb", Told)
    monkeypatch.setenv("WANDB_MODE", "offline")
    return Told.calls


@pytest.fixture
def run(tmp_path):
    (tmp_path / "2026-01-01T00-00-00_x" / "wandb").mkdir(parents=True)
    return tmp_path / "2026-01-01T00-00-00_x"


def test_the_run_of_that_id_gets_the_numbers(told, run):
    assert send_to_wandb(run, {"FID": 12.5}, 100, "mine") == []
    name = "2026-01-01T00-00-00_x"
    assert told == [(run, "mine", name, name, True), ({"evaluation/FID": 12.5}, 100), "success", "closed"]


def test_nothing_is_sent_where_the_run_does_not_log_there(told, run, tmp_path, monkeypatch):
    (tmp_path / "other").mkdir()
    for place in (None, tmp_path / "other"):
        assert send_to_wandb(place, {"FID": 12.5}, 100, "mine") == []
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert send_to_wandb(run, {"FID": 12.5}, 100, "mine") == []
    assert told == []


def test_a_run_in_training_is_left_alone(told, run, forked: Forked):
    with RunFolder(run).owned():
        (notes,) = forked(1, lambda rank: send_to_wandb(run, {"FID": 12.5}, 100, "mine"))
    assert "the run is being trained" in notes[0]
