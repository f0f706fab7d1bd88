"""The number of ranks, of micro-batches, and how the model lies on the ranks: none of it changes the run.

Compared exactly, sample by sample: images after crop and flip, latents, labels, and every draw (posterior, timestep,
noise, dropped labels). Losses are compared within TOLERANCE: the ranks and micro-batches add the same numbers up in
another order, float32 rounds each sum by up to 6e-8 of it, and a few steps of training carry that on. (Adam divides by
a gradient's size, so that where it is next to nothing rounding could decide a step: hence the large eps.) In bf16 a
weight that rounding has moved may become another number of 8 bits: BF16.
"""

import hashlib
import shutil
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

import main
from ldm.autoencoder.module import AutoencoderKL
from ldm.checkpoints import store
from ldm.config.load import to_yaml
from ldm.diffusion.module import LatentDiffusion
from ldm.randomness import Draws
from ldm.sampling.generate import generate
from ldm.sampling.pipeline import Pipeline
from ldm.training.metrics_table import read_metrics
from tests.forked import Forked

STEPS = 6
BATCH = 6
TOLERANCE = 1e-6  # seen: 7e-8
BF16 = 1e-4  # seen: 5e-6
ALONE = "lightning.strategy=null"
DDP, FSDP2, SHARDED = (
    f"lightning.strategy={{target: ldm.training.strategies.{name}, params: {{timeout: 60{more}}}}}"
    for name, more in (("DDP", ""), ("FSDP2", ""), ("FSDP2", ", sharded_checkpoints: true"))
)
SHEET = {"every_n_steps": 4, "classes": [0, 1], "seeds": [7, 8, 9], "steps": 2}  # no multiple of three ranks
SEED = 23  # of the configurations in conftest.py


class Diary(NamedTuple):
    """What was trained on: {(sample number, what): digest}, {sample number: mean loss of its micro-batch}.

    And what metrics.csv says of it: {step, from 1: loss}.
    """

    seen: dict[tuple[int, str], str]
    losses: dict[int, float]
    logged: dict[int, float]

    def between(self, first: int, last: int) -> "Diary":
        """Of the steps from `first` up to `last`."""
        numbers = range(first * BATCH, last * BATCH)
        seen = {key: value for key, value in self.seen.items() if key[0] in numbers}
        losses = {number: loss for number, loss in self.losses.items() if number in numbers}
        return Diary(seen, losses, {step: loss for step, loss in self.logged.items() if first < step <= last})


def digest(row: Any) -> str:
    return hashlib.sha256(np.ascontiguousarray(row).tobytes()).hexdigest()


def observe() -> Diary:
    """Have this process write down what it trains on, by wrapping what it calls."""
    diary = Diary({}, {}, {})

    def note(draws: Draws, what: str, rows: Tensor) -> None:
        if draws.seed != SEED:
            return  # validation
        for number, row in zip(draws.numbers.tolist(), rows.detach().cpu(), strict=True):
            assert diary.seen.setdefault((number, what), digest(row)) == digest(row), f"{what} of {number} changed"

    def wrap_draw(name: str) -> None:
        drawn = getattr(Draws, name)

        def wrapped(self: Draws, purpose: str, *args: Any) -> Tensor:
            rows: Tensor = drawn(self, purpose, *args)
            note(self, purpose, rows)
            return rows

        setattr(Draws, name, wrapped)

    def wrap_step(module: Any) -> None:
        step = module.training_step

        def wrapped(self: Any, batch: dict[str, Any], batch_idx: int) -> Any:
            for name, column in batch.items():
                if isinstance(column, Tensor):
                    note(batch["draws"], name, column)
            result = step(self, batch, batch_idx)
            loss = result["loss"] if isinstance(result, dict) else result
            diary.losses.update(dict.fromkeys(batch["draws"].numbers.tolist(), float(loss)))
            return result

        module.training_step = wrapped

    for name in ("normal", "uniform", "stratified"):
        wrap_draw(name)
    wrap_step(LatentDiffusion)
    wrap_step(AutoencoderKL)
    return diary


def training(rank: int, words: list[str]) -> Diary:
    """In a forked child."""
    diary = observe()
    assert main.main(words) == 0
    return diary


class Run:
    """One run, in pieces on any number of ranks."""

    def __init__(self, forked: Forked, tree: dict[str, Any], place: Path) -> None:
        place.mkdir(parents=True)
        self.forked = forked
        self.file = place / "run.yaml"
        self.file.write_text(to_yaml(tree))
        self.logdir = place / "logs"

    @property
    def folder(self) -> Path:
        (found,) = self.logdir.iterdir()
        return found

    def go(self, world: int, *words: str, to: int = STEPS) -> Diary:
        """Train on to step `to` with `world` ranks."""
        start = ["--resume", str(self.folder)] if self.logdir.exists() else ["--base", str(self.file)]
        words = (*start, "--logdir", str(self.logdir), f"lightning.trainer.max_steps={to}", *words)
        shares = self.forked(world, partial(training, words=list(words)))
        whole = Diary({}, {}, {})
        for share in shares:
            assert not whole.losses.keys() & share.losses.keys(), "two ranks trained on one sample"
            whole.seen.update(share.seen)
            whole.losses.update(share.losses)
        # A loader is one batch ahead of training.
        seen = {key: value for key, value in whole.seen.items() if key[0] in whole.losses}
        rows = read_metrics(self.folder / "metrics.csv")
        logged = {int(row["step"]): float(row["train/loss"]) for row in rows if "train/loss" in row}
        steps = {number // BATCH + 1 for number in whole.losses}
        return Diary(seen, whole.losses, {step: loss for step, loss in logged.items() if step in steps})

    def killed_after(self, step: int, place: Path) -> "Run":
        """A copy of the run as it was right after the save of `step`."""
        place.mkdir()
        copy = Run(self.forked, {}, place / "killed")
        shutil.copytree(self.logdir, copy.logdir)
        for file in (copy.folder / "checkpoints").glob("*.ckpt"):
            if file.name != f"step={step:08d}.ckpt":
                store.remove(file)
        (copy.folder / "run_state.json").unlink()
        return copy

    def state(self, step: int = STEPS) -> dict[str, Any]:
        return store.load(self.folder / "checkpoints" / f"step={step:08d}.ckpt")

    def final(self) -> dict[str, Any]:
        state = self.state()
        # How often Lightning began an epoch or a batch anew differs, and so do speeds.
        return {key: state[key] for key in ("state_dict", "optimizer_states", "lr_schedulers", "global_step")}


def assert_same_run(ours: Diary, theirs: Diary, tolerance: float = TOLERANCE) -> None:
    assert ours.seen.keys() == theirs.seen.keys()
    assert [key for key in ours.seen if ours.seen[key] != theirs.seen[key]] == []
    assert ours.losses.keys() == theirs.losses.keys()
    # Micro-batches are of one size, so the mean over a step's samples is the step's loss.
    steps = [
        np.array([diary.losses[number] for number in sorted(diary.losses)]).reshape(-1, BATCH).mean(1)
        for diary in (ours, theirs)
    ]
    np.testing.assert_allclose(*steps, rtol=tolerance, atol=0)
    # The file says so too, whatever the first rank has seen of a step, to its nine digits.
    assert ours.logged.keys() == theirs.logged.keys()
    np.testing.assert_allclose([*ours.logged.values()], [*theirs.logged.values()], rtol=tolerance, atol=0)
    np.testing.assert_allclose([*ours.logged.values()], steps[0], rtol=max(tolerance, 1e-6), atol=0)


def assert_equal(ours: Any, theirs: Any, key: str = "") -> None:
    """Bit for bit."""
    if isinstance(ours, Tensor):
        assert ours.dtype == theirs.dtype, key
        assert torch.equal(ours, theirs), key
    elif isinstance(ours, dict):
        assert list(ours) == list(theirs), key
        for name in ours:
            assert_equal(ours[name], theirs[name], f"{key}.{name}")
    elif isinstance(ours, list | tuple):
        assert len(ours) == len(theirs), key
        for index, pair in enumerate(zip(ours, theirs, strict=True)):
            assert_equal(*pair, f"{key}[{index}]")
    else:
        assert ours == theirs, key


@pytest.fixture(scope="module")
def stage_1(tmp_path_factory) -> Path:
    """Filled in by the first test that needs a trained autoencoder."""
    return tmp_path_factory.mktemp("stage1")


@pytest.fixture(scope="module")
def made() -> dict[str, Diary]:
    """What several tests compare with."""
    return {}


@pytest.fixture
def diffusion(diffusion_tree, autoencoder_tree, stage_1, forked) -> dict[str, Any]:
    """Stage 2 without dropout, whose draws belong to a rank and not to a sample."""
    if not (stage_1 / "autoencoder").exists():
        Run(forked, autoencoder_tree, stage_1 / "autoencoder").go(1)
    (autoencoder,) = (stage_1 / "autoencoder" / "logs").iterdir()
    params = diffusion_tree["data"]["params"]
    params |= {"autoencoder": str(autoencoder), "cache": str(stage_1 / "cache")}
    diffusion_tree["model"]["params"]["network"]["params"]["dropout"] = 0.0
    diffusion_tree["model"]["params"]["optimizer"]["params"] |= {"fused": True, "eps": 1e-3}
    diffusion_tree["model"]["params"]["gradient_clip"] = 0.5
    return quick(diffusion_tree, {"target": "ldm.training.callbacks.previews.SampleLogger", "params": SHEET})


@pytest.fixture
def autoencoder(autoencoder_tree) -> dict[str, Any]:
    """Stage 1 before its adversarial branch, whose weight depends on how a batch is cut up."""
    autoencoder_tree["model"]["params"]["loss"]["params"]["disc_start"] = 100
    autoencoder_tree["model"]["params"]["optimizer"]["params"]["eps"] = 1e-3
    autoencoder_tree["model"]["params"].pop("schedule")
    return quick(autoencoder_tree, None)


def quick(tree: dict[str, Any], images: dict[str, Any] | None) -> dict[str, Any]:
    """One validation; a checkpoint at every third step."""
    tree["lightning"]["trainer"] |= {"val_check_interval": 4, "log_every_n_steps": 1, "enable_progress_bar": False}
    node = {"target": "ldm.training.callbacks.checkpoints.Checkpoints", "params": {"every": 3, "keep": 9}}
    tree["lightning"]["callbacks"] = {"images": images, "checkpoints": node}
    return tree


def kinds(diary: Diary) -> set[str]:
    """What was written down, of every sample."""
    found = {kind for _, kind in diary.seen}
    assert diary.seen.keys() == {(number, kind) for number in range(STEPS * BATCH) for kind in found}
    return found


def test_stage_1_on_one_rank_on_two_and_in_pieces(forked, autoencoder, tmp_path):
    alone = Run(forked, autoencoder, tmp_path / "alone").go(1)
    assert kinds(alone) == {"image", "class_label", "posterior"}
    assert_same_run(Run(forked, autoencoder, tmp_path / "pieces").go(1, "data.params.micro_batch_size=2"), alone)
    assert_same_run(Run(forked, autoencoder, tmp_path / "two").go(2, DDP), alone)


@pytest.mark.parametrize("stage", ["autoencoder", "diffusion"])
def test_validation_says_the_same_on_any_number_of_ranks_and_in_pieces(forked, request, stage, tmp_path):
    """Five items, in batches and shares of unequal size; the weights differ by the rounding of one step."""
    tree = request.getfixturevalue(stage)
    tree["data"]["params"] |= {"num_validation": 5, "cache": str(tmp_path / "cache")}
    if stage == "autoencoder":
        del tree["data"]["params"]["cache"]
    ways = {"alone": (1,), "pieces": (1, "data.params.micro_batch_size=2"), "DDP": (2, DDP)}
    if stage == "diffusion":
        ways["FSDP2"] = (2, FSDP2)
    found = {name: validated(Run(forked, tree, tmp_path / name), *way) for name, way in ways.items()}
    alone = found.pop("alone")
    assert {"val/psnr", "val/kl"} <= alone.keys() or {*alone} == {"val/loss", "val/loss_ema", "val/latent_std"}
    for name, metrics in found.items():
        assert metrics == pytest.approx(alone, rel=TOLERANCE, abs=1e-7), name


def validated(run: Run, world: int, *words: str) -> dict[str, float]:
    """What validation says after one step."""
    run.go(world, *words, to=1)
    row = next(row for row in read_metrics(run.folder / "metrics.csv") if any("val/" in key for key in row))
    return {name: float(value) for name, value in row.items() if name.startswith("val/")}


@pytest.fixture
def alone(forked, diffusion, stage_1, made) -> Diary:
    """Stage 2 in one process."""
    if "alone" not in made:
        made["alone"] = Run(forked, diffusion, stage_1 / "alone").go(1)
        drawn = {"flip", "posterior", "timestep", "noise", "label_dropout"}
        assert kinds(made["alone"]) == {"latent", "class_label"} | drawn
    return made["alone"]


@pytest.mark.parametrize(
    ("world", "words"),
    [
        pytest.param(1, ["data.params.micro_batch_size=2"], id="pieces"),
        pytest.param(2, [DDP], id="DDP"),
        pytest.param(2, [FSDP2], id="FSDP2"),
        pytest.param(3, [FSDP2, "data.params.micro_batch_size=1"], id="FSDP2 in pieces", marks=pytest.mark.slow),
    ],
)
def test_stage_2_on_ranks_and_in_pieces(forked, diffusion, alone, tmp_path, world, words):
    assert_same_run(Run(forked, diffusion, tmp_path / "run").go(world, *words), alone)


@pytest.mark.slow
def test_a_transformer_and_a_learned_weighting_on_shards(forked, diffusion, tmp_path):
    """What else may hold parameters: further averages, and the objective; activations computed again are gathered."""
    params = diffusion["model"]["params"]
    sizes = {"in_channels": "${data:channels}", "patch_size": 2, "channels": 16, "depth": 2, "heads": 2}
    params["network"] = {
        "target": "ldm.diffusion.networks.dit.DiT",
        "params": sizes | {"rms_norm": True, "checkpointing": True},
    }
    params["conditioner"]["params"]["channels"] = 16
    plain = {"target": "ldm.diffusion.weightings.Plain"}
    learned = {"target": "ldm.diffusion.weightings.Uncertainty", "params": {"weighting": plain, "channels": 8}}
    params["objective"]["params"]["weighting"] = learned
    params["ema"]["params"]["others"] = [{"target": "ldm.optim.ema.PowerFunction", "params": {"std": 0.1}}]
    alone = Run(forked, diffusion, tmp_path / "alone")
    diary = alone.go(1)
    shards = Run(forked, diffusion, tmp_path / "shards")
    assert_same_run(shards.go(2, SHARDED), diary)
    ours, theirs = shards.state()["state_dict"], alone.state()["state_dict"]
    assert ours.keys() == theirs.keys()
    assert theirs["objective.weighting.u.weight"].any()
    for name in theirs:
        if isinstance(theirs[name], Tensor):
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [DDP, SHARDED], ids=["DDP", "sharded"])
def test_constrained_weights_on_ranks(forked, diffusion, tmp_path, strategy):
    """The magnitude-preserving UNet's rows are brought back to unit length where they lie."""
    params = diffusion["model"]["params"]
    sizes = {"in_channels": "${data:channels}", "channels": 8, "channel_mult": [1, 2], "num_res_blocks": 1}
    network = {**sizes, "attention_levels": [1], "vector_channels": "${data:num_classes}"}
    params["network"] = {"target": "ldm.diffusion.networks.edm2.MagnitudePreservingUNet", "params": network}
    classes = {"num_classes": "${data:num_classes}"}
    params["conditioner"] = {"target": "ldm.diffusion.conditioners.classes.ClassOneHot", "params": classes}
    alone = Run(forked, diffusion, tmp_path / "alone")
    diary = alone.go(1)
    ranks = Run(forked, diffusion, tmp_path / "ranks")
    assert_same_run(ranks.go(2, strategy), diary)
    ours, theirs = ranks.state()["state_dict"], alone.state()["state_dict"]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    rows = ours["denoiser.network.conv_in.weight"].flatten(1).square().mean(1)
    torch.testing.assert_close(rows, torch.ones_like(rows), rtol=1e-3, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [DDP, SHARDED], ids=["DDP", "sharded"])
def test_muon_on_ranks(forked, diffusion, tmp_path, strategy):
    params = diffusion["model"]["params"]
    sizes = {"in_channels": "${data:channels}", "patch_size": 2, "channels": 16, "depth": 2, "heads": 2}
    params["network"] = {"target": "ldm.diffusion.networks.dit.DiT", "params": sizes}
    params["conditioner"]["params"]["channels"] = 16
    params["optimizer"] = {"target": "ldm.optim.optimizers.Muon", "partial": True, "params": {"lr": 1e-3}}
    straight = Run(forked, diffusion, tmp_path / "straight")
    diary = straight.go(2, strategy)
    alone = Run(forked, diffusion, tmp_path / "alone").go(1)
    # Orthogonal updates are made in bf16, so rounding shows sooner.
    assert_same_run(diary, alone, 1e-2)
    killed = straight.killed_after(3, tmp_path / "copy")
    assert_same_run(killed.go(2), diary.between(3, STEPS), tolerance=0)
    assert_equal(killed.final(), straight.final())


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [DDP, SHARDED], ids=["DDP", "sharded"])
def test_muon_of_convolutions_on_ranks(forked, diffusion, tmp_path, strategy):
    settings = {"lr": 1e-3, "convolutions": True}
    diffusion["model"]["params"]["optimizer"] = {
        "target": "ldm.optim.optimizers.Muon",
        "partial": True,
        "params": settings,
    }
    straight = Run(forked, diffusion, tmp_path / "straight")
    diary = straight.go(2, strategy)
    assert_same_run(diary, Run(forked, diffusion, tmp_path / "alone").go(1), 1e-4)
    killed = straight.killed_after(3, tmp_path / "copy")
    assert_same_run(killed.go(2), diary.between(3, STEPS), tolerance=0)
    assert_equal(killed.final(), straight.final())


@pytest.mark.slow
def test_a_codebook_on_ranks(forked, autoencoder, tmp_path):
    params = autoencoder["model"]["params"]
    params["encoder"]["params"]["moments"] = False
    book = {"size": 16, "channels": 2}
    params["quantizer"] = {"target": "ldm.autoencoder.quantizer.VectorQuantizer", "params": book}
    alone = Run(forked, autoencoder, tmp_path / "alone").go(1)
    assert_same_run(Run(forked, autoencoder, tmp_path / "two").go(2, DDP), alone)


@pytest.mark.slow
def test_bf16_on_shards_rounds_as_it_does_under_autocast(forked, diffusion, tmp_path):
    bf16 = "lightning.trainer.precision=bf16-mixed"
    ddp = Run(forked, diffusion, tmp_path / "ddp").go(2, bf16, DDP)
    assert_same_run(Run(forked, diffusion, tmp_path / "fsdp2").go(2, bf16, FSDP2), ddp, BF16)


@pytest.mark.slow
def test_a_run_moves_between_ranks_and_strategies(forked, diffusion, alone, tmp_path):
    """2 -> 1 -> 2 ranks, DDP -> FSDP2 -> DDP, whole and sharded checkpoints, in the middle of epochs of 16 samples.

    And 1, 3, 3, 2, 1, 2 micro-batches a step.
    """
    run = Run(forked, diffusion, tmp_path / "run")
    way = [(2, DDP, 3), (1, ALONE, 2), (2, SHARDED, 1), (3, FSDP2, 1), (2, DDP, 3), (1, FSDP2, 3)]
    for step, (world, strategy, piece) in enumerate(way):
        words = strategy, f"data.params.micro_batch_size={piece}"
        assert_same_run(run.go(world, *words, to=step + 1), alone.between(step, step + 1))
    assert run.final()["global_step"] == STEPS == len(way)
    assert validations(run) == [1, 2, 3, 4]


@pytest.mark.slow
def test_stage_1_goes_on_in_other_pieces(forked, autoencoder, tmp_path):
    alone = Run(forked, autoencoder, tmp_path / "alone").go(1)
    run = Run(forked, autoencoder, tmp_path / "run")
    for first, last, piece in ((0, 1, 6), (1, 3, 2), (3, STEPS, 3)):
        diary = run.go(1, f"data.params.micro_batch_size={piece}", to=last)
        assert_same_run(diary, alone.between(first, last))
    assert validations(run) == [1, 3, 4]


def validations(run: Run) -> list[int]:
    """After which steps; at the end of the runs that are shorter than the interval of 4, too."""
    return [int(row["step"]) for row in read_metrics(run.folder / "metrics.csv") if any("val/" in key for key in row)]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [DDP, FSDP2, SHARDED], ids=["DDP", "FSDP2", "sharded"])
def test_killed_and_resumed_on_two_ranks_is_the_same_run(forked, diffusion, tmp_path, strategy):
    straight = Run(forked, diffusion, tmp_path / "straight")
    diary = straight.go(2, strategy)
    killed = straight.killed_after(3, tmp_path / "copy")
    assert_same_run(killed.go(2), diary.between(3, STEPS), tolerance=0)
    assert_equal(killed.final(), straight.final())
    assert [path.name for path in (straight.folder / "images" / "val").iterdir()] == ["samples_00000004.png"]


@pytest.mark.slow
def test_a_sharded_checkpoint_is_validated_and_sampled_from(forked, diffusion, tmp_path):
    run = Run(forked, diffusion, tmp_path / "run")
    run.go(2, SHARDED, to=3)
    assert list((run.folder / "checkpoints").glob("*.shards/*.safetensors"))
    forked(2, partial(training, words=["--resume", str(run.folder), "--train", "false"]))
    pipeline = Pipeline.load(run.folder)
    assert (
        len(list(generate(pipeline, seeds=[1, 2], conditions=[{"class_label": 0}, {"class_label": 1}], steps=2))) == 2
    )
    weights = run.state(3)["state_dict"]
    for name, weight in pipeline.denoiser.state_dict().items():
        assert torch.equal(weight, weights[f"ema.average.{name}"])


@pytest.mark.slow
def test_stage_1_killed_and_resumed_on_two_ranks_is_the_same_run(forked, autoencoder, tmp_path):
    autoencoder["model"]["params"]["loss"]["params"]["disc_start"] = 2
    straight = Run(forked, autoencoder, tmp_path / "straight")
    diary = straight.go(2, DDP)
    killed = straight.killed_after(3, tmp_path / "copy")
    assert_same_run(killed.go(2), diary.between(3, STEPS), tolerance=0)
    assert_equal(killed.final(), straight.final())


@pytest.mark.slow
def test_a_changed_rate_reaches_shards(forked, diffusion, tmp_path):
    shards = Run(forked, diffusion, tmp_path / "shards")
    shards.go(2, SHARDED, to=3)
    whole = shards.killed_after(3, tmp_path / "whole")
    words = ["lr=0.05", "weight_decay=0.5", "betas=[0.5,0.9]"]
    words = [*(f"model.params.optimizer.params.{word}" for word in words), "--allow-change", "model"]
    shards.go(2, *words, to=4)
    whole.go(1, ALONE, *words, to=4)
    ours, theirs, before = shards.state(4), whole.state(4), whole.state(3)
    for state in (ours, theirs):
        (group,) = state["optimizer_states"][0]["param_groups"]
        assert (group["lr"], group["initial_lr"], group["weight_decay"], *group["betas"]) == (0.05, 0.05, 0.5, 0.5, 0.9)
        assert state["lr_schedulers"][0]["base_lrs"] == state["lr_schedulers"][0]["_last_lr"] == [0.05]
    for name in theirs["state_dict"]:
        if isinstance(theirs["state_dict"][name], Tensor):
            torch.testing.assert_close(ours["state_dict"][name], theirs["state_dict"][name], rtol=1e-4, atol=1e-5)
    moved = (
        theirs["state_dict"]["denoiser.network.conv_in.weight"]
        - before["state_dict"]["denoiser.network.conv_in.weight"]
    )
    assert float(moved.abs().max()) > 1e-2
