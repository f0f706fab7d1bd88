"""Which strategy a configuration gets, and what a model may be trained under."""

from typing import Any

import pytest
from pytorch_lightning import LightningModule
from pytorch_lightning.strategies import SingleDeviceStrategy

from ldm.config.load import from_tree
from ldm.errors import ConfigError
from ldm.training import dry_run, trainer
from ldm.training.strategies import DDP, FSDP2

TORCHRUN = (
    "TORCHELASTIC_RUN_ID=x RANK=5 LOCAL_RANK=1 WORLD_SIZE=6 LOCAL_WORLD_SIZE=2 GROUP_RANK=2 "
    "MASTER_ADDR=127.0.0.1 MASTER_PORT=29500"
)
SRUN = (
    "SLURM_NTASKS=6 SLURM_NNODES=3 SLURM_NTASKS_PER_NODE=2 SLURM_PROCID=5 SLURM_LOCALID=1 SLURM_NODEID=2 "
    "SLURM_JOB_NAME=ldm SLURM_JOB_ID=7"
)
LAUNCHERS = {
    name: dict(word.split("=") for word in words.split()) for name, words in (("torchrun", TORCHRUN), ("srun", SRUN))
}


class Data:
    def accumulation(self, world_size: int) -> int:
        return 1


def make(strategy: Any = None, model: Any = None, **arguments: Any) -> Any:
    section = {"trainer": {"accelerator": "cpu", "max_steps": 3} | arguments}
    if strategy is not None:
        section["strategy"] = strategy
    return trainer.make_trainer({"seed": 1, "lightning": section}, Data(), model or LightningModule())


def node(name: str, **params: Any) -> dict[str, Any]:
    return {"target": f"ldm.training.strategies.{name}", "params": params}


@pytest.fixture(autouse=True)
def _started_by_hand(monkeypatch):
    for variables in LAUNCHERS.values():
        for name in variables:
            monkeypatch.delenv(name, raising=False)


def test_one_device_needs_none_and_several_have_ours():
    assert type(make(devices=1).strategy) is SingleDeviceStrategy
    for made in (make(devices=2), make(num_nodes=2, devices=1), make("ddp", devices=2), make("ddp", devices=1)):
        assert type(made.strategy) is DDP
        assert made.strategy.timeout == 300


@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize("strategy", [None, node("FSDP2")])
def test_a_launcher_says_how_many_there_are(monkeypatch, launcher, strategy):
    for name, value in LAUNCHERS[launcher].items():
        monkeypatch.setenv(name, value)
    made = make(strategy, devices=1)
    assert (made.world_size, made.num_nodes, made.num_devices, made.global_rank) == (6, 3, 2, 5)
    made.strategy.cluster_environment.validate_settings(made.num_devices, made.num_nodes)
    assert type(made.strategy) is (FSDP2 if strategy else DDP)


@pytest.mark.parametrize("name", ["DDP", "FSDP2"])
def test_the_knobs_reach_the_process_group(name):
    strategy = make(node(name, timeout=20, backend="gloo"), devices=2).strategy
    assert strategy.timeout == 20
    assert strategy.process_group_backend == "gloo"


@pytest.fixture
def stages(autoencoder_tree, diffusion_tree) -> list[Any]:
    """The modules of both stages, of no memory."""
    diffusion_tree["data"]["params"]["autoencoder"] = "somewhere"
    facts = {"channels": 3, "resolution": 16, "num_classes": 2, "batch_size": 6, "num_items": 16}
    trees = [from_tree(tree, "test").resolved(facts) for tree in (autoencoder_tree, diffusion_tree)]
    return [dry_run.meta_model(tree) for tree in trees]


def test_fsdp2_is_for_stage_2(stages):
    autoencoder, diffusion = stages
    with pytest.raises(ConfigError, match=r"FSDP2 is for stage 2.*ldm\.training\.strategies\.DDP"):
        make(node("FSDP2"), autoencoder)
    assert make(node("FSDP2"), diffusion)
    assert make(node("DDP"), autoencoder)


def test_both_stages_clip_by_themselves(stages):
    for model in stages:
        with pytest.raises(ConfigError, match=r"model\.params\.gradient_clip"):
            make(model=model, gradient_clip_val=1.0)


@pytest.mark.parametrize("precision", ["16-mixed", "bf16-true", 64])
def test_fsdp2_keeps_its_masters_in_float32(precision):
    with pytest.raises(ConfigError, match=r"lightning\.trainer"):
        make(node("FSDP2"), precision=precision)
    for fine in ("32-true", "bf16-mixed"):
        assert make(node("FSDP2"), precision=fine)
