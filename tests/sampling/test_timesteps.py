"""Where samplers stop: every schedule, for every objective and every number of steps."""

from functools import partial

import pytest
import torch

from ldm.diffusion.noise_schedules import Cosine, SqrtLinear, ZeroTerminal
from ldm.diffusion.objectives import DDPM, EDM, Flow, Interpolant
from ldm.diffusion.paths import GVP, VP
from ldm.diffusion.predictions import V
from ldm.errors import ConfigError
from ldm.sampling.timesteps import compvis, default, karras, quadratic, shifted, uniform

OBJECTIVES = {
    "ddpm": DDPM(SqrtLinear()),
    "cosine": DDPM(Cosine()),
    "zero terminal": DDPM(ZeroTerminal(SqrtLinear()), V()),
    "edm": EDM(),
    "flow": Flow(),
    "gvp": Interpolant(GVP(t_max=0.999)),
    "vp": Interpolant(VP()),
}
SHAPE = (4, 32, 32)
SCHEDULES = {
    "default": default,
    "uniform": uniform,
    "quadratic": quadratic,
    "karras": karras,
    "shifted": partial(shifted, shift=3.0),
}


@pytest.mark.parametrize("steps", [1, 2, 3, 17, 400, 999, 1000])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_exactly_the_steps_asked_for(objective, schedule, steps):
    objective = OBJECTIVES[objective]
    times = SCHEDULES[schedule](objective, steps, SHAPE)
    assert times.shape == (steps + 1,)
    assert times.dtype == torch.float32
    assert times[0] == objective.t_max
    assert times[-1] == 0
    assert (times.diff() < 0).all()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_impossible_numbers_of_steps(schedule):
    with pytest.raises(ConfigError, match="1 or more"):
        SCHEDULES[schedule](Flow(), 0, SHAPE)
    with pytest.raises(ConfigError, match="1 to 1000"):
        SCHEDULES[schedule](DDPM(SqrtLinear()), 1001, SHAPE)


def test_formulas():
    assert quadratic(Flow(), 4, SHAPE).tolist() == [1, 0.5625, 0.25, 0.0625, 0]
    assert shifted(Flow(), 2, SHAPE, 3.0).tolist() == [1, 0.75, 0]
    assert shifted(Flow(), 4, SHAPE).tolist() == uniform(Flow(), 4, SHAPE).tolist() == [1, 0.75, 0.5, 0.25, 0]
    assert shifted(Flow(), 4, (4, 64, 64)).tolist() == shifted(Flow(), 4, SHAPE, 2.0).tolist()
    torch.testing.assert_close(EDM().timesteps(18), karras(EDM(), 18, SHAPE))
    times = karras(DDPM(SqrtLinear()), 8, SHAPE, 0.01, 10.0, rho=3.0)
    objective = OBJECTIVES["ddpm"]
    ratios = (objective.sigma(times) / objective.alpha(times))[1:-1] ** (1 / 3)
    torch.testing.assert_close(ratios.diff(), ratios.diff().mean().expand(6), rtol=2e-2, atol=1e-4)


@pytest.mark.parametrize(("levels", "steps"), [*((1000, n) for n in (1, 2, 5, 20, 50, 200, 250, 500)), (500, 50)])
def test_compvis_times_are_those_of_its_code(levels, steps):
    """Their index i is our time i + 1; theirs are range(0, T, T // steps) + 1, and the last step goes to index 0."""
    indices = [index + 1 for index in range(0, levels, levels // steps)]
    times = compvis(DDPM(SqrtLinear(), steps=levels), steps, SHAPE)
    assert times.dtype == torch.float32
    assert times.tolist() == [*(index + 1 for index in reversed(indices)), 1]


@pytest.mark.parametrize(
    ("objective", "steps", "message"),
    [
        (
            DDPM(SqrtLinear()),
            400,
            "divisor of 1000.*found 400, of which the original makes 500. .* 250 and 500",
        ),
        (DDPM(SqrtLinear()), 30, "found 30, of which the original makes 31. .* 20 and 25"),
        (DDPM(SqrtLinear()), 300, "found 300, of which the original fails at level 1000 of 0 to 999.* 200 and 250"),
        (DDPM(SqrtLinear()), 1000, "found 1000, of which the original fails"),
        (DDPM(SqrtLinear()), 0, "1 to 1000"),
        (DDPM(SqrtLinear()), 1001, "1 to 1000"),
        (Flow(), 50, "discrete levels.*which Linear lacks"),
        (EDM(), 50, "discrete levels.*which VE lacks"),
    ],
)
def test_compvis_refuses_what_its_code_does_not_do(objective, steps, message):
    with pytest.raises(ConfigError, match=message):
        compvis(objective, steps, SHAPE)


@pytest.mark.parametrize("steps", [1, 2, 20, 50, 1000])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("objective", ["ddpm", "cosine", "zero terminal"])
def test_no_call_is_at_a_level_that_no_training_visits(objective, schedule, steps):
    """Discrete ones begin at 1."""
    times = SCHEDULES[schedule](OBJECTIVES[objective], steps, SHAPE)
    assert times[:-1].min() >= 1 - 1e-4
    few = shifted(DDPM(SqrtLinear()), 1000, SHAPE, 0.5)
    assert few[-2] == 1


def test_karras_ends_at_the_first_of_discrete_levels():
    times = karras(DDPM(SqrtLinear()), 20, SHAPE)
    assert times[-2] == pytest.approx(1, abs=1e-4)
    torch.testing.assert_close(karras(DDPM(SqrtLinear()), 20, SHAPE, ratio_min=1e-5), times)
    assert karras(DDPM(SqrtLinear()), 20, SHAPE, ratio_min=0.1)[-2] > 3


def test_karras_from_a_ratio_that_the_objective_does_not_reach():
    with pytest.raises(ConfigError, match=r"expected ratio_min below 80, the largest .* found 100"):
        karras(EDM(), 5, SHAPE, 100.0, 200.0)
