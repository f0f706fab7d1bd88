"""Where samplers stop: every grid, for every objective and every number of steps."""

import pytest
import torch

from ldm.diffusion.grids import CompVis, Default, Karras, Power, Shift
from ldm.diffusion.noise_schedules import Cosine, SqrtLinear, ZeroTerminal
from ldm.diffusion.objectives import DDPM, EDM, Flow
from ldm.diffusion.predictions import V
from ldm.errors import ConfigError

OBJECTIVES = {
    "ddpm": DDPM(SqrtLinear()),
    "cosine": DDPM(Cosine()),
    "zero terminal": DDPM(ZeroTerminal(SqrtLinear()), V()),
    "edm": EDM(),
    "flow": Flow(),
}
GRIDS = {"default": Default(), "uniform": Power(1), "quadratic": Power(2), "karras": Karras(), "shifted": Shift(3.0)}


@pytest.mark.parametrize("steps", [1, 2, 3, 17, 400, 999, 1000])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_exactly_the_steps_asked_for(objective, grid, steps):
    objective = OBJECTIVES[objective]
    times = GRIDS[grid](objective, steps)
    assert times.shape == (steps + 1,)
    assert times.dtype == torch.float32
    assert times[0] == objective.last
    assert times[-1] == 0
    assert (times.diff() < 0).all()


@pytest.mark.parametrize("grid", GRIDS)
def test_impossible_numbers_of_steps(grid):
    with pytest.raises(ConfigError, match="1 or more"):
        GRIDS[grid](Flow(), 0)
    with pytest.raises(ConfigError, match="1 to 1000"):
        GRIDS[grid](DDPM(SqrtLinear()), 1001)


def test_formulas():
    assert Power(2)(Flow(), 4).tolist() == [1, 0.5625, 0.25, 0.0625, 0]
    assert Shift(3.0)(Flow(), 2).tolist() == [1, 0.75, 0]
    torch.testing.assert_close(EDM().grid(18), Karras()(EDM(), 18))
    times = Karras(0.01, 10.0, rho=3.0)(DDPM(SqrtLinear()), 8)
    objective = OBJECTIVES["ddpm"]
    ratios = (objective.sigma(times) / objective.alpha(times))[1:-1] ** (1 / 3)
    torch.testing.assert_close(ratios.diff(), ratios.diff().mean().expand(6), rtol=2e-2, atol=1e-4)


def test_compvis():
    """make_ddim_timesteps: range(0, 1000, 1000 // steps) + 1, levels counted from 0 as the original does."""
    ddpm = DDPM(SqrtLinear())
    times = CompVis()(ddpm, 50)
    theirs = [level + 1 for level in range(0, 1000, 20)]  # their ddim_timesteps
    assert times[:-1].tolist() == [level + 1.0 for level in reversed(theirs)]  # ours count from 1
    assert times[-1] == 1  # their ddim_alphas_prev begins with alphas_cumprod[0]
    assert len(times) == 51
    for steps, fate in ((300, "fails at level 1000"), (400, "makes 500"), (1000, "fails at level 1000"), (0, "steps")):
        with pytest.raises(ConfigError, match=fate):
            CompVis()(ddpm, steps)
    with pytest.raises(ConfigError, match="discrete levels"):
        CompVis()(Flow(), 50)
