"""A run has come to something from its first optimizer step on."""

from pathlib import Path

import pytest

from ldm.training.callbacks.first_step import FirstStep
from tests.points import Automatic, PointData, a_trainer


def test_a_step_is_made_when_its_micro_batches_are_through(tmp_path: Path) -> None:
    first, seen = FirstStep(), []
    module = Automatic(on_batch=lambda numbers: seen.append(first.made))
    a_trainer(tmp_path, 3, [first]).fit(module, datamodule=PointData(4, seed=1))
    assert seen[0] is False
    assert seen[-1] is True
    assert first.made


def test_what_is_to_be_kept_is_kept_once_after_the_first_step(tmp_path: Path) -> None:
    kept: list[int] = []
    module = Automatic()
    trainer = a_trainer(tmp_path, 3, [FirstStep(lambda: kept.append(trainer.global_step))])
    trainer.fit(module, datamodule=PointData(4, seed=1))
    assert kept == [1]


def test_a_run_that_ends_in_its_first_batch_has_made_none(tmp_path: Path) -> None:
    kept: list[str] = []
    first = FirstStep(lambda: kept.append("kept"))

    def fail(numbers: object) -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        a_trainer(tmp_path, 3, [first]).fit(Automatic(on_batch=fail), datamodule=PointData(4, seed=1))
    assert not first.made
    assert not kept
