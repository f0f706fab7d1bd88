"""Warnings of unhealthy runs: each once, with a link that leads somewhere, and none for healthy runs."""

import logging
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import main
from ldm.autoencoder.module import AutoencoderKL
from ldm.config.load import to_yaml
from ldm.diffusion.module import LatentDiffusion
from ldm.diffusion.weightings import Plain, Uncertainty
from ldm.training.callbacks.health import PAGE, SYMPTOMS, Health
from ldm.training.metrics_table import read_metrics

ROOT = Path(__file__).parents[3]
STAGE_1, STAGE_2, LEARNED = (kind.__new__(kind) for kind in (AutoencoderKL, LatentDiffusion, LatentDiffusion))
vars(STAGE_2)["objective"], vars(LEARNED)["objective"] = nn.Identity(), Uncertainty(Plain())
GOOD_1 = {"val/dead_channels": 0.0, "val/latent_std": 1.3, "val/rec_loss": 600.0, "val/kl": 900.0}
GOOD_2 = {"val/loss": 0.5, "val/loss_ema": 0.49, "val/latent_std": 0.98}


class Run:
    """A trainer as far as the callback sees it."""

    def __init__(self, module: Any, health: Health | None = None, main: bool = True) -> None:
        self.module, self.health = module, health or Health(after=0)
        self.trainer: Any = SimpleNamespace(
            global_step=0,
            log_every_n_steps=1,
            callback_metrics={},
            is_global_zero=main,
            sanity_checking=False,
            state=SimpleNamespace(fn="fit"),
        )

    def step(self, **trained: float) -> None:
        self.trainer.global_step += 1
        self.log({f"train/{name}": value for name, value in trained.items()})
        self.health.on_train_batch_end(self.trainer, self.module, None, None, 0)

    def validate(self, metrics: dict[str, float]) -> None:
        self.log(metrics)
        self.health.on_validation_end(self.trainer, self.module)

    def log(self, metrics: dict[str, float]) -> None:
        self.trainer.callback_metrics |= {name: torch.tensor(value) for name, value in metrics.items()}


@pytest.fixture
def said(caplog):
    caplog.set_level(logging.WARNING, "ldm")
    return lambda: [record.getMessage() for record in caplog.records if PAGE in record.getMessage()]


def sections(messages: list[str]) -> list[str]:
    return [message.partition(f"{PAGE}#")[2] for message in messages]


@pytest.mark.parametrize(
    ("module", "metrics", "section"),
    [
        (STAGE_1, {"val/dead_channels": 1.0, "val/kl": 0.02}, "posterior-collapse"),
        (STAGE_1, {"val/dead_channels": 0.25}, "dead-latent-channels"),
        (STAGE_1, {"val/latent_std": 11.0}, "exploding-latents"),
        (STAGE_2, {"val/latent_std": 2.1}, "latents-not-near-unit-variance"),
        (STAGE_2, {"val/latent_std": 0.0}, "latents-not-near-unit-variance"),
    ],
)
def test_one_validation_is_enough(module, metrics, section, said):
    run = Run(module)
    run.validate((GOOD_1 if module is STAGE_1 else GOOD_2) | metrics)
    (message,) = said()
    assert message.startswith("step 0: ")
    assert "\n" not in message
    assert next(iter(metrics)) in message
    assert message.endswith(f"; see docs/healthy.md#{section}")


@pytest.mark.parametrize(
    ("module", "metrics"),
    [
        (STAGE_1, {}),
        (STAGE_1, {"val/latent_std": 5.5}),  # of the published kl-f8
        (STAGE_1, {"val/dead_channels": math.nan}),
        (STAGE_2, {}),
        (STAGE_2, {"val/latent_std": 0.6}),
        (STAGE_2, {"val/latent_std": math.nan, "val/loss": math.nan}),
        (STAGE_2, {"val/loss_ema": 0.504}),
        (LEARNED, {"val/loss": -0.5, "val/loss_ema": -0.4999}),
        (LEARNED, {"val/loss": 0.010, "val/loss_ema": 0.012}),
    ],
)
def test_healthy_runs_are_silent(module, metrics, said):
    run = Run(module)
    for _ in range(10):
        run.step(discriminator=0.6, logits_real=1.0, logits_fake=-0.5)
        run.validate((GOOD_1 if module is STAGE_1 else GOOD_2) | metrics)
    assert said() == []


def test_what_is_not_measured_is_not_judged(said):
    """A codebook, `metrics: {latents: null}`, or a module of one's own."""
    Run(STAGE_1).validate({"val/psnr": 20.0})
    Run(object()).validate({"val/dead_channels": 1.0, "val/loss": 1.0, "val/loss_ema": 9.0})
    assert said() == []


def test_a_discriminator_is_judged_by_its_mean_since_the_last_validation(said):
    run = Run(STAGE_1)
    for losses in ([1.0, 0.0, 0.0], [0.9, 0.0, 0.0]):  # 0 at the time of the validation, but not for long
        for loss in losses:
            run.step(discriminator=loss, logits_real=4.0, logits_fake=-2.0)
        run.validate(GOOD_1)
    assert said() == []
    for loss in (0.01, 0.03):
        run.step(discriminator=loss, logits_real=3.0, logits_fake=-3.0 - loss)
    run.validate(GOOD_1)
    (message,) = said()
    assert "its loss is 0.02 (train/discriminator)" in message
    assert "lie 6.02 apart" in message
    assert sections([message]) == ["saturated-discriminator"]


def test_a_critic_without_a_bound_is_not_saturated(said):
    run = Run(STAGE_1)
    run.step(discriminator=-20.0, logits_real=30.0, logits_fake=-10.0)
    run.validate(GOOD_1)
    assert said() == []


def test_an_average_has_to_be_worse_for_long(said):
    run = Run(STAGE_2)
    worse = GOOD_2 | {"val/loss_ema": 0.6}
    for metrics in (worse, worse, GOOD_2, worse, worse):
        run.validate(metrics)
    assert said() == []
    run.validate(worse)
    assert sections(said()) == ["averaged-weights-worse-than-raw"]


@pytest.mark.parametrize(("module", "name", "high"), [(STAGE_1, "val/rec_loss", 90.0), (STAGE_2, "val/loss", 72.0)])
def test_a_loss_that_rises_again(module, name, high, said):
    run = Run(module)
    for value in (high + 1, 60.0, high - 1):
        run.validate({name: value})
    assert said() == []
    run.validate({name: high + 1})
    (message,) = said()
    assert f"{name} is {high + 1:.4g}, and was 60" in message
    assert sections([message]) == ["learning-rate-too-high"]


def test_the_loss_of_a_learned_weighting_is_judged_as_a_logarithm(said):
    """It may come to rest anywhere, at zero too, where a ratio says nothing."""
    run = Run(LEARNED)
    for value in (0.9, 0.02, 0.01, 0.03, -0.4, -0.3):
        run.validate({"val/loss": value, "val/loss_ema": value})
    assert said() == []
    for _ in range(3):
        run.validate({"val/loss": -0.1, "val/loss_ema": 0.0})
    assert sections(said()) == ["learning-rate-too-high", "averaged-weights-worse-than-raw"]


def test_once_and_again_only_if_it_came_back(said):
    run = Run(STAGE_1)
    ill = GOOD_1 | {"val/dead_channels": 0.5}
    for metrics in (ill, ill, ill, GOOD_1, GOOD_1, ill, ill):
        run.trainer.global_step += 1
        run.validate(metrics)
    assert [message.partition(":")[0] for message in said()] == ["step 1", "step 6"]


def test_a_run_that_goes_on_does_not_repeat_itself(said):
    first = Run(STAGE_2)
    for loss in (0.2, 0.5):
        first.validate({"val/loss": loss, "val/loss_ema": 0.6})
    before = said()
    assert sections(before) == ["learning-rate-too-high"]
    second = Run(STAGE_2)
    second.health.load_state_dict(first.health.state_dict())
    second.validate({"val/loss": 0.5, "val/loss_ema": 0.6})
    assert sections(said()[1:]) == ["averaged-weights-worse-than-raw"]


def test_the_first_steps_trials_and_other_ranks_say_nothing(said):
    ill = GOOD_1 | {"val/dead_channels": 1.0}
    early, trial, validation = Run(STAGE_1, Health()), Run(STAGE_1), Run(STAGE_1)
    early.trainer.global_step = 299
    trial.trainer.sanity_checking = True
    validation.trainer.state.fn = "validate"
    other = Run(STAGE_1, main=False)
    for run in (early, trial, validation, other):
        run.validate(ill)
    assert said() == []
    assert other.health.state_dict()["in_a_row"]["posterior-collapse"] == 1  # but every rank knows
    early.trainer.global_step = 300
    early.validate(ill)
    assert sections(said()) == ["posterior-collapse"]


def test_every_link_leads_to_a_heading():
    headings = re.findall(r"^#+ (.*)$", (ROOT / PAGE).read_text(), re.MULTILINE)
    slugs = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    assert {symptom.section for symptoms in SYMPTOMS.values() for symptom in symptoms} <= slugs


# ---- the runs of the page, replayed from their metrics -------------------------------------------------------------

RUNS = sorted(path.stem for path in (ROOT / "docs" / "healthy").glob("*.csv"))
HEALTHY = [name for name in RUNS if name.startswith("healthy_") or name == "large_steps"]


def replay(name: str) -> None:
    """Show the callback what it saw in that run."""
    rows = read_metrics(ROOT / "docs" / "healthy" / f"{name}.csv")
    run = Run(STAGE_1 if any("val/psnr" in row for row in rows) else STAGE_2, Health())
    for row in rows:
        values = {key: float(value) for key, value in row.items() if key != "step"}
        run.trainer.global_step = int(row["step"]) - 1
        run.step(**{key.removeprefix("train/"): value for key, value in values.items() if key.startswith("train/")})
        if any(key.startswith("val/") for key in values):
            run.validate({key: value for key, value in values.items() if key.startswith("val/")})


@pytest.mark.parametrize("name", HEALTHY)
def test_the_healthy_runs_of_the_page_are_silent(name, said):
    replay(name)
    assert said() == []


def test_the_page_quotes_what_its_other_runs_said(said):
    """Each line that gives a failure away is on the page, word for word, and no other."""
    ill = [name for name in RUNS if name not in HEALTHY]
    assert len(ill) == 5
    for name in ill:
        before = len(said())
        replay(name)
        assert len(said()) > before, f"{name}: nothing was said"
    quoted = re.findall(r"^step \d+: .*; see docs/healthy\.md#.*$", (ROOT / PAGE).read_text(), re.MULTILINE)
    assert sorted(quoted) == sorted(said())


# ---- real runs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("on", [True, False])
def test_a_run_says_it_in_its_log(autoencoder_tree, tmp_path, monkeypatch, capsys, said, on):
    """A latent of noise alone: the KL outweighs everything. Judged from the start, or not at all."""
    monkeypatch.chdir(tmp_path)
    health = {"target": "ldm.training.callbacks.health.Health", "params": {"after": 8}}
    autoencoder_tree["lightning"]["callbacks"] = {"images": None, "health": health if on else None}
    params = autoencoder_tree["model"]["params"]
    params["loss"]["params"]["kl_weight"] = 1e6
    params["encoder"]["params"] |= {"base_channels": 16}
    Path("stage1.yaml").write_text(to_yaml(autoencoder_tree))
    assert main.main(["--base", "stage1.yaml", "model.params.optimizer.params.lr=1e-2"]) == 0
    (run,) = Path("logs").iterdir()
    judged = [row for row in read_metrics(run / "metrics.csv") if "val/dead_channels" in row]
    assert [row["val/dead_channels"] for row in judged if int(row["step"]) >= 8] == ["1", "1"]
    assert sections(said()) == (["posterior-collapse"] if on else [])
