"""Run folders of converted models: complete or absent, and as good as any other."""

import json
import os
import resource
import signal
from pathlib import Path

import pytest
import torch
import yaml

from ldm.autoencoder.codec import Codec
from ldm.checkpoints import store
from ldm.config.load import build
from ldm.errors import CheckpointError, ConfigError
from ldm.interop.convert import convert
from ldm.interop.models import Request
from ldm.run_folder import RunFolder
from tests.interop import foreign


@pytest.fixture
def file(tmp_path, monkeypatch) -> Path:
    """A small kl-f2 with a discriminator, in the folder that is the current one."""
    monkeypatch.chdir(tmp_path)
    loss = foreign.discriminator() | {"loss.logvar": torch.tensor(0.25), "loss.perceptual_loss.lin0": torch.zeros(3)}
    torch.save({"state_dict": foreign.first_stage() | loss, "global_step": 9}, "own.ckpt")
    return tmp_path / "own.ckpt"


def run_of(path: Path, request: Request | None = None, **about) -> Path:
    options = {"config": None, "license": None, "name": None, "logdir": Path("logs")} | about
    assert len([*convert(path, request or Request(resolution=32), **options)]) == 1
    (run,) = options["logdir"].iterdir()
    return run


def test_what_lies_in_it(file):
    run = run_of(file, license="MIT")
    assert run.name.endswith("_own")
    origin = json.loads((run / "origin.json").read_text())
    assert (origin["source"], origin["family"], origin["license"]) == ("own.ckpt", "CompVis first stage", "MIT")
    assert origin["dropped"] == {"LPIPS, which is read from its own file": 1}
    assert len(origin["sha256"]["own.ckpt"]) == 64
    record = store.record(run / "checkpoints" / "step=0.ckpt")
    assert record["origin"] == origin
    assert record["config"] == yaml.safe_load(RunFolder(run).config_file.read_text())
    state = json.loads((run / "run_state.json").read_text())
    assert (state["status"], state["step"], state["resume_from"]) == ("finished", 0, "checkpoints/step=0.ckpt")


def test_it_can_be_trained_further(file):
    """With the discriminator from the first step, and the log-variance of the file."""
    state = store.load(store.verify(run_of(file)).path)
    module = build(state["ldm"]["config"]["model"])
    module.load_state_dict(state["state_dict"])
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    total, logs = module.loss(images, *module(images), module.decoder.last_layer, step=0)
    total.backward()
    assert module.loss.discriminator.layers[0].weight.grad.any()
    assert (float(logs["logvar"]), "lpips" in logs, "discriminator" in logs) == (0.25, True, True)
    optimizers, _ = module.configure_optimizers()
    assert [type(one).__name__ for one in optimizers] == ["Adam", "Adam"]


def test_half_precision_is_read_exactly(file):
    for dtype in (torch.float16, torch.bfloat16):
        tensors = {name: one.to(dtype) for name, one in foreign.first_stage().items()}
        torch.save(tensors, f"{dtype}.pt".removeprefix("torch."))
        logs = Path(f"logs_{dtype}")
        codec = Codec.load(run_of(Path(f"{dtype}.pt".removeprefix("torch.")), logdir=logs))
        assert torch.equal(codec.encoder.conv_in.weight, tensors["encoder.conv_in.weight"].float())


def test_two_conversions_are_two_runs(file):
    for _ in range(2):
        [*convert(file, Request(), config=None, license=None, name=None, logdir=Path("logs"))]
    hashes = {Codec.load(run).weight_hash() for run in Path("logs").iterdir()}
    assert (len([*Path("logs").iterdir()]), len(hashes)) == (2, 1)


@pytest.mark.parametrize("name", ["a/b", "..", "a b", "x" * 300])
def test_a_name_that_cannot_be_one(file, name):
    with pytest.raises(ConfigError, match="cannot be the name of a run"):
        run_of(file, name=name)
    assert not Path("logs").exists()


def test_nothing_is_written_where_something_does_not_fit(file):
    torch.save(foreign.first_stage() | {"more": torch.zeros(1)}, "own.ckpt")
    with pytest.raises(CheckpointError):
        run_of(file)
    assert not Path("logs").exists()


def converted_with_little_space(path: Path) -> int:
    from ldm.cli import convert as program

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
    return program.main([str(path), "--logdir", "logs"])


def test_a_disk_that_is_full_half_way_leaves_nothing(file):
    child = os.fork()
    if child == 0:
        try:
            os._exit(converted_with_little_space(file))
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 6
    assert [*Path("logs").iterdir()] == []
