"""What would fail hours into a run is refused before its first step, and the trial leaves no trace in the run."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import main
from ldm.checkpoints import store
from ldm.config.load import from_tree
from ldm.errors import ConfigError
from ldm.training import dry_run, rehearsal
from ldm.training.metrics_table import read_metrics
from tests.own_package import importable
from tests.training.test_dry_run import IMAGES, LATENTS, meta_batch

HOUSE = """
    import math
    import threading

    import pytorch_lightning as pl
    import torch

    from ldm.autoencoder.module import AutoencoderKL
    from ldm.diffusion.conditioners.base import Conditioning
    from ldm.diffusion.module import LatentDiffusion
    from ldm.runtime.validation_metrics import Mean


    class Locked(pl.Callback):
        def state_dict(self):
            return {"lock": threading.Lock()}


    class Foreign(pl.Callback):
        def state_dict(self):
            return {"path": {"value": complex, "kind": Foreign}}


    class Raises(pl.Callback):
        def on_save_checkpoint(self, trainer, pl_module, checkpoint):
            raise KeyError("epoch of the moon")


    class FailsToValidate(AutoencoderKL):
        def validation_step(self, batch, batch_idx):
            raise RuntimeError("validated for the first time")


    class Darkest(Mean):
        def values(self, batch, output):
            return output.reconstruction.flatten(1).amin(1)


    class FailsToShow(AutoencoderKL):
        def images(self, batch):
            raise RuntimeError("shown for the first time")


    class Late:
        def __init__(self, value: float) -> None:
            self.value = value

        def __call__(self, *numbers):
            return 1.0 if numbers[0] < 5 else self.value / 0.0 if self.value == 1 else self.value

    class CaptionLength(torch.nn.Module):
        # As a text encoder: reads captions, and knows the empty one.

        keys = ("caption",)

        def __init__(self):
            super().__init__()
            self.table = torch.nn.Embedding(10, 8)

        def forward(self, batch):
            lengths = torch.tensor([len(text) % 10 for text in batch["caption"]], device=self.table.weight.device)
            return Conditioning(vector=self.table(lengths))

        def null(self, n):
            return self({"caption": [""] * n})
"""


@pytest.fixture(autouse=True, scope="module")
def house(tmp_path_factory):
    """A user's own package, `rehearsed`."""
    with importable(tmp_path_factory.mktemp("site"), {"rehearsed.py": HOUSE}):
        yield


def rehearse(tree: dict[str, Any], facts: dict[str, int], more: Mapping[str, Any] | None = None) -> None:
    tree["data"]["params"].setdefault("autoencoder", None)
    config = from_tree(tree, "run.yaml")
    resolved = config.resolved(facts)
    model, batch = dry_run.meta_model(resolved, ["rehearsed"]), {**meta_batch(facts), **(more or {})}
    dry_run.check_fit(model, resolved, facts, batch, config.origin)
    rehearsal.check(model, resolved, facts, batch, config.origin)


def refused(tree: dict[str, Any], facts: dict[str, int]) -> str:
    with pytest.raises(ConfigError) as caught:
        rehearse(tree, facts)
    return str(caught.value)


def late(value: float) -> dict[str, Any]:
    return {"target": "rehearsed.Late", "params": {"value": value}}


def test_what_works_passes(autoencoder_tree, diffusion_tree):
    rehearse(autoencoder_tree, IMAGES)
    diffusion_tree["data"]["params"]["autoencoder"] = "somewhere"
    rehearse(diffusion_tree, LATENTS)


def test_a_discriminator_too_deep_for_the_pictures_is_refused_before_its_start(autoencoder_tree):
    loss = autoencoder_tree["model"]["params"]["loss"]["params"]
    loss["discriminator"]["params"]["layers"] = 3
    message = refused(autoencoder_tree, IMAGES)
    assert message.startswith("model.params.loss.params.discriminator (run.yaml): from step 4 on, ")
    loss["disc_start"] = 100  # beyond the run's 12 steps
    rehearse(autoencoder_tree, IMAGES)


def test_pictures_of_eight_pixels_pass(autoencoder_tree):
    del autoencoder_tree["model"]["params"]["loss"]["params"]["discriminator"]
    rehearse(autoencoder_tree, IMAGES | {"resolution": 8})


def test_pictures_that_come_back_in_another_shape(autoencoder_tree):
    # One channel of three would be broadcast, and train.
    autoencoder_tree["model"]["params"]["decoder"]["params"]["out_channels"] = 1
    del autoencoder_tree["model"]["params"]["loss"]["params"]["discriminator"]
    assert "(3, 16, 16) come back as (1, 16, 16)" in refused(autoencoder_tree, IMAGES)


def test_pictures_too_small_for_lpips_name_the_size_that_would_do(autoencoder_tree):
    loss = autoencoder_tree["model"]["params"]["loss"]["params"]
    del loss["discriminator"]
    loss["perceptual"] = {"target": "ldm.autoencoder.lpips.LPIPS", "params": {"pretrained": False}}
    assert "needs 16 pixels or more on each side, found 8 x 8" in refused(autoencoder_tree, IMAGES | {"resolution": 8})
    rehearse(autoencoder_tree, IMAGES | {"resolution": 16})


def test_pictures_that_cannot_be_shown(autoencoder_tree):
    autoencoder_tree["model"]["target"] = "rehearsed.FailsToShow"
    assert "for its pictures, it does not work: RuntimeError: shown" in refused(autoencoder_tree, IMAGES)


@pytest.mark.parametrize(
    ("optimizer", "text"),
    [
        ({"target": "torch.optim.Muon", "params": {"lr": 1e-3}}, "only supports 2D"),
        ({"target": "torch.optim.Adam", "params": {"lr": -1.0}}, "Invalid learning rate"),
        ({"target": "torch.optim.Adam", "params": {"lr": 1e-3, "betas": [0.9, 1.5]}}, "Invalid beta"),
        ({"target": "torch.optim.AdamW", "params": {"lr": 1e-3, "weight_decay": -1}}, "Invalid weight_decay"),
        ({"target": "torch.optim.SGD", "params": {"lr": 0.0}}, "a learning rate of 0 trains nothing"),
        ({"target": "torch.optim.LBFGS", "params": {"lr": 1.0, "history_size": "x"}}, None),
    ],
)
@pytest.mark.parametrize("stage", [1, 2])
def test_an_optimizer_that_refuses_the_models_parameters(optimizer, text, stage, autoencoder_tree, diffusion_tree):
    tree, facts = (autoencoder_tree, IMAGES) if stage == 1 else (diffusion_tree, LATENTS)
    tree["data"]["params"]["autoencoder"] = "somewhere"
    tree["model"]["params"]["optimizer"] = {**optimizer, "partial": True}
    if text is None:
        rehearse(tree, facts)
        return
    message = refused(tree, facts)
    assert message.startswith("model.params.optimizer (run.yaml): ")
    assert text in message


def test_the_discriminators_optimizer_has_its_own_key(autoencoder_tree):
    own = {"target": "torch.optim.Adam", "params": {"lr": -1.0}, "partial": True}
    autoencoder_tree["model"]["params"]["discriminator_optimizer"] = own
    assert refused(autoencoder_tree, IMAGES).startswith("model.params.discriminator_optimizer (run.yaml): ")


def test_fused_optimizers_pass(diffusion_tree):
    diffusion_tree["data"]["params"]["autoencoder"] = "somewhere"
    for target in ("ldm.optim.optimizers.AdamW", "ldm.optim.optimizers.Muon"):
        diffusion_tree["model"]["params"]["optimizer"] = {"target": target, "params": {"lr": 1e-3}, "partial": True}
        rehearse(diffusion_tree, LATENTS)


@pytest.mark.parametrize("value", [float("nan"), -0.5, 1])
@pytest.mark.parametrize("stage", [1, 2])
def test_a_schedule_is_asked_for_its_last_step(value, stage, autoencoder_tree, diffusion_tree):
    tree, facts = (autoencoder_tree, IMAGES) if stage == 1 else (diffusion_tree, LATENTS)
    tree["data"]["params"]["autoencoder"] = "somewhere"
    tree["model"]["params"]["schedule"] = late(value)
    assert refused(tree, facts).startswith("model.params.schedule (run.yaml): at step 11, ")


@pytest.mark.parametrize("value", [1.5, float("nan")])
def test_a_profile_is_asked_for_its_end(value, diffusion_tree):
    diffusion_tree["data"]["params"]["autoencoder"] = "somewhere"
    diffusion_tree["model"]["params"]["ema"]["params"]["profile"] = late(value)
    assert refused(diffusion_tree, LATENTS).startswith("model.params.ema (run.yaml): after 6 images, ")


def test_a_network_that_cannot_be_guided(diffusion_tree, monkeypatch):
    from ldm.diffusion.conditioners.base import Conditioning
    from ldm.diffusion.conditioners.classes import ClassVector

    diffusion_tree["data"]["params"]["autoencoder"] = "somewhere"
    diffusion_tree["model"]["params"]["label_dropout"] = 0.0
    monkeypatch.setattr(ClassVector, "null", lambda self, n: Conditioning(tokens=self.null_rows(n)[:, None]))
    assert "for its samples, it does not work: " in refused(diffusion_tree, LATENTS)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (
            {"classes": [0, 2]},
            "lightning.callbacks.images.params.classes (run.yaml): it does not work: class 2: expected 0 to 1",
        ),
        (
            {"conditions": [{"class_label": 0}, {"clas_label": 0}]},
            "lightning.callbacks.images.params.conditions (run.yaml): it does not work: condition 1: expected the keys",
        ),
        (
            {"steps": 300, "schedule": {"target": "ldm.sampling.timesteps.compvis", "partial": True}},
            "lightning.callbacks.images.params.steps (run.yaml): it does not work: sampling steps: the schedule",
        ),
        ({"steps": 1001}, "lightning.callbacks.images.params.steps (run.yaml): it does not work: sampling steps"),
    ],
)
def test_previews_that_cannot_be_made(params, message, diffusion_tree):
    diffusion_tree["data"]["params"]["autoencoder"] = "somewhere"
    images = {"target": "ldm.training.callbacks.previews.SampleLogger", "params": params}
    diffusion_tree["lightning"]["callbacks"]["images"] = images
    assert refused(diffusion_tree, LATENTS).startswith(message)


def test_previews_of_classes_need_a_model_that_knows_them(diffusion_tree):
    diffusion_tree["data"]["params"]["autoencoder"] = "somewhere"
    diffusion_tree["model"]["params"]["conditioner"] = {"target": "ldm.diffusion.conditioners.base.Unconditional"}
    diffusion_tree["model"]["params"]["network"]["params"]["vector_channels"] = None
    images = {"target": "ldm.training.callbacks.previews.SampleLogger", "params": {"classes": [0]}}
    diffusion_tree["lightning"]["callbacks"]["images"] = images
    assert "this model was trained without conditions: request none" in refused(diffusion_tree, LATENTS)


def test_a_conditioner_that_reads_captions_is_shown_some(diffusion_tree):
    """And one that asks for what the data does not have is refused with what there is."""
    diffusion_tree["data"]["params"]["autoencoder"] = "somewhere"
    diffusion_tree["model"]["params"]["conditioner"] = {"target": "rehearsed.CaptionLength", "params": {}}
    rehearse(diffusion_tree, LATENTS, {"caption": ["", ""]})
    message = refused(diffusion_tree, LATENTS)
    assert message.startswith("model: a global batch of latent (6, 2, 8, 8), class_label (6,) does not pass through it")
    assert "caption" in message


# ---- with real values, at the beginning of fit -----------------------------------------------------------------


@pytest.fixture
def stage1(autoencoder_tree, tmp_path, monkeypatch, tried_once) -> dict[str, Any]:
    monkeypatch.chdir(tmp_path)
    autoencoder_tree["lightning"]["trainer"] |= {"max_steps": 6, "val_check_interval": 3, "log_every_n_steps": 1}
    return autoencoder_tree


def train(tree: dict[str, Any], *words: str) -> int:
    Path("run.yaml").write_text(json.dumps(tree))
    return main.main(["--base", "run.yaml", "--trust", "rehearsed", *words])


def ended_at(message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """With `message`, before the first step."""
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert message in said
    assert not [*Path("logs").glob("*")]  # a start that failed leaves no folder


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        ("Locked", "lightning.callbacks (Locked): its state cannot be saved"),
        ("Foreign", "lightning.callbacks (Foreign): its state cannot be saved"),
        ("Raises", "a checkpoint cannot be put together: KeyError: 'epoch of the moon'"),
    ],
)
def test_a_callback_that_cannot_be_saved(callback, message, stage1, capsys):
    assert train(stage1, f"lightning.callbacks.mine={{target: rehearsed.{callback}}}") == 2
    ended_at(message, capsys)


def test_a_validation_that_fails(stage1, capsys):
    stage1["model"]["target"] = "rehearsed.FailsToValidate"
    assert train(stage1) == 2
    ended_at("model: a validation batch does not pass through it: RuntimeError: validated for the first time", capsys)


def test_pictures_smaller_than_the_window_of_ssim(stage1, capsys):
    assert train(stage1, "data.params.resolution=4", "model.params.loss.params.discriminator=null") == 2
    ended_at("pictures of 6 pixels or more on each side, found 4 x 4", capsys)


def test_pictures_smaller_than_the_window_of_ssim_without_it(stage1):
    small = ["data.params.resolution=4", "model.params.loss.params.discriminator=null"]
    assert train(stage1, *small, "model.params.metrics.ssim=null") == 0
    (run,) = Path("logs").iterdir()
    (row,) = [row for row in read_metrics(run / "metrics.csv") if "val/psnr" in row][-1:]
    assert "val/ssim" not in row


def test_pictures_smaller_than_lpips_halves_them_as_a_metric(stage1, capsys):
    lpips = "{target: ldm.autoencoder.lpips.LPIPS, params: {pretrained: false}}"
    node = f"{{target: ldm.autoencoder.metrics.Perceptual, params: {{distance: {lpips}}}}}"
    assert train(stage1, "data.params.resolution=8", f"model.params.metrics.lpips={node}") == 2
    ended_at("16 pixels or more on each side, found 8 x 8", capsys)


def test_a_metric_of_ones_own_is_named_on_the_command_line(stage1):
    assert train(stage1, "model.params.metrics.darkest.target=rehearsed.Darkest") == 0
    (run,) = Path("logs").iterdir()
    rows = [row for row in read_metrics(run / "metrics.csv") if "val/psnr" in row]
    assert rows
    assert all(float(row["val/darkest"]) < 0 for row in rows)
    record = store.load(next(run.glob("checkpoints/step=00000006.ckpt")))["ldm"]
    assert record["metrics"]["val/darkest"] == pytest.approx(float(rows[-1]["val/darkest"]))


def test_two_metrics_that_log_the_same_name(stage1, capsys):
    assert train(stage1, "model.params.metrics.l1.target=rehearsed.Darkest") == 2
    ended_at("model.params.metrics: 'losses' and 'l1' both log val/l1", capsys)


def test_what_is_no_metric(stage1, capsys):
    assert train(stage1, "model.params.metrics.mine.target=torch.nn.Identity") == 2
    ended_at("model.params.metrics.mine", capsys)


def test_a_metric_that_validation_does_not_log(stage1, capsys):
    node = "{target: ldm.training.callbacks.checkpoints.Checkpoints, params: {monitor: val/beauty}}"
    assert train(stage1, f"lightning.callbacks.checkpoints={node}") == 2
    ended_at("lightning.callbacks.checkpoints.params.monitor: there is no metric 'val/beauty'", capsys)


def test_the_trial_changes_nothing(stage1):
    """Losses, validation and weights, batch statistics included, are those of a run without it, bit for bit."""
    outcomes = []
    for name, steps in (("with", 1), ("without", 0)):
        assert train(stage1, "-n", name, f"lightning.trainer.num_sanity_val_steps={steps}") == 0
        (run,) = Path("logs").glob(f"*_{name}")
        rows = read_metrics(run / "metrics.csv")
        timed = ("images_per_second", "data_wait")
        rows = [{key: value for key, value in row.items() if key not in timed} for row in rows]
        state = store.load(next(run.glob("checkpoints/step=00000006.ckpt")))["state_dict"]
        outcomes.append((rows, state, sorted(path.name for path in run.glob("images/*/*"))))
    (rows, state, pictures), (other_rows, other_state, other_pictures) = outcomes
    assert rows == other_rows
    assert pictures == other_pictures
    assert all(torch.equal(state[name], other_state[name]) for name in other_state)
