"""Whole runs with dense conditions in their batches: the same on any number of ranks, in pieces and after a kill."""

from pathlib import Path
from typing import Any

import pytest

from ldm.checkpoints import store
from tests.conftest import node
from tests.test_elastic import DDP, Run, assert_equal, assert_same_run, quick

TRUST = ("--trust", "tests")


@pytest.fixture
def diffusion(diffusion_tree, runs, tmp_path) -> dict[str, Any]:
    """All that a cache keeps, what is drawn of it, and masked pictures; without dropout, whose draws are a rank's."""
    params = diffusion_tree["data"]["params"]
    params["train"] = node("tests.tiny_dense.Scenes", number=14)
    params |= {"autoencoder": str(runs.autoencoder), "cache": str(tmp_path / "cache"), "resolution": 16}
    params["aligned"] = {
        "map": node("ldm.latents.aligned.Map"),
        "boxes": node("ldm.latents.aligned.Boxes", most=6),
        "image": node("ldm.latents.aligned.Pixels"),
        "pair": node("ldm.latents.aligned.Pair"),
    }
    params["drawn"] = {"low_resolution": node("ldm.data.degradation.Degradation", factor=2)}
    masks = node("ldm.data.masks.Masks", most=0.9)
    params["masked"] = node("ldm.latents.masked.MaskedLatents", masks=masks, variants=2)
    diffusion_tree["model"]["params"]["network"]["params"]["dropout"] = 0.0
    diffusion_tree["model"]["params"]["optimizer"]["params"] |= {"fused": True, "eps": 1e-3}
    return quick(diffusion_tree, None)


@pytest.mark.slow
def test_on_ranks_in_pieces_and_after_a_kill_it_is_the_same_run(forked, diffusion, tmp_path):
    straight = Run(forked, diffusion, tmp_path / "alone")
    alone = straight.go(1, *TRUST)
    kinds = {kind for _, kind in alone.seen}
    assert kinds >= {"latent", "map", "boxes", "boxes_mask", "image", "pair", "low_resolution", "mask", "masked_latent"}
    pieces = Run(forked, diffusion, tmp_path / "pieces").go(1, *TRUST, "data.params.micro_batch_size=2")
    assert_same_run(pieces, alone)
    assert_same_run(Run(forked, diffusion, tmp_path / "two").go(2, *TRUST, DDP), alone)
    killed = straight.killed_after(3, tmp_path / "copy")
    assert_same_run(killed.go(1, *TRUST), alone.between(3, 6), tolerance=0)
    assert_equal(killed.final(), straight.final())


@pytest.mark.slow
def test_masks_in_the_loop_are_the_same_run_after_a_kill(forked, diffusion, tmp_path):
    diffusion["data"]["params"]["masked"]["params"]["variants"] = None
    straight = Run(forked, diffusion, tmp_path / "alone")
    alone = straight.go(1, *TRUST)
    killed = straight.killed_after(3, tmp_path / "copy")
    assert_same_run(killed.go(1, *TRUST), alone.between(3, 6), tolerance=0)
    assert_equal(killed.final(), straight.final())


@pytest.mark.slow
def test_other_masks_are_refused_by_key(forked, diffusion, tmp_path, capfd):
    run = Run(forked, diffusion, tmp_path / "run")
    run.go(1, *TRUST, to=1)
    facts = store.record(store.verify(run.folder).path)["data"]
    assert facts["aligned"]["boxes"] == {"what": "boxes", "most": 6}
    with pytest.raises(AssertionError):
        run.go(1, *TRUST, "data.params.masked.params.variants=3", to=2)
    assert "data.params.masked.params.variants: the run has 2, requested is 3" in capfd.readouterr().err
    assert Path(run.folder).is_dir()
