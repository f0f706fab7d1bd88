"""Objectives as schedulers of diffusers that visit the same times and take the same steps as `ddim` (samplers.py).

Both walk from noise to data at the default times of the objective: DDIM's steps are those of DDIMScheduler with its
times spaced from the end, "trailing"; Euler's, for EDM and flows, those of EDMEulerScheduler and
FlowMatchEulerDiscreteScheduler.
"""

from dataclasses import dataclass
from typing import Any

from ldm.diffusion.noise_schedules import Cosine, Linear, NoiseSchedule, SqrtLinear, ZeroTerminal
from ldm.diffusion.objectives import Objective
from ldm.diffusion.paths import VE, DiscreteVP
from ldm.diffusion.paths import Linear as StraightPath
from ldm.diffusion.predictions import X0, EDMPreconditioned, Eps, V, Velocity
from ldm.errors import ConfigError

_PREDICTIONS = {Eps: "epsilon", X0: "sample", V: "v_prediction"}


@dataclass(frozen=True)
class Scheduler:
    """A scheduler of diffusers.

    Attributes:
        name: of its class.
        config: its parameters.
        timestep_scale: the network is given timestep_scale times the scheduler's timestep; the library's own pipelines
            give it the timestep itself.
    """

    name: str
    config: dict[str, Any]
    timestep_scale: float = 1.0


def scheduler_of(objective: Objective) -> Scheduler:
    """The scheduler with which diffusers samples what was trained on an objective, as our `ddim` does.

    With DDIMScheduler the times are the same if the number of steps divides that of the levels: of others, the library
    does not step from one of its times to the next.

    Raises:
        ConfigError: the library has none.
    """
    path, prediction = objective.path, objective.prediction
    if type(path) is DiscreteVP and type(prediction) in _PREDICTIONS:
        return _ddim(path, _PREDICTIONS[type(prediction)])
    if type(path) is VE and type(prediction) is EDMPreconditioned and prediction.sigma_data == path.sigma_data:
        return _edm(path)
    if type(path) is StraightPath and type(prediction) is Velocity and path.t_max == 1:
        return _flow(path)
    end = f", t_max {path.t_max:g}" if type(path) is StraightPath and path.t_max != 1 else ""
    raise ConfigError(
        f"--to diffusers: model.params.objective: its path {type(path).__name__} with the prediction "
        f"{type(prediction).__name__}{end} has no counterpart among the library's schedulers; expected DDPM with Eps, "
        f"X0 or V, EDM, or Flow with its velocity. --to safetensors takes every model"
    )


def _ddim(path: DiscreteVP, prediction: str) -> Scheduler:
    config = {
        "num_train_timesteps": path.steps,
        **_betas(path.schedule, path.steps),
        "prediction_type": prediction,
        # 999, 979, ..., 19 for 50 of 1000 steps, then data: our times 1000, 980, ..., 20, 0.
        "timestep_spacing": "trailing",
        "set_alpha_to_one": True,
        "clip_sample": False,
        "steps_offset": 1,  # of no effect with these times; StableDiffusionPipeline changes every other value
    }
    return Scheduler("DDIMScheduler", config)


def _betas(schedule: NoiseSchedule, steps: int) -> dict[str, Any]:
    """How the library is told the betas: the name of its own schedule that is the same, or a list."""
    if type(schedule) is Linear:
        return {"beta_schedule": "linear", "beta_start": schedule.start, "beta_end": schedule.end}
    if type(schedule) is SqrtLinear:
        return {"beta_schedule": "scaled_linear", "beta_start": schedule.start, "beta_end": schedule.end}
    if type(schedule) is Cosine and (schedule.offset, schedule.largest_beta) == (0.008, 0.999):
        return {"beta_schedule": "squaredcos_cap_v2"}
    if type(schedule) is ZeroTerminal and "beta_schedule" in (shifted := _betas(schedule.schedule, steps)):
        return {**shifted, "rescale_betas_zero_snr": True}
    return {"trained_betas": schedule.betas(steps).tolist()}


def _edm(path: VE) -> Scheduler:
    config = {
        "sigma_min": path.sigma_min,
        "sigma_max": path.t_max,
        "sigma_data": path.sigma_data,
        "rho": path.rho,
        "sigma_schedule": "karras",
        "prediction_type": "epsilon",
        "final_sigmas_type": "zero",
    }
    return Scheduler("EDMEulerScheduler", config, timestep_scale=1000.0)


def _flow(path: StraightPath) -> Scheduler:
    config = {"num_train_timesteps": 1000, "shift": 1.0}
    return Scheduler("FlowMatchEulerDiscreteScheduler", config, timestep_scale=path.time_scale / 1000)
