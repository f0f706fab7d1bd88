"""Both stages in buckets: the same run on any number of ranks, in pieces and after a kill; samples of each size."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ldm.latents.manifest import Manifest
from ldm.sampling.pipeline import Pipeline
from ldm.training.metrics_table import read_metrics
from tests.many_sizes import SIZES
from tests.test_elastic import ALONE, DDP, SHARDED, Diary, Run, assert_equal, quick

STEPS = 6


def buckets(tokens: bool) -> dict[str, Any]:
    params = {**SIZES, "min_items": 1, "constant_tokens": tokens, "batch_multiple": 6}
    return {"target": "ldm.data.buckets.Buckets", "params": params}


def in_buckets(tree: dict[str, Any], many_sizes: Path, tokens: bool) -> dict[str, Any]:
    params = tree["data"]["params"]
    params.pop("resolution", None)
    params["train"]["params"]["root"] = str(many_sizes)
    params |= {"buckets": buckets(tokens), "num_validation": 5}
    return tree


@pytest.fixture(scope="module")
def stage_1(tmp_path_factory) -> Path:
    """Filled in by the first test that needs a trained autoencoder."""
    return tmp_path_factory.mktemp("stage1")


@pytest.fixture
def autoencoder(autoencoder_tree, many_sizes) -> dict[str, Any]:
    """Stage 1 before its adversarial branch, whose weight depends on how a batch is cut up."""
    autoencoder_tree["model"]["params"]["loss"]["params"]["disc_start"] = 100
    autoencoder_tree["model"]["params"]["optimizer"]["params"]["eps"] = 1e-3
    autoencoder_tree["model"]["params"].pop("schedule")
    return quick(in_buckets(autoencoder_tree, many_sizes, tokens=True), None)


@pytest.fixture
def diffusion(diffusion_tree, autoencoder, many_sizes, stage_1, forked) -> dict[str, Any]:
    """Stage 2 without dropout, whose draws belong to a rank and not to a sample."""
    if not (stage_1 / "autoencoder").exists():
        Run(forked, autoencoder, stage_1 / "autoencoder").go(1)
    (found,) = (stage_1 / "autoencoder" / "logs").iterdir()
    diffusion_tree["data"]["params"] |= {"autoencoder": str(found), "cache": str(stage_1 / "cache")}
    diffusion_tree["model"]["params"]["network"]["params"]["dropout"] = 0.0
    diffusion_tree["model"]["params"]["optimizer"]["params"] |= {"fused": True, "eps": 1e-3}
    return quick(in_buckets(diffusion_tree, many_sizes, tokens=True), None)


def logged(run: Run) -> dict[int, float]:
    """What metrics.csv says: {step, from 1: loss}."""
    rows = read_metrics(run.folder / "metrics.csv")
    return {int(row["step"]): float(row["train/loss"]) for row in rows if "train/loss" in row}


def assert_same(ours: Diary, theirs: Diary) -> None:
    """Every sample and every draw, bit for bit."""
    assert ours.seen == theirs.seen
    assert sorted(ours.losses) == sorted(theirs.losses)


def assert_near(ours: dict[int, float], theirs: dict[int, float]) -> None:
    """The losses of the steps: ranks and pieces add the same numbers up in another order."""
    assert ours.keys() == theirs.keys() == set(range(1, STEPS + 1))
    np.testing.assert_allclose([ours[step] for step in ours], [theirs[step] for step in ours], rtol=1e-6, atol=0)


def since(diary: Diary, start: int) -> Diary:
    """From that sample number on."""
    seen = {key: value for key, value in diary.seen.items() if key[0] >= start}
    return Diary(seen, {number: loss for number, loss in diary.losses.items() if number >= start}, {})


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["autoencoder", "diffusion"])
def test_on_ranks_in_pieces_and_after_a_kill_it_is_the_same_run(forked, request, stage, tmp_path):
    tree = request.getfixturevalue(stage)
    straight = Run(forked, tree, tmp_path / "alone")
    alone = straight.go(1)
    images = straight.state()["ldm"]["images_seen"]
    assert sorted(alone.losses) == list(range(images))
    assert images > STEPS * 6, "batches of half the size hold twice as many"
    for name, world, word in (("pieces", 1, "data.params.micro_batch_size=2"), ("two", 2, DDP)):
        other = Run(forked, tree, tmp_path / name)
        assert_same(other.go(world, word), alone)
        assert_near(logged(other), logged(straight))
    killed = straight.killed_after(3, tmp_path / "copy")
    again, rest = killed.go(1), since(alone, straight.state(3)["ldm"]["images_seen"])
    assert_same(again, rest)
    assert again.losses == rest.losses
    assert logged(killed) == logged(straight)
    assert_equal(killed.final(), straight.final())


@pytest.mark.slow
def test_a_run_moves_between_ranks_and_strategies(forked, diffusion, tmp_path):
    straight = Run(forked, diffusion, tmp_path / "alone")
    alone = straight.go(1, to=4)
    run = Run(forked, diffusion, tmp_path / "run")
    losses: dict[int, float] = {}
    for step, (world, strategy) in enumerate([(2, DDP), (1, ALONE), (2, SHARDED), (3, DDP)]):
        diary = run.go(world, strategy, to=step + 1)
        assert diary.seen == {key: value for key, value in alone.seen.items() if key[0] in diary.losses}
        losses |= diary.losses
    assert sorted(losses) == sorted(alone.losses)


@pytest.mark.slow
def test_validation_says_the_same_on_any_number_of_ranks(forked, diffusion, tmp_path):
    found = []
    for name, (world, *words) in {
        "alone": (1,),
        "pieces": (1, "data.params.micro_batch_size=1"),
        "two": (2, DDP),
    }.items():
        run = Run(forked, diffusion, tmp_path / name)
        run.go(world, *words, to=1)
        row = next(row for row in read_metrics(run.folder / "metrics.csv") if any("val/" in key for key in row))
        found.append({key: float(value) for key, value in row.items() if key.startswith("val/")})
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    assert found[2] == pytest.approx(found[0], rel=1e-5)


@pytest.mark.slow
def test_samples_of_each_size(forked, diffusion, stage_1, tmp_path):
    run = Run(forked, diffusion, tmp_path / "run")
    run.go(1, to=3)
    pipeline = Pipeline.load(run.folder)
    assert pipeline.manifest.sizes == [[8, 16], [16, 16], [16, 8]]
    caches = {path.name for path in (stage_1 / "cache").iterdir()}
    assert {"train-8x16", "train-16x16", "train-16x8", "validation-16x16"} <= caches
    for height, width in pipeline.manifest.sizes:
        (image,) = pipeline.generate([1], [{"class_label": 1}], steps=2, size=(height, width))
        assert image.size == (width, height)
    (image,) = pipeline.generate([1], [{"class_label": 1}], steps=2)
    assert image.size == (8, 16), "the size that most pictures have"
    manifest = Manifest.from_dict(run.state(3)["ldm"]["latents"])
    every = [Manifest.read(stage_1 / "cache" / name) for name in ("train-8x16", "train-16x16", "train-16x8")]
    positions = np.array([one.num_items * one.plan.shape[1] * one.plan.shape[2] for one in every])
    means = np.array([one.mean for one in every])
    assert np.allclose(manifest.mean, (means * positions[:, None]).sum(0) / positions.sum())
    squares = np.array([np.square(one.std) + np.square(one.mean) for one in every])
    second = (squares * positions[:, None]).sum(0) / positions.sum()
    assert np.allclose(manifest.std, np.sqrt(second - np.square(manifest.mean)))
    assert torch.isfinite(torch.tensor(manifest.std)).all()
