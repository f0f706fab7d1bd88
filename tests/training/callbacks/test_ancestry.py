"""A run that goes on has the latents on the scale on which it began, whatever became of its cache."""

import shutil
from pathlib import Path

import pytest

import main
from ldm.checkpoints import store
from ldm.config.load import to_yaml


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_a_resumed_run_keeps_the_scale_of_a_cache_that_was_made_anew(diffusion_tree, runs):
    """Runs without flips had caches with mirror images, whose statistics counted them."""
    trainer = diffusion_tree["lightning"]["trainer"]
    trainer |= {"max_steps": 2, "val_check_interval": 2, "log_every_n_steps": 1}
    diffusion_tree["data"]["params"] |= {"autoencoder": str(runs.autoencoder), "resolution": 16}

    def train(name: str) -> None:
        Path("config.yaml").write_text(to_yaml({**diffusion_tree, "name": name}))
        assert main.main(["--base", "config.yaml", f"data.params.flip={name == 'mirrored'}"]) == 0

    def manifest(name: str) -> dict:
        (folder,) = Path("logs").glob(f"*_{name}")
        return store.load(store.verify(folder))["ldm"]["latents"]

    train("mirrored")
    train("plain")
    old = manifest("plain")
    assert old["mean"] == manifest("mirrored")["mean"]
    shutil.rmtree("cache")
    train("new")
    new = manifest("new")
    assert new["mean"] != old["mean"]
    assert main.main(["-r", next(map(str, Path("logs").glob("*_plain"))), "lightning.trainer.max_steps=4"]) == 0
    resumed = manifest("plain")
    assert (resumed["mean"], resumed["std"]) == (old["mean"], old["std"])
    assert resumed["plan"] == new["plan"]
