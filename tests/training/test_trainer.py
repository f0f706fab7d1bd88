"""The Trainer means by its numbers what the configuration means by them."""

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import LightningModule
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.strategies import DDPStrategy

from ldm.config.load import from_tree
from ldm.config.merging import apply
from ldm.config.tree import from_plain
from ldm.errors import ConfigError
from ldm.run_folder import RunFolder
from ldm.training import trainer
from ldm.training.callbacks.checkpoints import AtomicCheckpointIO, Checkpoints
from ldm.training.callbacks.progress import Progress, Throughput
from ldm.training.callbacks.provenance import Provenance
from ldm.training.callbacks.skip_nonfinite import SkipNonFinite
from ldm.training.callbacks.stop import StopOnSignal
from ldm.training.dry_run import meta_model
from ldm.training.loggers import FencedWandb, MetricsFile


class Data:
    """Cuts a step into four micro-batches for one rank, two for two."""

    def accumulation(self, world_size: int) -> int:
        return 4 // world_size


def tree(**arguments: Any) -> dict[str, Any]:
    return {"seed": 1, "lightning": {"trainer": {"accelerator": "cpu", "devices": 1, "max_steps": 100} | arguments}}


def make(config: dict[str, Any], model: Any = None) -> Any:
    return trainer.make_trainer(config, Data(), model or LightningModule())


def test_intervals_count_optimizer_steps():
    assert make(tree(val_check_interval=5)).val_check_interval == 20
    assert make(tree()).val_check_interval == 40  # ten times in a run
    assert make(tree(val_check_interval=999)).val_check_interval == 400  # once, at its end
    assert make(tree(max_steps=3)).val_check_interval == 4


def test_the_world_size_is_shared_out_before_accumulation():
    config = tree(devices=2, val_check_interval=5)
    config["lightning"]["strategy"] = {
        "target": "pytorch_lightning.strategies.DDPStrategy",
        "params": {"static_graph": True},
    }
    made = make(config)
    assert isinstance(made.strategy, DDPStrategy)
    assert made.world_size == 2
    assert made.val_check_interval == 10


def test_what_is_fixed():
    made = make(tree())
    assert made.max_steps == 100
    assert made.max_epochs == -1
    assert made.check_val_every_n_epoch is None
    assert isinstance(made.strategy.checkpoint_io, AtomicCheckpointIO)


@pytest.mark.parametrize("interval", [0.5, True, "1", -3])
def test_an_interval_that_is_no_number_of_steps(interval):
    with pytest.raises(ConfigError, match="val_check_interval"):
        make(tree(val_check_interval=interval))


def test_what_lightning_refuses_is_a_config_error():
    with pytest.raises(ConfigError, match=r"lightning\.trainer: .*abacus"):
        make(tree(accelerator="abacus"))
    with pytest.raises(ConfigError, match="cards"):
        make(tree(cards=1))
    assert make(tree(gradient_clip_val=1.0)).gradient_clip_val == 1.0


MISSING = ["trainer.accelerator=tpu", "trainer.profiler=xla", "strategy=xla", "trainer.precision=transformer-engine"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of a profiler that is half made
@pytest.mark.parametrize("override", MISSING)
def test_a_package_that_the_trainer_lacks(override):
    """Lightning's errors of it are of another kind than its other ones."""
    config = from_plain({"lightning": tree()["lightning"], "seed": 1}, "test")
    with pytest.raises(ConfigError, match=r"lightning\.trainer: it needs a package that is not .*pip install"):
        make(apply(config, [f"lightning.{override}"]).plain())
    gc.collect()


def callbacks(section: dict[str, Any], tmp_path: Path) -> list[Any]:
    config = tree()
    config["lightning"]["callbacks"] = section
    return trainer.make_callbacks(config, RunFolder(tmp_path), LightningModule(), {"num_classes": None})


def test_a_run_is_kept_without_a_line_of_yaml(tmp_path):
    kinds = [type(callback) for callback in callbacks({}, tmp_path)]
    assert kinds == [Provenance, SkipNonFinite, StopOnSignal, Throughput, Progress, Checkpoints]


def test_callbacks_are_replaced_added_and_left_out_by_name(tmp_path):
    made = callbacks(
        {
            "checkpoints": {"target": "ldm.training.callbacks.checkpoints.Checkpoints", "params": {"every": 7}},
            "progress": None,
            "mine": {"target": "pytorch_lightning.callbacks.Timer", "params": {"duration": "00:01:00:00"}},
        },
        tmp_path,
    )
    names = [type(callback).__name__ for callback in made]
    assert names == ["Provenance", "SkipNonFinite", "StopOnSignal", "Throughput", "Checkpoints", "Timer"]
    assert made[-2].every == 7


def test_metrics_are_always_written_and_wandb_is_a_choice(tmp_path, monkeypatch):
    folder = RunFolder(tmp_path)
    started: list[str] = []
    monkeypatch.setattr(FencedWandb, "log_hyperparams", lambda self, params: started.append(self.version))

    def kinds(config: dict[str, Any]) -> list[type]:
        return [type(logger) for logger in trainer.make_loggers(config, folder, "project")]

    assert kinds(tree()) == [MetricsFile, FencedWandb]
    assert started == [tmp_path.name]
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert kinds(tree()) == [MetricsFile]
    without = tree()
    without["lightning"]["logger"] = None
    monkeypatch.setenv("WANDB_MODE", "online")
    assert kinds(without) == [MetricsFile]


CSV = {"target": "pytorch_lightning.loggers.CSVLogger"}
WANDB = {"target": "ldm.training.loggers.FencedWandb"}


@pytest.mark.parametrize(
    ("logger", "expected"),
    [
        ({"csv": CSV}, [FencedWandb, CSVLogger]),
        ({"csv": CSV, "wandb": None}, [CSVLogger]),
        ({"wandb": None}, []),
        ({"wandb": WANDB, "csv": CSV}, [FencedWandb, CSVLogger]),
        (CSV, [CSVLogger]),
        ([CSV], [CSVLogger]),
        ([CSV, WANDB], [CSVLogger, FencedWandb]),
        ([], []),
        (None, []),
    ],
)
def test_loggers_stand_beside_wandb_or_in_its_place(logger, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(FencedWandb, "log_hyperparams", lambda self, params: None)
    config = tree()
    config["lightning"]["logger"] = logger
    folder = RunFolder(tmp_path / "logs" / "run 1")
    made = trainer.make_loggers(config, folder, "project")[1:]
    assert [type(one) for one in made] == expected
    for one in made:
        assert Path(str(one.save_dir)) == folder.path
        if isinstance(one, FencedWandb):
            assert (one.name, one.version) == ("project", "run-1")
            assert one._wandb_init["name"] == "run 1"


def test_what_a_logger_is_given_is_kept(tmp_path):
    config = tree()
    config["lightning"]["logger"] = {"csv": {**CSV, "params": {"save_dir": str(tmp_path / "own")}}, "wandb": None}
    _, made = trainer.make_loggers(config, RunFolder(tmp_path), "project")
    assert made.save_dir == str(tmp_path / "own")


@pytest.mark.parametrize(
    ("target", "package"),
    [("CometLogger", "comet-ml"), ("MLFlowLogger", "mlflow")],
)
def test_a_logger_without_its_package_is_refused_by_key(target, package, tmp_path, monkeypatch):
    config = tree()
    config["lightning"]["logger"] = {"more": {"target": f"pytorch_lightning.loggers.{target}"}, "wandb": None}
    with pytest.raises(ConfigError) as caught:
        trainer.make_loggers(config, RunFolder(tmp_path), "project")
    message = str(caught.value)
    assert message.startswith(f"lightning.logger.more: pytorch_lightning.loggers.{target} cannot be built")
    assert "pip install" in message
    assert package in message


@pytest.mark.parametrize("precision", ["16-true", "bf16-true", "64-true", "64", "transformer-engine"])
@pytest.mark.parametrize("stage", [1, 2])
def test_precisions_that_a_model_is_not_made_for_are_refused(precision, stage, autoencoder_tree, runs):
    model = runs.module if stage == 2 else meta_model(autoencoder(autoencoder_tree))
    with pytest.raises(ConfigError, match=rf"lightning\.trainer\.precision: .*32-true.*bf16-mixed.*found {precision}"):
        make(tree(precision=precision), model)


def test_fp16_is_for_stage_2_alone(autoencoder_tree, runs):
    with pytest.raises(ConfigError, match=r"lightning\.trainer\.precision: AutoencoderKL .*found 16-mixed"):
        make(tree(precision="16-mixed"), meta_model(autoencoder(autoencoder_tree)))
    for precision in ("32-true", "bf16-mixed", 32):
        make(tree(precision=precision), runs.module)
        make(tree(precision=precision), meta_model(autoencoder(autoencoder_tree)))


def autoencoder(config: dict[str, Any]) -> dict[str, Any]:
    return from_tree(config, "test").resolved({"channels": 3, "resolution": 16, "batch_size": 6})


def test_first_weights_are_a_function_of_the_seed():
    node = {"target": "torch.nn.Linear", "params": {"in_features": 3, "out_features": 3}}
    torch.manual_seed(99)
    first, same, other = (trainer.build_model({"seed": seed, "model": node}).weight for seed in (1, 1, 2))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_a_wandb_id_fits_into_a_file_name():
    assert trainer._wandb_id("2026-01-01T00-00-00_faces.b=1") == "2026-01-01T00-00-00_faces-b-1"
    long = [trainer._wandb_id("2026-01-01T00-00-00_" + "\N{GREEK SMALL LETTER PI}" * 110 + end) for end in "ab"]
    assert long[0] != long[1]
    assert all(len(name.encode()) <= 128 for name in long)
