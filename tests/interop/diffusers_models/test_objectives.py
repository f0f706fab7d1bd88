"""The objective of a model that a scheduler of diffusers samples: its levels are the library's own."""

import inspect

import diffusers
import numpy as np
import pytest
import torch

from ldm.config.load import build
from ldm.errors import ConfigError
from ldm.interop.diffusers_models import schedulers as module
from ldm.interop.models import node

SCHEDULES = [
    {},
    {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    {"beta_schedule": "squaredcos_cap_v2"},
    {"beta_schedule": "linear", "num_train_timesteps": 100},
    {"beta_schedule": "scaled_linear", "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
]


@pytest.mark.parametrize("settings", SCHEDULES)
def test_levels_are_those_of_the_scheduler(settings):
    theirs = diffusers.DDIMScheduler(**settings)
    config = {**theirs.config, "_class_name": "DDIMScheduler"}
    objective = build(module.objective_from(config, "scheduler_config.json"))
    times = torch.arange(1, objective.path.steps + 1).float()
    assert np.allclose(objective.alpha(times).square(), theirs.alphas_cumprod, rtol=1e-4, atol=1e-7)
    assert objective.path.c_noise(times[-1:]) == theirs.config.num_train_timesteps - 1


@pytest.mark.parametrize("name", module._DISCRETE)
def test_a_file_that_says_nothing_has_the_defaults_of_its_class(name):
    parameters = inspect.signature(getattr(diffusers, name).__init__).parameters
    values = tuple(parameters[key].default for key in ("beta_start", "beta_end", "beta_schedule"))
    assert module._DISCRETE[name] == values
    assert parameters["num_train_timesteps"].default == 1000
    assert parameters["prediction_type"].default == "epsilon"


@pytest.mark.parametrize(("text", "kind"), [("epsilon", "Eps"), ("sample", "X0"), ("v_prediction", "V")])
def test_predictions(text, kind):
    made = module.objective_from({"_class_name": "DDPMScheduler", "prediction_type": text}, "file")
    assert made["params"]["prediction"] == node(f"diffusion.predictions.{kind}")


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("EulerDiscreteScheduler", "timestep_type", "continuous"),
        ("FlowMatchEulerDiscreteScheduler", "invert_sigmas", True),
    ],
)
def test_times_that_no_objective_of_ours_has_are_refused(name, key, value):
    """Stable Video Diffusion's network is given log(sigma) / 4, Mochi's the time from the other end."""
    default = inspect.signature(getattr(diffusers, name).__init__).parameters[key].default
    module.objective_from({"_class_name": name, key: default}, "file")
    with pytest.raises(ConfigError, match=f"file: {key}={value!r}"):
        module.objective_from({"_class_name": name, key: value}, "file")


@pytest.mark.parametrize(
    "config",
    [
        {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0},
        {"_class_name": "DPMSolverMultistepScheduler", "use_flow_sigmas": True, "prediction_type": "flow_prediction"},
    ],
)
def test_flows(config):
    assert module.objective_from(config, "file") == node("diffusion.objectives.Flow", time_scale=1000.0)
    assert module.objective_from(config, "file", 0.001)["params"]["time_scale"] == 1.0


def test_a_scheduler_that_was_written_here_comes_back():
    for made in (
        node("diffusion.objectives.Flow", time_scale=1000.0),
        node("diffusion.objectives.EDM", sigma_data=0.5, sigma_min=0.01, sigma_max=50.0, rho=5.0),
        node(
            "diffusion.objectives.DDPM",
            schedule=node("diffusion.noise_schedules.SqrtLinear", start=0.001, end=0.01),
            prediction=node("diffusion.predictions.V"),
            steps=500,
        ),
    ):
        found = module.scheduler_of(build(made))
        config = found.config | {"_class_name": found.name}
        assert module.objective_from(config, "file", found.timestep_scale) == made


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"_class_name": "ScoreSdeVeScheduler"}, "_class_name='ScoreSdeVeScheduler'"),
        ({}, "_class_name=None"),
        (
            {"_class_name": "DDPMScheduler", "beta_schedule": "sigmoid"},
            "beta_schedule='sigmoid': expected one of linear",
        ),
        ({"_class_name": "DDPMScheduler", "trained_betas": [0.1]}, "trained_betas"),
        ({"_class_name": "DDPMScheduler", "prediction_type": "noise"}, "prediction_type='noise'"),
        ({"_class_name": "EDMEulerScheduler"}, "timestep_scale=1"),
        ({"_class_name": "EDMEulerScheduler", "prediction_type": "v_prediction"}, "prediction_type='v_prediction'"),
    ],
)
def test_what_ours_cannot_express_is_named(config, words):
    with pytest.raises(ConfigError) as error:
        module.objective_from(config, "folder/scheduler_config.json")
    assert "folder/scheduler_config.json" in str(error.value)
    assert words in str(error.value)
