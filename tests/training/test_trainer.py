"""The Trainer means by its numbers what the configuration means by them."""

import gc
from typing import Any

import pytest
import torch
from pytorch_lightning import LightningModule
from pytorch_lightning.strategies import DDPStrategy

from ldm.config.load import from_tree
from ldm.config.merging import apply
from ldm.config.tree import from_plain
from ldm.errors import ConfigError
from ldm.training import trainer
from ldm.training.callbacks.checkpoints import AtomicCheckpointIO
from ldm.training.dry_run import meta_model


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
