"""A resumed run is the same run, bit for bit: weights, average, optimizer, schedule, order of the data, metrics."""

import copy
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import main
from ldm.autoencoder.module import AutoencoderKL
from ldm.checkpoints import store
from ldm.config.load import to_yaml
from ldm.config.yaml_text import read
from ldm.data.datamodule import ElasticDataModule
from ldm.diffusion.module import LatentDiffusion
from ldm.normals import CounterBased
from ldm.optim.lr_schedules import Constant, Cosine, Linear
from ldm.run_folder import RunFolder
from ldm.runtime.signals import STOPPING
from ldm.sampling.pipeline import Pipeline
from ldm.training.metrics_table import read_metrics

STEPS = 12


@pytest.fixture(autouse=True)
def quiet_place(tmp_path, monkeypatch):
    """Run in a folder of our own, and leave no signal handler behind."""
    monkeypatch.chdir(tmp_path)
    before = {number: signal.getsignal(number) for number in STOPPING}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


SAMPLES = "ldm.training.callbacks.previews.SampleLogger"


@pytest.fixture(scope="module")
def trained_autoencoder(tmp_path_factory) -> Path:
    """Filled in by the first test of stage 2 that runs; a logs folder."""
    return tmp_path_factory.mktemp("stage1")


@pytest.fixture
def order(monkeypatch) -> list[tuple[bytes, bytes]]:
    """What training sees from here on: (sample numbers, labels) of each micro-batch."""
    seen: list[tuple[bytes, bytes]] = []
    attach = ElasticDataModule.attach_draws

    def noted(self: Any, batch: dict[str, Any], device: torch.device) -> Any:
        draws = attach(self, batch, device)
        if self.trainer.training:
            seen.append((draws.numbers.tobytes(), batch["class_label"].numpy().tobytes()))
        return draws

    monkeypatch.setattr(ElasticDataModule, "attach_draws", noted)
    return seen


@pytest.fixture
def stage(request, autoencoder_tree, diffusion_tree, trained_autoencoder, tried_once) -> dict[str, Any]:
    """The configuration of the stage that the test names."""
    if request.param == "autoencoder":
        return autoencoder_tree
    if not any(trained_autoencoder.iterdir()):
        run(autoencoder_tree, "first.yaml", logdir=trained_autoencoder)
    diffusion_tree["data"]["params"]["autoencoder"] = str(only(trained_autoencoder))
    diffusion_tree["data"]["params"]["cache"] = str(trained_autoencoder.parent / "cache")
    return diffusion_tree


def run(tree: dict[str, Any], name: str, *words: str, logdir: Path) -> int:
    Path(name).write_text(to_yaml(tree))
    return main.main(["--base", name, "--logdir", str(logdir), *words])


@pytest.fixture
def straight(begun) -> Callable[[dict[str, Any]], Path]:
    """straight(tree) -> a whole run of it, made once and then copied."""

    def run_of(tree: dict[str, Any]) -> Path:
        Path("run.yaml").write_text(to_yaml(tree))
        begun("run.yaml")
        return only(Path("logs"))

    return run_of


def only(folder: Path) -> Path:
    (found,) = folder.iterdir()
    return found


def saves(tree: dict[str, Any], every: int) -> dict[str, Any]:
    node = {"target": "ldm.training.callbacks.checkpoints.Checkpoints", "params": {"every": every, "keep": 9}}
    tree["lightning"]["callbacks"] = {"checkpoints": node}
    if tree["name"] == "tiny_diffusion":  # pictures between the steps, of few steps of their own
        few = {"every_n_steps": 4, "classes": [0, 1], "seeds": [0], "steps": 2}
        tree["lightning"]["callbacks"]["images"] = {"target": SAMPLES, "params": few}
    return tree


def as_killed_after(run_folder: Path, step: int, place: Path) -> Path:
    """A copy of a run as it was right after the save of `step`."""
    copy = place / run_folder.name
    shutil.copytree(run_folder, copy)
    for file in (copy / "checkpoints").iterdir():
        if file.name != f"step={step:08d}.ckpt":
            file.unlink()
    (copy / "run_state.json").unlink()
    return copy


def final(run_folder: Path) -> dict[str, Any]:
    state = store.load(run_folder / "checkpoints" / f"step={STEPS:08d}.ckpt")
    state["ldm"]["metrics"] = {
        name: value for name, value in state["ldm"]["metrics"].items() if name.startswith("val/")
    }
    # How often Lightning began an epoch or a batch anew differs, and means nothing here.
    return {key: value for key, value in state.items() if key not in ("loops", "epoch")}


def metrics(run_folder: Path, after: int) -> list[tuple[str, str, str]]:
    """(step, name, value) of every logged number but the speeds."""
    rows = [row for row in read_metrics(run_folder / "metrics.csv") if int(row["step"]) > after]
    assert {int(row["step"]) for row in rows} == {step for step in range(after + 1, STEPS + 1) if step % 2 == 0}
    speeds = ("step", "images_per_second", "data_wait")
    return sorted((row["step"], name, value) for row in rows for name, value in row.items() if name not in speeds)


def assert_same(ours: Any, theirs: Any, key: str = "") -> None:
    """Equal bit for bit, and of one type, at every key."""
    assert type(ours) is type(theirs), key
    if isinstance(ours, torch.Tensor):
        assert ours.dtype == theirs.dtype, key
        assert torch.equal(ours, theirs), key
    elif isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), key
        for name in ours:
            assert_same(ours[name], theirs[name], f"{key}.{name}")
    elif isinstance(ours, list | tuple):
        assert len(ours) == len(theirs), key
        for index, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            assert_same(one, other, f"{key}.{index}")
    else:
        assert ours == theirs, key


# Killed in the middle of an epoch (5 steps of 6 are 30 images, of 16), or right where a validation was (4).
@pytest.mark.parametrize(("killed_after", "workers", "micro_batch"), [(5, 0, None), (5, 2, 3), (4, 0, 2)])
@pytest.mark.parametrize("stage", ["autoencoder", "diffusion"], indirect=True)
def test_killed_and_resumed_is_the_same_run(stage, killed_after, workers, micro_batch, order, tmp_path):
    stage["data"]["params"] |= {"num_workers": workers, "micro_batch_size": micro_batch}
    assert run(saves(stage, every=killed_after), "run.yaml", logdir=tmp_path / "straight") == 0
    straight = only(tmp_path / "straight")
    pieces = 6 // (micro_batch or 6)
    assert len(order) == STEPS * pieces
    expected = order[killed_after * pieces :]
    order.clear()

    killed = as_killed_after(straight, killed_after, tmp_path / "killed")
    assert main.main(["--resume", str(killed)]) == 0
    assert order == expected
    assert_same(final(killed), final(straight))
    assert final(killed)["ldm"]["images_seen"] == 6 * STEPS
    assert metrics(killed, after=killed_after) == metrics(straight, after=killed_after)


@pytest.mark.parametrize("stage", ["autoencoder", "diffusion"], indirect=True)
def test_stopped_by_a_signal_and_resumed_is_the_same_run(stage, tmp_path, monkeypatch, straight):
    whole = straight(stage)

    module = AutoencoderKL if stage["name"] == "tiny_autoencoder" else LatentDiffusion
    step = module.training_step

    def interrupted(self: Any, batch: dict[str, Any], batch_idx: int) -> Any:
        if self.global_step == 6:
            os.kill(os.getpid(), signal.SIGUSR1)
        return step(self, batch, batch_idx)

    monkeypatch.setattr(module, "training_step", interrupted)
    assert run(stage, "run.yaml", logdir=tmp_path / "stopped") == 128 + signal.SIGUSR1
    monkeypatch.setattr(module, "training_step", step)
    stopped = only(tmp_path / "stopped")
    assert store.load(store.verify(stopped).path)["global_step"] == 7
    assert run(stage, "run.yaml", "--resume", "auto", logdir=tmp_path / "stopped") == 0
    assert_same(final(only(tmp_path / "stopped")), final(whole))


@pytest.mark.parametrize("stage", ["diffusion"], indirect=True)
def test_a_finished_run_goes_on_when_it_is_made_longer(stage, tmp_path, capsys, straight):
    whole = straight(stage)
    assert run(stage, "run.yaml", "lightning.trainer.max_steps=5", logdir=tmp_path / "short") == 0
    short = only(tmp_path / "short")
    assert main.main(["--resume", str(short)]) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert main.main(["--resume", str(short), f"lightning.trainer.max_steps={STEPS}"]) == 0
    ours, theirs = final(short), final(whole)
    assert_same(ours.pop("ldm")["images_seen"], theirs.pop("ldm")["images_seen"])
    assert_same(ours, theirs)


def watched(monkeypatch, module: Any) -> list[list[tuple[torch.Tensor, dict[str, torch.Tensor], float]]]:
    """From here on, before and after each training batch: (parameter, its moments, its rate), of all optimizers."""
    seen: list[Any] = []

    def note(self: Any, *_: Any) -> None:
        seen.append(
            [
                (weight.detach().clone(), copy.deepcopy(optimizer.state[weight]), group["lr"])
                for optimizer in self.trainer.optimizers
                for group in optimizer.param_groups
                for weight in group["params"]
            ]
        )

    monkeypatch.setattr(module, "on_train_batch_start", note)
    monkeypatch.setattr(module, "on_train_batch_end", note)
    return seen


@pytest.mark.parametrize("stage", ["autoencoder", "diffusion"], indirect=True)
def test_a_changed_rate_decay_or_beta_is_what_the_next_step_is_made_with(
    stage, tmp_path, monkeypatch, capsys, straight
):
    """Kingma and Ba 2015, algorithm 1, from the checkpoint's moments; Loshchilov and Hutter 2019 for the decay."""
    killed = as_killed_after(straight(saves(stage, every=5)), 5, tmp_path / "killed")
    saved = store.load(store.verify(killed).path)
    autoencoder = stage["name"] == "tiny_autoencoder"
    seen = watched(monkeypatch, AutoencoderKL if autoencoder else LatentDiffusion)
    key = "model.params.optimizer.params"
    rate, decay, betas, eps = 0.05, 0.3, (0.6, 0.8), 1e-4
    words = [f"{key}.lr={rate}", f"{key}.weight_decay={decay}", f"{key}.betas={[*betas]}", f"{key}.eps={eps}"]
    words += ["--allow-change", "model.params.optimizer", "lightning.trainer.max_steps=6"]
    assert main.main(["--resume", str(killed), *words]) == 0
    assert f"changed: {key}.lr from 0.001 to 0.05" in capsys.readouterr().out

    before, after = seen
    moments = [value for state in saved["optimizer_states"] for _, value in sorted(state["state"].items())]
    schedule = Cosine(STEPS, warm_up=2)
    generator = len(saved["optimizer_states"][0]["state"])
    assert len(before) == len(after) == len(moments) > generator * autoencoder
    for place, ((weight, start, lr), (changed, end, _), old) in enumerate(zip(before, after, moments, strict=True)):
        assert_same(start, old)
        # The discriminator has neither a schedule nor its own optimizer's node; it began at step 4.
        expected = rate * schedule(5) if autoencoder and place < generator else rate
        assert lr == expected
        steps = float(end["step"])
        assert steps == (2.0 if autoencoder and place >= generator else 6.0)
        gradient = (end["exp_avg"] - betas[0] * start["exp_avg"]) / (1 - betas[0])
        second = betas[1] * start["exp_avg_sq"] + (1 - betas[1]) * gradient.square()
        torch.testing.assert_close(end["exp_avg_sq"], second, rtol=1e-3, atol=1e-9 + 1e-6 * float(second.max()))
        mean, root = end["exp_avg"] / (1 - betas[0] ** steps), (end["exp_avg_sq"] / (1 - betas[1] ** steps)).sqrt()
        shrunk = weight if autoencoder else weight * (1 - expected * decay)  # Adam's decay is in the gradient
        torch.testing.assert_close(changed, shrunk - expected * mean / (root + eps), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("stage", ["autoencoder", "diffusion"], indirect=True)
def test_a_schedule_may_come_and_go(stage, tmp_path, monkeypatch, straight):
    whole = straight(saves(stage, every=5))
    autoencoder = stage["name"] == "tiny_autoencoder"
    keys = ["schedule", "discriminator_schedule"] if autoencoder else ["schedule"]
    module = AutoencoderKL if autoencoder else LatentDiffusion
    step, places = module.training_step, {"schedule": 5, "discriminator_schedule": 1}
    for key in keys:
        for number, (node, factor) in enumerate(
            [("{target: ldm.optim.lr_schedules.Linear, params: {steps: 20}}", Linear(20)), ("null", Constant())]
        ):
            killed = as_killed_after(whole, 5, tmp_path / f"{key}{number}")
            seen = watched(monkeypatch, module)
            words = [f"model.params.{key}={node}", "--allow-change", "model", "lightning.trainer.max_steps=6"]
            assert main.main(["--resume", str(killed), *words]) == 0
            lr = seen[0][-1 if key == "discriminator_schedule" else 0][2]
            assert lr == 1e-3 * factor(places[key])
            assert module.training_step is step


@pytest.mark.parametrize("stage", ["diffusion"], indirect=True)
def test_the_clip_and_the_average_are_the_configurations(stage, tmp_path, monkeypatch, straight):
    killed = as_killed_after(straight(saves(stage, every=5)), 5, tmp_path / "killed")
    old = store.load(store.verify(killed).path)["state_dict"]
    words = ["model.params.gradient_clip=1e-3", "model.params.ema.params.profile.params.decay=0.25"]
    norms: list[float] = []
    update = LatentDiffusion.optimizer_step

    def noted(self: Any, *args: Any, **kwargs: Any) -> None:
        update(self, *args, **kwargs)
        moments = [self.trainer.optimizers[0].state[weight]["exp_avg"] for weight in self.denoiser.parameters()]
        norms.append(float(torch.cat([moment.flatten() for moment in moments]).norm()))

    monkeypatch.setattr(LatentDiffusion, "optimizer_step", noted)
    betas = ["model.params.optimizer.params.betas=[0.0, 0.999]"]  # so that the first moment is the gradient itself
    words += [*betas, "--allow-change", "model", "lightning.trainer.max_steps=6"]
    assert main.main(["--resume", str(killed), *words]) == 0
    assert norms == [pytest.approx(1e-3, rel=1e-3)]
    new = store.load(killed / "checkpoints" / "step=00000006.ckpt")["state_dict"]
    name = (
        "network.input.weight"
        if "denoiser.network.input.weight" in new
        else next(
            key.removeprefix("denoiser.") for key in new if key.startswith("denoiser.") and key.endswith("weight")
        )
    )
    expected = 0.25 * old[f"ema.average.{name}"] + 0.75 * new[f"denoiser.{name}"]
    torch.testing.assert_close(new[f"ema.average.{name}"], expected)


@pytest.mark.parametrize("stage", ["diffusion"], indirect=True)
def test_another_autoencoder_in_the_same_place_is_refused(stage, tmp_path, capsys):
    place = tmp_path / "place"
    shutil.copytree(stage["data"]["params"]["autoencoder"], place)
    stage["data"]["params"] |= {"autoencoder": str(place), "cache": str(tmp_path / "cache")}
    assert run(stage, "run.yaml", "lightning.trainer.max_steps=2", logdir=tmp_path / "logs") == 0
    folder = only(tmp_path / "logs")
    file = store.verify(place).path
    state = store.load(file)
    state["state_dict"][next(key for key in state["state_dict"] if key.startswith("decoder."))] += 1.0
    store.save(file, state)
    outside = shutil.copy(store.verify(folder).path, tmp_path / "elsewhere.ckpt")
    capsys.readouterr()
    for named in (str(folder), str(outside)):
        assert main.main(["--resume", named, "--logdir", "new", "lightning.trainer.max_steps=3"]) == 2
        assert "data (autoencoder): the run has" in capsys.readouterr().err
    # A run that was begun before there was this fact goes on.
    facts = json.loads((folder / "configs" / "facts.json").read_text())
    assert len(facts.pop("autoencoder")) == 64
    (folder / "configs" / "facts.json").write_text(json.dumps(facts))
    words = ["data.params.cache=other", "--allow-change", "data.params.cache", "lightning.trainer.max_steps=3"]
    assert main.main(["--resume", str(folder), *words]) == 0


@pytest.mark.parametrize("stage", ["autoencoder"], indirect=True)
def test_replaced_validation_pictures_are_refused(stage, tmp_path, image_folder, capsys):
    pictures = shutil.copytree(image_folder, tmp_path / "validation")
    own = {"target": "ldm.data.sources.folder.ImageFolder", "params": {"root": str(pictures)}}
    stage["data"]["params"] |= {"num_validation": 0, "validation": own, "max_broken": 0.5}
    assert run(stage, "run.yaml", "lightning.trainer.max_steps=2", logdir=tmp_path / "logs") == 0
    folder = only(tmp_path / "logs")
    path = pictures / "dogs" / "1.png"
    path.write_bytes(bytes(path.stat().st_size))
    capsys.readouterr()
    again = ["--resume", str(folder), "lightning.trainer.max_steps=3"]
    assert main.main(again) == 2
    assert "data (validation_source): the run has" in capsys.readouterr().err
    # A run that was begun before there was this fact goes on.
    facts = json.loads((folder / "configs" / "facts.json").read_text())
    del facts["validation_source"]
    (folder / "configs" / "facts.json").write_text(json.dumps(facts))
    assert main.main(again) == 0


@pytest.mark.parametrize("stage", ["autoencoder", "diffusion"], indirect=True)
def test_a_run_from_before_there_was_a_choice_goes_on_by_what_it_had(stage, order, tmp_path, capsys):
    """Neither its files nor its checkpoints say what makes its noise and its order."""
    former = {"normals": "ldm.normals.GeneratorPerRow", "order": "ldm.randomness.StoredPermutation"}
    stage["randomness"] = {name: {"target": target} for name, target in former.items()}
    assert run(saves(stage, every=5), "run.yaml", logdir=tmp_path / "straight") == 0
    straight, expected = only(tmp_path / "straight"), order[5:]
    order.clear()

    killed = as_killed_after(straight, 5, tmp_path / "killed")
    for file in (RunFolder(killed).config_file, RunFolder(killed).source_file):
        tree = read(file).plain()
        assert tree.pop("randomness") == stage["randomness"]
        file.write_text(to_yaml(tree))
    checkpoint = store.verify(killed).path
    state = store.load(checkpoint)
    del state["ldm"]["config"]["randomness"]
    store.save(checkpoint, state)

    del stage["randomness"]
    assert run(stage, "run.yaml", "--resume", str(killed), logdir=tmp_path / "killed") == 0
    assert order == expected
    ours, theirs = final(killed), final(straight)
    del theirs["ldm"]["config"]["randomness"]
    assert_same(ours, theirs)
    assert metrics(killed, after=5) == metrics(straight, after=5)

    word = "randomness.order.target=ldm.randomness.KeyedBijection"
    capsys.readouterr()
    assert main.main(["--resume", str(killed), word, "lightning.trainer.max_steps=13"]) == 2
    assert "randomness" in capsys.readouterr().err


@pytest.mark.parametrize("stage", ["diffusion"], indirect=True)
def test_a_new_run_says_what_makes_its_noise_and_its_order(stage, straight):
    whole = straight(stage)
    for tree in (read(RunFolder(whole).source_file).plain(), store.record(store.verify(whole).path)["config"]):
        assert tree["randomness"] == {
            "normals": {"target": "ldm.normals.CounterBased"},
            "order": {"target": "ldm.randomness.KeyedBijection"},
        }
    assert type(Pipeline.load(whole).normals) is CounterBased
