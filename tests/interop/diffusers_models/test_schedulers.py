"""Schedulers of diffusers against our samplers: the same times, and step by step the same latents."""

import json
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from ldm.diffusion.conditioners.base import Conditioning
from ldm.diffusion.noise_levels import LogNormal, Uniform
from ldm.diffusion.noise_schedules import Cosine, Linear, SqrtLinear, ZeroTerminal
from ldm.diffusion.objectives import DDPM, EDM, Flow, Interpolant, Objective
from ldm.diffusion.paths import GVP, VE, VP, DiscreteVP
from ldm.diffusion.paths import Linear as StraightPath
from ldm.diffusion.predictions import X0, EDMPreconditioned, Eps, V, Velocity
from ldm.diffusion.weightings import Plain
from ldm.errors import ConfigError
from ldm.interop.diffusers_models.schedulers import scheduler_of
from ldm.sampling.samplers import ddim
from ldm.sampling.steps import start
from ldm.sampling.timesteps import shifted

diffusers = pytest.importorskip("diffusers")

OBJECTIVES = {
    "linear, eps": DDPM(Linear()),
    "latent diffusion, eps": DDPM(SqrtLinear()),
    "Stable Diffusion, v": DDPM(SqrtLinear(0.00085, 0.012), V()),
    "cosine, v": DDPM(Cosine(), V()),
    "cosine, x0": DDPM(Cosine(), X0()),
    "cosine of another offset, v": DDPM(Cosine(offset=0.02), V()),
    "no signal at the end, v": DDPM(ZeroTerminal(SqrtLinear()), V()),
    "no signal at the end, x0": DDPM(ZeroTerminal(Linear()), X0()),
    "no signal at the end of another cosine, v": DDPM(ZeroTerminal(Cosine(offset=0.02)), V()),
    "a hundred levels, eps": DDPM(SqrtLinear(), steps=100),
    "EDM": EDM(),
    "EDM of other values": EDM(sigma_data=0.5, sigma_min=0.01, sigma_max=20.0, rho=5.0),
    "flow": Flow(),
    "flow, time in 0 to 1": Flow(time_scale=1.0),
}


def network(x, noise_level, conditioning):
    """Reads its input and the noise level, and depends on both; (N,C,H,W) of size 1."""
    wave = (noise_level / 200).sin().reshape(-1, 1, 1, 1)
    return 0.7 * torch.tanh(x.roll(1, -1) + 0.3 * x + wave)


def ours(objective, noise, times):
    """The latents after each step."""
    x = start(objective, noise, times[0])
    for step in pairwise(times):
        x = ddim(lambda x, t: objective.denoise(network, x, t, Conditioning()), objective, x, torch.stack(step))
        yield x


def theirs(made, noise, steps, sigmas=None):
    config = json.loads(json.dumps(made.config))  # as it comes back from the folder
    scheduler = getattr(diffusers, made.name)(**config)
    scheduler.set_timesteps(**({"num_inference_steps": steps} if sigmas is None else {"sigmas": sigmas}))
    flow = made.name.startswith("Flow")
    x = noise if flow else noise * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        seen = x if flow else scheduler.scale_model_input(x, t)
        output = network(seen, (made.timestep_scale * t).float().expand(len(x)), None)
        x = scheduler.step(output, t, x).prev_sample
        yield x


def even(steps):
    return torch.linspace(1, 0, steps + 1)[:-1].tolist()


@pytest.mark.parametrize("steps", [1, 4, 50])
@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
def test_every_step_is_the_librarys(objective, steps):
    noise = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    made = scheduler_of(objective)
    own = [*ours(objective, noise, objective.timesteps(steps))]
    other = [*theirs(made, noise, steps, even(steps) if made.name.startswith("Flow") else None)]
    assert len(own) == len(other) == steps
    # The library keeps alpha^2 in float32, and 1 - alpha^2 of it: where the network gives x0, eps is worth no more.
    close = 2e-5 if isinstance(objective.prediction, X0) or isinstance(objective, EDM) else 5e-6
    for mine, its in zip(own, other, strict=True):
        torch.testing.assert_close(its, mine, rtol=0, atol=close * max(1, float(mine.abs().max())))


def test_a_shift_of_the_library_is_our_schedule_shifted():
    objective = Flow()
    noise = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    made = scheduler_of(objective)
    made.config["shift"] = 3.0
    own = [*ours(objective, noise, shifted(objective, 10, (3, 4, 4), shift=3.0))]
    for mine, its in zip(own, theirs(made, noise, 10, even(10)), strict=True):
        torch.testing.assert_close(its, mine, rtol=0, atol=5e-6)


def test_the_librarys_names_of_noise_schedules_are_used_where_they_are_the_same():
    def named(schedule):
        config = scheduler_of(DDPM(schedule, V())).config
        return config.get("beta_schedule"), config.get("rescale_betas_zero_snr", False)

    assert named(Linear()) == ("linear", False)
    assert named(SqrtLinear()) == ("scaled_linear", False)
    assert named(Cosine()) == ("squaredcos_cap_v2", False)
    assert named(Cosine(offset=0.02)) == (None, False)
    assert named(ZeroTerminal(SqrtLinear())) == ("scaled_linear", True)
    assert named(ZeroTerminal(Cosine(offset=0.02))) == (None, False)


@pytest.mark.parametrize(
    ("objective", "named"),
    [
        (DDPM(Linear(), Velocity()), "DiscreteVP with the prediction Velocity"),
        (Flow(X0()), "Linear with the prediction X0"),
        (Interpolant(VP()), "VP with the prediction PathVelocity"),
        (Interpolant(GVP()), "GVP with the prediction PathVelocity"),
        (Objective(StraightPath(t_max=0.999), Velocity(), Plain(), Uniform()), "Velocity, t_max 0.999"),
        (Objective(VE(), Eps(), Plain(), LogNormal()), "VE with the prediction Eps"),
        (Objective(VE(sigma_data=0.5), EDMPreconditioned(1.0), Plain(), LogNormal()), "VE with the prediction EDM"),
        (
            SimpleNamespace(path=type("Own", (DiscreteVP,), {})(Linear()), prediction=Eps()),
            "Own with the prediction Eps",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_has_no_counterpart_is_refused_by_name(objective, named):
    with pytest.raises(ConfigError, match=named):
        scheduler_of(objective)
