"""Whole runs with dense conditions in their batches: the same on any number of ranks, in pieces and after a kill."""

import os
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from torch import Tensor

import main
from ldm.checkpoints import store
from ldm.diffusion.module import LatentDiffusion
from tests.conftest import node
from tests.test_elastic import DDP, FSDP2, SHARDED, STEPS, Run, assert_equal, assert_same_run, quick
from tests.tiny_dense import CLASSES

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


# ---- each task ---------------------------------------------------------------------------------------------------


class Task(NamedTuple):
    """A model of a task, or of several in one.

    Attributes:
        conditioner: of the task.
        network: the slots that it fills.
        data: what it reads.
        seen: columns of the batches that it reads, and its own draws.
        world: ranks of the run that is killed.
        strategy: of two ranks.
    """

    conditioner: dict[str, Any]
    network: dict[str, int]
    data: dict[str, Any]
    seen: set[str]
    world: int = 1
    strategy: str = DDP


def conditioner(target: str, **params: Any) -> dict[str, Any]:
    return node(f"ldm.diffusion.conditioners.{target}", **params)


def joint(kept: list[str], dropout: dict[str, float], **parts: dict[str, Any]) -> dict[str, Any]:
    return conditioner("joint.Joint", conditioners=parts, dropout=dropout, kept=kept)


PIXELS = {"image": node("ldm.latents.aligned.Pixels")}
BOXES = {"boxes": node("ldm.latents.aligned.Boxes", most=6)}
HOLES = node("ldm.latents.masked.MaskedLatents", masks=node("ldm.data.masks.Masks", most=0.9), variants=2)
TRANSFORMER = {"channels": 16, "depth": 1, "vocab_size": 26, "most": 6, "num_heads": 1, "num_head_channels": 8}

TASKS = {
    "inpainting by class": Task(
        joint(
            ["picture"],
            {"kind": 0.2},
            kind=conditioner("classes.ClassVector", num_classes="${data:num_classes}", channels=16),
            picture=conditioner("inpainting.MaskedPicture", channels=4),
        ),
        {"spatial_channels": 5, "vector_channels": 16},
        {"aligned": PIXELS, "masked": HOLES},
        {"class_label", "mask", "masked_latent", "dropout/kind"},
        world=2,
        strategy=FSDP2,
    ),
    "layout as tokens and as an image on a semantic map": Task(
        joint(
            ["map"],
            {"tokens": 0.2},
            tokens=conditioner("layout.LayoutTokens", box_classes=9, channels=16),
            image=conditioner("layout.LayoutMap", box_classes=9, channels=3),
            map=conditioner("maps.SemanticMap", map_classes=CLASSES),
        ),
        {"spatial_channels": 6, "context_dim": 16},
        {"aligned": {**BOXES, "map": node("ldm.latents.aligned.Map")}},
        {"boxes", "boxes_mask", "map", "dropout/tokens"},
        world=2,
        strategy=SHARDED,
    ),
    "super-resolution by a layout in the lineage's tokens": Task(
        joint(
            ["small"],
            {},
            small=conditioner("low_resolution.LowResolution", fold=2, vector_channels=8),
            tokens=conditioner("layout_transformer.LayoutTransformer", **TRANSFORMER),
        ),
        {"spatial_channels": 12, "vector_channels": 8, "context_dim": 16},
        {
            "aligned": {**PIXELS, **BOXES},
            "drawn": {"low_resolution": node("ldm.data.degradation.Degradation", factor=2)},
        },
        {"low_resolution", "augmentation", "augmentation/noise", "boxes", "layout/order"},
    ),
    "pair": Task(
        conditioner("low_resolution.LowResolution", fold=4, most=0),
        {"spatial_channels": 48},
        {"aligned": {"low_resolution": node("ldm.latents.aligned.Pair")}},
        {"low_resolution"},
    ),
}


@pytest.fixture
def tree_of(diffusion) -> Callable[[Task], dict[str, Any]]:
    def tree_of(task: Task) -> dict[str, Any]:
        data, model = diffusion["data"]["params"], diffusion["model"]["params"]
        for key in ("aligned", "drawn", "masked"):
            del data[key]
        data |= task.data
        model |= {"conditioner": task.conditioner, "label_dropout": 0.3}
        del model["network"]["params"]["vector_channels"]
        model["network"]["params"] |= task.network
        return diffusion

    return tree_of


@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
def test_each_task_is_the_same_run_on_two_ranks_and_after_kill_9(forked, tree_of, name, tmp_path):
    task = TASKS[name]
    tree = tree_of(task)
    runs = {1: Run(forked, tree, tmp_path / "alone"), 2: Run(forked, tree, tmp_path / "two")}
    diaries = {1: runs[1].go(1, *TRUST), 2: runs[2].go(2, *TRUST, task.strategy)}
    assert {kind for _, kind in diaries[1].seen} >= {"latent", "label_dropout", *task.seen}
    assert_same_run(diaries[2], diaries[1])
    killed = Run(forked, tree, tmp_path / "killed")
    words = ["--base", str(killed.file), "--logdir", str(killed.logdir), f"lightning.trainer.max_steps={STEPS}", *TRUST]
    words += [task.strategy] if task.world > 1 else []
    with pytest.raises(AssertionError, match=f"0: -{signal.SIGKILL:d}"):
        forked(task.world, partial(killed_in_step_5, words=words, logs=killed.logdir))
    resumed = killed.go(task.world, *TRUST)
    assert_same_run(resumed, diaries[task.world].between(3, STEPS), tolerance=0)
    assert_equal(killed.final(), runs[task.world].final())


def killed_in_step_5(rank: int, words: list[str], logs: Path) -> None:
    """Train, in a forked child, until the save of step 3 is there."""
    step = LatentDiffusion.training_step

    def last(self: LatentDiffusion, batch: dict[str, Any], batch_idx: int) -> Tensor:
        while self.global_step == 4:
            if [*logs.glob("*/checkpoints/step=00000003.ckpt")]:
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(0.02)
        return step(self, batch, batch_idx)

    LatentDiffusion.training_step = last
    main.main(words)
