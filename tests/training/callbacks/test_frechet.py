"""The Fréchet distance in training is that of the run's own samples, whoever makes them, also after a stop."""

import os
import signal
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

import main
from ldm.checkpoints import store
from ldm.config.load import to_yaml
from ldm.data.sources.folder import ImageFolder
from ldm.data.transforms import EvalTransform
from ldm.errors import ConfigError
from ldm.evaluation.distances.frechet import frechet_distance
from ldm.evaluation.feature_store import FeatureStore
from ldm.evaluation.moments import Moments
from ldm.evaluation.pictures import configured
from ldm.evaluation.pictures.made import Generated
from ldm.evaluation.pictures.stored import DatasetPictures
from ldm.evaluation.reference import PicturesReference
from ldm.runtime import distributed, fsdp
from ldm.runtime.signals import STOPPING
from ldm.sampling.generate import generate
from ldm.sampling.pipeline import Pipeline
from ldm.training.callbacks import frechet
from ldm.training.callbacks.frechet import FrechetDistance
from ldm.training.metrics_table import read_metrics
from tests.evaluation.spaces import Projection

CALLBACK = "ldm.training.callbacks.frechet.FrechetDistance"
CHECKPOINTS = "ldm.training.callbacks.checkpoints.Checkpoints"


@pytest.fixture(autouse=True)
def own_place(tmp_path, monkeypatch):
    """A folder of our own, features that need no file, and no signal handler left behind."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(frechet, "choose", lambda name, *, weights, device: Projection(width=6))
    before = {number: signal.getsignal(number) for number in STOPPING}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def stage1(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("stage1")


@pytest.fixture
def tree(autoencoder_tree, diffusion_tree, stage1) -> dict[str, Any]:
    """12 steps, validated every 4; the distance of 10 samples in the first validation at or after step 6, and at 12."""
    if not any(stage1.iterdir()):
        assert run(autoencoder_tree, stage1) == 0
    (made,) = stage1.iterdir()
    diffusion_tree["data"]["params"] |= {"autoencoder": str(made), "cache": str(stage1.parent / "latents")}
    params = {"every": 6, "images": 10, "steps": 2, "batch_size": 3}
    diffusion_tree["lightning"]["callbacks"]["fd"] = {"target": CALLBACK, "params": params}
    return diffusion_tree


def run(tree: dict[str, Any], logdir: Path, *words: str) -> int:
    Path("run.yaml").write_text(to_yaml(tree))
    return main.main(["--base", "run.yaml", "--logdir", str(logdir), *words])


def only(folder: Path) -> Path:
    (found,) = folder.iterdir()
    return found


def measured(folder: Path) -> dict[int, float]:
    rows = read_metrics(folder / "metrics.csv")
    return {int(row["step"]): float(row["val/fd"]) for row in rows if "val/fd" in row}


def facts(folder: Path) -> dict[str, Any]:
    return store.load(store.verify(folder).path)["ldm"]


def test_it_is_the_distance_of_the_runs_samples_to_the_pictures_it_was_trained_on(tree, image_folder, tmp_path):
    assert run(tree, tmp_path / "logs") == 0
    made = only(tmp_path / "logs")
    found = measured(made)
    assert list(found) == [8, 12]

    space = Projection(width=6)
    labels = [seed % 2 for seed in range(10)]
    conditions = [{"class_label": label} for label in labels]
    samples = generate(Pipeline.load(made), range(10), conditions, steps=2, batch_size=10)
    images = torch.from_numpy(np.stack([sample.image for sample in samples])).permute(0, 3, 1, 2)
    # num_validation holds four of the twenty pictures out.
    dataset = main_data(tree, image_folder)
    real = space(DatasetPictures(dataset, EvalTransform(16), 3).images(range(16)))[:, :6]
    expected = frechet_distance(Moments.of(space(images)[:, :6]), Moments.of(real))
    assert found[12] == pytest.approx(expected, rel=1e-6)
    assert facts(made)["metrics"]["val/fd"] == pytest.approx(expected, rel=1e-6)
    record = facts(made)["fd"]
    assert record["step"] == 12
    assert (record["images"], record["reference_images"], record["steps"]) == (10, 16, 2)
    assert (record["sampler"], record["schedule"], record["precision"]) == ("ddim", "default", "32-true")
    assert record["features"] == "projection/none"


def main_data(tree: dict[str, Any], image_folder: Path) -> Any:
    from ldm.data.held_out import hold_out

    return hold_out(ImageFolder(image_folder), tree["data"]["params"]["num_validation"])[0]


def test_the_best_checkpoint_by_it_is_one_at_which_it_was_measured(tree, tmp_path, monkeypatch):
    """At step 4, where it was not, there is nothing to compare, and the old value does not count twice."""
    values = iter([9.0, 3.0, 5.0])  # of the trial, of steps 4 and 8
    monkeypatch.setattr(frechet, "frechet_distance", lambda *_: next(values))
    tree["lightning"]["callbacks"]["fd"]["params"]["every"] = 4
    tree["lightning"]["trainer"] |= {"val_check_interval": 2, "max_steps": 9}
    params = {"every": 100, "keep": 1, "monitor": "val/fd", "keep_best": 2}
    tree["lightning"]["callbacks"]["checkpoints"] = {"target": CHECKPOINTS, "params": params}
    assert run(tree, tmp_path / "logs") == 0
    folder = only(tmp_path / "logs")
    assert measured(folder) == {4: 3.0, 8: 5.0}
    saved = sorted(file.name for file in (folder / "checkpoints").glob("step=*.ckpt"))
    assert saved == ["step=00000004.ckpt", "step=00000008.ckpt", "step=00000009.ckpt"]


def test_a_resumed_run_that_monitors_it_waits_for_its_turn(tree, tmp_path):
    params = {"every": 5, "keep": 9, "monitor": "val/fd"}
    tree["lightning"]["callbacks"]["checkpoints"] = {"target": CHECKPOINTS, "params": params}
    tree["lightning"]["trainer"]["val_check_interval"] = 2
    assert run(tree, tmp_path / "straight") == 0
    straight = only(tmp_path / "straight")
    assert run(tree, tmp_path / "short", "lightning.trainer.max_steps=7") == 0
    assert main.main(["--resume", str(only(tmp_path / "short")), "lightning.trainer.max_steps=12"]) == 0
    # The end of the shorter run was measured too, since it might have been the last.
    after = {step: value for step, value in measured(only(tmp_path / "short")).items() if step != 7}
    assert after == {step: value for step, value in measured(straight).items() if step in after}
    assert 12 in after


def test_a_signal_does_not_wait_for_the_samples_and_loses_nothing(tree, tmp_path, monkeypatch):
    assert run(tree, tmp_path / "straight") == 0
    images, calls = Generated.images, []

    def interrupted(self: Any, indices: Any) -> Any:
        calls.append(len(indices))
        if len(calls) == 3:  # the trial, then the second batch of step 8
            os.kill(os.getpid(), signal.SIGUSR1)
        return images(self, indices)

    monkeypatch.setattr(Generated, "images", interrupted)
    assert run(tree, tmp_path / "stopped") == 128 + signal.SIGUSR1
    monkeypatch.setattr(Generated, "images", images)
    stopped = only(tmp_path / "stopped")
    assert len(calls) == 3
    assert store.load(store.verify(stopped).path)["global_step"] == 8
    assert measured(stopped) == {}
    assert run(tree, tmp_path / "stopped", "--resume", "auto") == 0
    assert measured(stopped) == measured(only(tmp_path / "straight"))
    assert facts(stopped)["metrics"] == facts(only(tmp_path / "straight"))["metrics"]


def test_the_features_of_the_training_pictures_are_computed_once(tree, tmp_path, monkeypatch):
    assert run(tree, tmp_path / "logs") == 0
    # `ldm evaluate` of the run compares with the same pictures in the same order.
    pictures = configured.of_data(facts(only(tmp_path / "logs"))["config"]["data"], (), "train", "the run").pictures
    assert FeatureStore(pictures.description(), len(pictures)).folder.is_dir()
    monkeypatch.setattr(DatasetPictures, "images", lambda *_: pytest.fail("they are in cache/.features"))
    assert run(tree, tmp_path / "logs") == 0


def test_an_autoencoder_is_referred_to_its_own_metric(autoencoder_tree, tmp_path, capsys):
    autoencoder_tree["lightning"]["callbacks"] = {"fd": {"target": CALLBACK, "params": {"every": 4}}}
    assert run(autoencoder_tree, tmp_path / "logs") == ConfigError.exit_code
    assert "ReconstructionDistance" in capsys.readouterr().err


def test_what_cannot_be_sampled_is_refused_before_the_first_step(tree, tmp_path, capsys):
    tree["lightning"]["callbacks"]["fd"]["params"]["guidance_scale"] = 3.0
    tree["model"]["params"]["label_dropout"] = 0.0
    assert run(tree, tmp_path / "logs") == ConfigError.exit_code
    assert "lightning.callbacks.fd" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", [["data.params.num_validation=0", "data.params.cache=whole"], ["lightning.trainer.limit_val_batches=0"]]
)
def test_a_run_without_validation_is_refused_before_any_feature_is_computed(tree, tmp_path, capsys, monkeypatch, words):
    monkeypatch.setattr(PicturesReference, "prepare", lambda *_: pytest.fail("features are computed"))
    assert run(tree, tmp_path / "logs", *words) == ConfigError.exit_code
    assert "is measured when a run is validated, which this one never is" in capsys.readouterr().err


def test_one_sample_is_refused_before_anything_is_trained():
    with pytest.raises(ConfigError, match="images: expected 2 or more, found 1"):
        FrechetDistance(every=1, images=1)


def test_sharded_weights_are_sampled_and_a_batch_may_have_nothing_to_count(runs, grouped):
    """5 samples on two ranks in batches of 2: the second rank's last batch is there for the first one's sake alone."""
    pipeline, reference = Pipeline.load(runs.diffusion), Moments.of(np.random.default_rng(0).random((9, 6)))

    def distance(rank: int) -> float:
        mesh = init_device_mesh("cpu", (distributed.world_size(),))
        network = pipeline.denoiser["network"]
        fsdp.shard(network, mesh, network.blocks())
        assert isinstance(next(network.parameters()), DTensor)
        return measured_alone(pipeline, reference)

    alone = measured_alone(pipeline, reference)
    assert grouped(2, distance) == pytest.approx([alone, alone], rel=1e-6)


def measured_alone(pipeline: Pipeline, reference: Moments) -> float:
    """What FrechetDistance computes between two steps."""
    callback = FrechetDistance(every=1, images=5, batch_size=2, steps=2)
    callback._features, callback._reference = Projection(width=6), reference
    callback._pipeline = lambda *_: pipeline
    trainer = SimpleNamespace(callbacks=[], precision_plugin=SimpleNamespace(forward_context=nullcontext))
    return callback._measure(trainer, SimpleNamespace(device="cpu"), 5)


@pytest.mark.parametrize(("number", "world"), [(10, 1), (10, 2), (7, 4), (2, 4)])
def test_the_ranks_make_all_samples_once_and_call_the_network_equally_often(number, world, monkeypatch):
    callback = FrechetDistance(every=1, images=number, batch_size=3)
    monkeypatch.setattr(frechet.distributed, "world_size", lambda: world)
    shares = []
    for rank in range(world):
        monkeypatch.setattr(frechet.distributed, "rank", lambda rank=rank: rank)
        shares.append([list(batch) for batch in callback._share(number)])
    assert len({tuple(map(len, share)) for share in shares}) == 1
    counted = [place for share in shares for batch in share for place in batch if place < number]
    assert sorted(counted) == list(range(number))
