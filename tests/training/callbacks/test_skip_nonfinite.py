"""A step that is not finite reaches no weight and no file; too many of them in a row end the run, and say why."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import SGD, AdamW

from ldm.checkpoints import store
from ldm.errors import ConfigError, NumericError
from ldm.optim.optimizers import Muon
from ldm.training.callbacks.skip_nonfinite import SkipNonFinite
from tests.points import (
    BATCH,
    FUSED,
    Automatic,
    MakeOptimizer,
    Manual,
    PointData,
    a_trainer,
    ranks_at,
    same,
    wait_until,
    weights,
)


@pytest.mark.parametrize("kind", [Automatic, Manual])
@pytest.mark.parametrize(
    "optimizer",
    [FUSED, partial(AdamW, lr=0.1), partial(SGD, lr=0.1, momentum=0.9), partial(Muon, lr=0.1, convolutions=True)],
)
def test_a_gradient_that_is_not_finite_reaches_no_weight(
    tmp_path: Path, kind: type[Automatic], optimizer: MakeOptimizer
) -> None:
    clean = kind(optimizer)
    a_trainer(tmp_path, 5).fit(clean, PointData(BATCH, seed=1))
    limit_0 = SkipNonFinite(tmp_path, limit=0)
    module = kind(optimizer, poison=[5 * BATCH + 2])  # in the sixth step
    with pytest.raises(NumericError, match=r"step 6: .*loss nan.*sample numbers 20 to 23.*finite\.ckpt"):
        a_trainer(tmp_path, 12, [limit_0]).fit(module, PointData(BATCH, seed=1))
    assert same(weights(module.layer), weights(clean.layer))
    # The batch is skipped at resume, the rest goes on: just as without an end in between.
    resumed = kind(optimizer, poison=[5 * BATCH + 2])
    trainer = a_trainer(tmp_path, 12, [SkipNonFinite(tmp_path)])
    trainer.fit(resumed, PointData(BATCH, seed=1), ckpt_path=tmp_path / "finite.ckpt")
    assert trainer.global_step == 12
    assert all(bool(weight.isfinite().all()) for weight in weights(resumed))
    states = [state for opt in trainer.optimizers for state in opt.state.values()]
    assert all(bool(torch.as_tensor(value).isfinite().all()) for state in states for value in state.values())
    going_on = kind(optimizer, poison=[5 * BATCH + 2])
    a_trainer(tmp_path, 12, [SkipNonFinite(tmp_path)]).fit(going_on, PointData(BATCH, seed=1))
    assert same(weights(going_on), weights(resumed))


def steps(*numbers: int) -> list[int]:
    """A sample of each step, steps counted from 1."""
    return [(number - 1) * BATCH + 1 for number in numbers]


def test_some_in_a_row_are_left_out_and_too_many_end_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    guard = SkipNonFinite(tmp_path, limit=3)
    module = Automatic(poison=steps(3, 4, 5, 7, 8, 9))
    trainer = a_trainer(tmp_path, 12, [guard])
    trainer.fit(module, PointData(BATCH, seed=1))
    assert guard.state_dict() == {"in_a_row": 0, "skipped": 6}
    assert trainer.callback_metrics["train/skipped_steps"] == 6
    said = [record.getMessage() for record in caplog.records if record.name == "ldm.training.callbacks.skip_nonfinite"]
    assert [line.partition(" is left out")[0] for line in said] == [f"step {n}" for n in (3, 4, 5, 7, 8, 9)]
    assert "the 3rd in a row: the loss is not finite (loss nan; sample numbers 16 to 19), made of item " in said[2]

    with pytest.raises(NumericError, match=r"step 6: .*the 4th step in a row, allowed are 3; .*finite\.ckpt"):
        a_trainer(tmp_path, 12, [SkipNonFinite(tmp_path)]).fit(Automatic(poison=steps(3, 4, 5, 6)), PointData(BATCH, 1))


def test_the_count_survives_a_resume(tmp_path: Path) -> None:
    poison = steps(3, 4, 5, 6)
    trainer = a_trainer(tmp_path, 4, [SkipNonFinite(tmp_path)])
    trainer.fit(Automatic(poison=poison), PointData(BATCH, seed=1))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    data = PointData(BATCH, seed=1)
    with pytest.raises(NumericError, match=r"step 6: .*the 4th step in a row"):
        a_trainer(tmp_path, 12, [SkipNonFinite(tmp_path)]).fit(
            Automatic(poison=poison), data, ckpt_path=tmp_path / "last.ckpt"
        )
    # From the end on: a good step after it is no reason to end again.
    trainer = a_trainer(tmp_path, 12, [SkipNonFinite(tmp_path)])
    trainer.fit(Automatic(poison=poison), PointData(BATCH, seed=1), ckpt_path=tmp_path / "finite.ckpt")
    assert trainer.global_step == 12


class Offset(Automatic):
    """Its poisoned loss is infinite, and its gradient would be finite."""

    def loss(self, batch: dict[str, Any], layer: torch.nn.Module) -> torch.Tensor:
        loss = (layer(batch["x"]) + batch["draws"].normal("noise", (1,))).square().mean()
        return loss + float("inf") if set(self.poison) & set(batch["draws"].numbers.tolist()) else loss


@pytest.mark.parametrize("optimizer", [FUSED, partial(SGD, lr=0.1)])
def test_a_loss_that_is_not_finite_is_left_out_whatever_its_gradient(tmp_path: Path, optimizer: MakeOptimizer) -> None:
    clean, module = Offset(optimizer), Offset(optimizer, poison=steps(6))
    a_trainer(tmp_path, 5).fit(clean, PointData(BATCH, seed=1))
    guard = SkipNonFinite(tmp_path)
    a_trainer(tmp_path, 6, [guard]).fit(module, PointData(BATCH, seed=1))
    assert guard.state_dict() == {"in_a_row": 1, "skipped": 1}
    assert same(weights(module), weights(clean))


def test_two_ranks_leave_out_what_is_bad_on_one(tmp_path: Path) -> None:
    def train(rank: int) -> None:
        # The second rank has the second half of each global batch.
        module = Offset(poison=[(step - 1) * BATCH + 3 for step in (2, 4, 5)])
        trainer = a_trainer(tmp_path, 12, [SkipNonFinite(tmp_path, limit=1)], devices=2, strategy="ddp")
        try:
            trainer.fit(module, PointData(BATCH, seed=1))
        except NumericError as error:
            (tmp_path / f"said.{rank}").write_text(str(error))
            torch.save(weights(module), tmp_path / f"weights.{rank}")
            raise SystemExit(error.exit_code) from None

    with ranks_at(train) as ranks:
        assert wait_until(ranks.ended, 100)
    assert ranks.codes == {0: 5, 1: 5}
    said = [(tmp_path / f"said.{rank}").read_text() for rank in range(2)]
    assert said[0] == said[1]
    assert said[0].startswith("step 5: the loss is not finite (loss inf; sample numbers 18 to 19), made of item ")
    assert same(torch.load(tmp_path / "weights.0"), torch.load(tmp_path / "weights.1"))
    saved = store.load(tmp_path / "finite.ckpt")
    assert saved["global_step"] == 5
    assert same(list(saved["state_dict"].values()), torch.load(tmp_path / "weights.0"))


def test_a_bad_micro_batch_is_found_when_its_step_is_made(tmp_path: Path) -> None:
    data = PointData(BATCH, seed=1, micro_batch_size=2)
    module = Automatic(poison=[2 * BATCH])
    trainer = a_trainer(tmp_path, 6, [SkipNonFinite(tmp_path, 0)], accumulate_grad_batches=2, gradient_clip_val=1.0)
    with pytest.raises(NumericError, match=r"step 3: .*loss nan; sample numbers 8 to 9\)"):
        trainer.fit(module, data)
    assert store.load(tmp_path / "finite.ckpt")["global_step"] == 3


def test_the_host_does_not_look_at_every_step_on_a_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    guard = SkipNonFinite(tmp_path, limit=0, every_n_steps=4)
    looked: list[int] = []
    look = guard._look
    monkeypatch.setattr(guard, "_look", lambda trainer: (looked.append(trainer.global_step), look(trainer)))
    module = Automatic(poison=[4 * BATCH])
    monkeypatch.setattr(Automatic, "device", torch.device("meta"), raising=False)
    with pytest.raises(NumericError, match="step 5: "):
        a_trainer(tmp_path, 12, [guard]).fit(module, PointData(BATCH, seed=1))
    assert looked[:2] == [4, 8]
    assert all(bool(weight.isfinite().all()) for weight in weights(module))


def test_a_save_looks_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Automatic, "device", torch.device("meta"), raising=False)
    guard = SkipNonFinite(tmp_path, limit=0)  # would look after step 50
    trainer = a_trainer(tmp_path, 3, [guard])
    trainer.fit(Automatic(poison=steps(2)), PointData(BATCH, seed=1))
    with pytest.raises(NumericError, match="step 2: "):
        trainer.save_checkpoint(tmp_path / "last.ckpt")
    assert not (tmp_path / "last.ckpt").exists()
    assert (tmp_path / "finite.ckpt").exists()


def test_what_is_asked_of_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="limit"):
        SkipNonFinite(tmp_path, limit=-1)
