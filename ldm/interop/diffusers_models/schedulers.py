"""Objectives as schedulers of diffusers that visit the same times and take the same steps as `ddim` (samplers.py).

Both walk from noise to data at the default times of the objective: DDIM's steps are those of DDIMScheduler with its
times spaced from the end, "trailing"; Euler's, for EDM and flows, those of EDMEulerScheduler and
FlowMatchEulerDiscreteScheduler.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ldm.diffusion.noise_schedules import Cosine, Linear, NoiseSchedule, SqrtLinear, ZeroTerminal
from ldm.diffusion.objectives import Objective
from ldm.diffusion.paths import VE, DiscreteVP
from ldm.diffusion.paths import Linear as StraightPath
from ldm.diffusion.predictions import X0, EDMPreconditioned, Eps, V, Velocity
from ldm.errors import ConfigError
from ldm.interop.diffusers_models.config import OTHERWISE
from ldm.interop.models import node

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
        f"X0 or V, EDM, or Flow with its velocity. {OTHERWISE}"
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
    """The library's settings of these betas: the name of an equal schedule where it has one, else a list."""
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


# ---- in --------------------------------------------------------------------------------------------------------

# {scheduler: beta_start, beta_end and beta_schedule that it has if its file does not say}: those that sample models of
# discrete levels, all on the same path.
_DDPM = (1e-4, 0.02, "linear")
_SHORT = (0.00085, 0.012, "linear")
_DISCRETE = {
    **dict.fromkeys(("DDIMScheduler", "DDPMScheduler", "DDIMParallelScheduler", "DDPMParallelScheduler"), _DDPM),
    **dict.fromkeys(("PNDMScheduler", "LMSDiscreteScheduler", "EulerDiscreteScheduler"), _DDPM),
    **dict.fromkeys(("EulerAncestralDiscreteScheduler", "DEISMultistepScheduler", "SASolverScheduler"), _DDPM),
    **dict.fromkeys(("DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "UniPCMultistepScheduler"), _DDPM),
    **dict.fromkeys(("HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler"), _SHORT),
}
_FLOW = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")
_EDM = ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler")
_MOST_STEPS = 100_000
# Settings that change what the network is given, rather than the steps that are taken.
_USUAL = {"timestep_type": "discrete", "invert_sigmas": False}
_SCHEDULES = {"linear": "Linear", "scaled_linear": "SqrtLinear"}


def objective_from(config: Mapping[str, Any], where: str, timestep_scale: float = 1.0) -> dict[str, Any]:
    """The node of the objective of a model that is sampled with a scheduler.

    How it was trained beyond that (weighting, distribution of levels) no scheduler says: plainly, on uniform levels.

    Args:
        config: scheduler_config.json; any scheduler's, since those of one path differ in their steps alone.
        where: the file, for messages.
        timestep_scale: see Scheduler.

    Raises:
        ConfigError: names what our objectives cannot express.
    """
    name, prediction = config.get("_class_name"), config.get("prediction_type", "epsilon")
    steps = config.get("num_train_timesteps", 1000)
    if type(steps) is not int or not 1 <= steps <= _MOST_STEPS:
        raise ConfigError(f"{where}: num_train_timesteps={steps!r}: expected a whole number up to {_MOST_STEPS}")
    for key, usual in _USUAL.items():
        if config.get(key, usual) != usual:
            raise ConfigError(f"{where}: {key}={config[key]!r}: expected {usual!r}: no objective has such times")
    if name in _FLOW or (name in _DISCRETE and (config.get("use_flow_sigmas") or prediction == "flow_prediction")):
        return node("diffusion.objectives.Flow", time_scale=timestep_scale * steps)
    if name in _EDM:
        return _edm_from(config, where, timestep_scale)
    if name not in _DISCRETE:
        known = ", ".join((*_DISCRETE, *_FLOW, *_EDM))
        raise ConfigError(f"{where}: _class_name={name!r}: of no objective that is known here; expected one of {known}")
    named = {text: kind.__name__ for kind, text in _PREDICTIONS.items()}
    if prediction not in named or timestep_scale != 1:
        found = f"prediction_type={prediction!r}" if prediction not in named else f"timestep_scale={timestep_scale:g}"
        raise ConfigError(f"{where}: {found}: expected {', '.join(named)} at the scheduler's own timesteps")
    return node(
        "diffusion.objectives.DDPM",
        schedule=_schedule_from(config, where),
        prediction=node(f"diffusion.predictions.{named[prediction]}"),
        steps=steps,
    )


def _schedule_from(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    start, end, kind = _DISCRETE[config["_class_name"]]
    kind = config.get("beta_schedule", kind)
    if config.get("trained_betas") is not None:
        raise ConfigError(f"{where}: trained_betas: a list of betas is no noise schedule of ours")
    if kind in _SCHEDULES:
        ends = {"start": config.get("beta_start", start), "end": config.get("beta_end", end)}
        schedule = node(f"diffusion.noise_schedules.{_SCHEDULES[kind]}", **ends)
    elif kind == "squaredcos_cap_v2":
        schedule = node("diffusion.noise_schedules.Cosine")
    else:
        known = ", ".join((*_SCHEDULES, "squaredcos_cap_v2"))
        raise ConfigError(f"{where}: beta_schedule={kind!r}: expected one of {known}")
    zero = config.get("rescale_betas_zero_snr")
    return node("diffusion.noise_schedules.ZeroTerminal", schedule=schedule) if zero else schedule


def _edm_from(config: Mapping[str, Any], where: str, timestep_scale: float) -> dict[str, Any]:
    prediction = config.get("prediction_type", "epsilon")
    if prediction != "epsilon" or timestep_scale != 1000:
        raise ConfigError(
            f"{where}: prediction_type={prediction!r}, timestep_scale={timestep_scale:g}: expected EDM's own "
            f"preconditioning ('epsilon'), and a network that is given 250 ln(sigma), as ours are (1000)"
        )
    defaults = {"sigma_data": 0.5, "sigma_min": 0.002, "sigma_max": 80.0, "rho": 7.0}
    return node("diffusion.objectives.EDM", **{key: config.get(key, value) for key, value in defaults.items()})
