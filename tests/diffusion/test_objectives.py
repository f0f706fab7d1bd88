"""DDPM: its noise schedules against diffusers, its formulas against closed forms, its grid for every length."""

import copy
import pickle

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from hypothesis import given
from hypothesis import strategies as st

from ldm.diffusion.conditioning import Conditioning
from ldm.diffusion.objectives import DDPM, X0, Cosine, Eps, Linear, SqrtLinear, V, rowwise
from ldm.errors import ConfigError
from ldm.randomness import Draws

NOTHING = Conditioning()
PREDICTIONS = [Eps(), X0(), V()]


@pytest.mark.parametrize(
    ("schedule", "reference"),
    [
        (Linear(), {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}),
        (SqrtLinear(), {"beta_schedule": "scaled_linear", "beta_start": 0.0015, "beta_end": 0.0195}),
        (SqrtLinear(0.00085, 0.012), {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}),
        (Cosine(), {"beta_schedule": "squaredcos_cap_v2"}),
    ],
    ids=["linear", "sqrt_linear", "sqrt_linear_sd", "cosine"],
)
def test_schedules_equal_diffusers(schedule, reference):
    objective = DDPM(schedule)
    levels = torch.arange(1, 1001).float()  # ours count the data as level 0
    expected = DDPMScheduler(1000, **reference).alphas_cumprod
    torch.testing.assert_close(objective.alpha(levels), expected.sqrt(), rtol=2e-5, atol=1e-6)
    torch.testing.assert_close(objective.sigma(levels), (1 - expected).sqrt(), rtol=2e-4, atol=1e-6)


def test_cosine_follows_its_formula():
    t = torch.arange(0, 990).double()
    angle = (t / 1000 + 0.008) / 1.008 * torch.pi / 2
    expected = (angle.cos() / angle[0].cos()).float()
    torch.testing.assert_close(DDPM(Cosine()).alpha(t.float()), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("steps", [1, 7, 1000])
def test_ends_and_variance(steps):
    objective = DDPM(SqrtLinear(), steps=steps)
    t = torch.arange(steps + 1).float()
    assert objective.alpha(t[0]) == 1
    assert objective.sigma(t[0]) == 0
    assert (objective.alpha(t).diff() < 0).all()
    torch.testing.assert_close(objective.alpha(t) ** 2 + objective.sigma(t) ** 2, torch.ones(steps + 1))


def test_levels_can_be_differentiated():
    objective = DDPM(SqrtLinear())
    t = torch.tensor([10.25, 500.5, 1000.0], requires_grad=True)
    alpha = objective.alpha(t)
    (slope,) = torch.autograd.grad(alpha.sum(), t)
    below, above = t.detach().floor().clamp(max=999), t.detach().floor().clamp(max=999) + 1
    torch.testing.assert_close(slope, objective.alpha(above) - objective.alpha(below))
    assert objective.alpha(below[0]) > alpha[0] > objective.alpha(above[0])


@pytest.mark.parametrize("prediction", PREDICTIONS, ids=lambda p: type(p).__name__)
def test_target_leads_back_to_the_data(prediction):
    objective = DDPM(SqrtLinear(), prediction)
    x0, noise, t = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4), torch.tensor([1.0, 400.0, 1000.0])
    a, s = rowwise(objective.alpha(t), x0), rowwise(objective.sigma(t), x0)
    target = prediction.target(x0, noise, a, s)
    told = {}

    def net(x, noise_level, conditioning):
        told["level"] = noise_level
        return target

    back = objective.denoise(net, a * x0 + s * noise, t, NOTHING)
    torch.testing.assert_close(back, x0, rtol=1e-3, atol=1e-3)
    # The network counts from 0, as the lineage's does.
    assert told["level"].tolist() == [0, 399, 999]


@pytest.mark.parametrize("prediction", PREDICTIONS, ids=lambda p: type(p).__name__)
def test_loss_is_the_error_of_the_prediction(prediction):
    objective = DDPM(SqrtLinear(), prediction)
    draws, x0 = Draws(0, range(16), 16), torch.randn(16, 2, 4, 4)
    seen = {}

    def perfect_but_for_a_tenth(x, noise_level, conditioning):
        t = noise_level + 1
        a, s = rowwise(objective.alpha(t), x), rowwise(objective.sigma(t), x)
        seen["x"], seen["t"] = x, t
        return (prediction.target(x0, draws.normal("noise", x0.shape[1:]), a, s) + 0.1).bfloat16()

    losses = objective.loss(perfect_but_for_a_tenth, x0, NOTHING, draws)
    assert losses.shape == (16,)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, torch.full((16,), 0.01), rtol=0.3, atol=0)  # bf16 output
    # x is what alpha, sigma and the batch's own noise make of x0.
    a, s = rowwise(objective.alpha(seen["t"]), x0), rowwise(objective.sigma(seen["t"]), x0)
    torch.testing.assert_close(seen["x"], a * x0 + s * draws.normal("noise", (2, 4, 4)))


def test_weighting_multiplies_each_row():
    def by_sigma(alpha, sigma):
        assert alpha.shape == sigma.shape == (8,)
        return sigma

    levels = []

    def net(x, noise_level, conditioning):
        levels.append(noise_level + 1)
        return torch.zeros_like(x)

    draws, x0 = Draws(0, range(8), 8), torch.randn(8, 2, 4, 4)
    plain, weighted = (DDPM(SqrtLinear(), weighting=w).loss(net, x0, NOTHING, draws) for w in (None, by_sigma))
    torch.testing.assert_close(weighted, plain * DDPM(SqrtLinear()).sigma(levels[0]))


@pytest.mark.parametrize("steps", [1, 10, 250])
def test_a_batch_of_T_visits_every_level_once(steps):
    levels = []

    def net(x, noise_level, conditioning):
        levels.extend(noise_level.tolist())
        return x

    DDPM(Linear(), steps=steps).loss(net, torch.zeros(steps, 1, 1, 1), NOTHING, Draws(3, range(steps), steps))
    assert sorted(levels) == [*range(steps)]


def test_a_row_depends_on_its_number_alone():
    objective, x0 = DDPM(SqrtLinear()), torch.randn(8, 1, 4, 4)

    def net(x, noise_level, conditioning):
        return x * (noise_level / 1000)[:, None, None, None]

    together = objective.loss(net, x0, NOTHING, Draws(5, range(100, 108), 8))
    parts = [objective.loss(net, x0[i : i + 2], NOTHING, Draws(5, [100 + i, 101 + i], 8)) for i in (0, 2, 4, 6)]
    torch.testing.assert_close(together, torch.cat(parts))


@given(st.integers(1, 1200).flatmap(lambda levels: st.tuples(st.just(levels), st.integers(1, levels))))
def test_grid_has_exactly_the_steps_asked_for(lengths):
    levels, steps = lengths
    objective = DDPM.__new__(DDPM)  # the grid needs no tables: 1200 of them would take long
    objective.__dict__["steps"] = levels
    grid = objective.grid(steps)
    assert grid.shape == (steps + 1,)
    assert grid[0] == levels
    assert grid[-1] == 0
    assert (grid.diff() < 0).all()
    assert (grid == grid.round()).all()
    # As even as whole numbers can be: no two strides differ by more than one.
    assert grid.diff().max() - grid.diff().min() <= 1


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_grid_of_impossible_length(steps):
    with pytest.raises(ConfigError, match="1 to 1000"):
        DDPM(SqrtLinear()).grid(steps)


def test_tables_are_no_state():
    objective = DDPM(SqrtLinear())
    objective.alpha(torch.tensor(3.0))
    assert not objective.state_dict()
    for twin in (copy.deepcopy(objective), pickle.loads(pickle.dumps(objective))):
        assert twin.alpha(torch.tensor(3.0)) == objective.alpha(torch.tensor(3.0))
    # A half-precision model keeps full-precision levels.
    assert objective.bfloat16().sigma(torch.tensor(1.0)).item() == pytest.approx(np.sqrt(0.0015), rel=1e-6)
