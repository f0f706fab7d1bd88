"""Objectives: their formulas against closed forms, and what they promise of their times."""

import copy
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ldm.config.load import load
from ldm.diffusion.conditioners.base import Conditioning
from ldm.diffusion.noise_levels import LogitNormal, LogNormal, Shifted, Uniform
from ldm.diffusion.noise_schedules import Linear, SqrtLinear, ZeroTerminal
from ldm.diffusion.objectives import DDPM, EDM, Flow, Interpolant, rowwise
from ldm.diffusion.paths import GVP, VP, DiscreteVP
from ldm.diffusion.predictions import X0, Eps, V
from ldm.diffusion.weightings import P2, VLB, Absolute, MinSNR, Plain, PlainAndVLB, Squared, Uncertainty
from ldm.errors import ConfigError
from ldm.randomness import Draws

NOTHING = Conditioning()
PREDICTIONS = [Eps(), X0(), V()]


@pytest.mark.parametrize(
    "make", [lambda: Flow(prediction=Eps()), lambda: DDPM(ZeroTerminal(SqrtLinear()))], ids=["flow", "zero-terminal"]
)
def test_the_noise_is_not_predicted_where_no_signal_is_left(make):
    with pytest.raises(ConfigError, match="tells data from pure noise, such as V or Velocity, found Eps"):
        make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EDM(levels=Uniform()), "VE expects a distribution of noise levels sigma.*found Uniform"),
        (lambda: EDM(levels=Shifted(9, LogitNormal())), "VE expects .* found Shifted"),
        (lambda: Flow(levels=LogNormal()), r"Linear expects a distribution of places in \[0, 1\].*found LogNormal"),
        (lambda: DDPM(SqrtLinear(), levels=Shifted(9, LogNormal())), "DiscreteVP expects .* found Shifted"),
    ],
)
def test_noise_levels_of_another_path_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


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


def test_weighting_is_told_each_row_s_level():
    def by_noise(error, level):
        assert error.shape == level.snr.shape == level.snr_before.shape == level.x0_error_scale.shape == (8,)
        assert (level.snr_before > level.snr).all()
        torch.testing.assert_close(level.x0_error_scale, level.snr.rsqrt())  # of eps
        return error / (1 + level.snr)

    levels = []

    def net(x, noise_level, conditioning):
        levels.append(noise_level + 1)
        return torch.zeros_like(x)

    draws, x0 = Draws(0, range(8), 8), torch.randn(8, 2, 4, 4)
    plain, weighted = (DDPM(SqrtLinear(), weighting=w).loss(net, x0, NOTHING, draws) for w in (None, by_noise))
    torch.testing.assert_close(weighted, plain * DDPM(SqrtLinear()).sigma(levels[0]) ** 2)


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
    path = DiscreteVP.__new__(DiscreteVP)  # the grid needs no tables: 1200 of them would take long
    path.steps = levels
    grid = path.timesteps(steps)
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
        DDPM(SqrtLinear()).timesteps(steps)


def test_tables_are_no_state():
    objective = DDPM(SqrtLinear())
    objective.alpha(torch.tensor(3.0))
    assert not objective.state_dict()
    for twin in (copy.deepcopy(objective), pickle.loads(pickle.dumps(objective))):
        assert twin.alpha(torch.tensor(3.0)) == objective.alpha(torch.tensor(3.0))
    # A half-precision model keeps full-precision levels.
    assert objective.bfloat16().sigma(torch.tensor(1.0)).item() == pytest.approx(np.sqrt(0.0015), rel=1e-6)


OBJECTIVES = {
    "ddpm": DDPM(SqrtLinear()),
    "zero terminal": DDPM(ZeroTerminal(SqrtLinear()), V()),
    "edm": EDM(),
    "flow": Flow(),
    "gvp": Interpolant(GVP()),
    "gvp, eps": Interpolant(GVP(t_max=0.999), Eps()),
    "vp": Interpolant(VP()),
    "vp, x0": Interpolant(VP(), X0()),
}


@pytest.fixture(params=OBJECTIVES)
def objective(request):
    return OBJECTIVES[request.param]


def test_the_path_leads_from_data_to_noise(objective):
    t = torch.linspace(0, 1, 101) * objective.t_max
    ratio = objective.sigma(t) / objective.alpha(t)
    assert (objective.alpha(t[0]), objective.sigma(t[0])) == (1, 0)
    assert (ratio.diff() > 0).all()
    assert ratio[-1] > 10


def test_time_is_the_inverse_of_the_ratio(objective):
    ratio = torch.tensor([0.0, 0.05, 0.2, 1.0, 7.0])
    t = objective.time_at(ratio)
    torch.testing.assert_close(objective.sigma(t) / objective.alpha(t), ratio, rtol=1e-4, atol=1e-6)
    if isinstance(objective, EDM):  # its path has no end: sampling only begins at `last`
        assert objective.time_at(torch.tensor(1e9)) == 1e9
    else:
        assert objective.time_at(torch.tensor(1e9)) == pytest.approx(objective.t_max)
        assert objective.time_at(torch.tensor(torch.inf)) == objective.t_max


def test_loss_is_that_of_the_optimal_denoiser_s_error(objective):
    """For Gaussian data the best x0 is known, and so is its squared error: s^2 sigma^2 / (alpha^2 s^2 + sigma^2)."""
    spread, batch = 0.7, 4096
    draws = Draws(0, range(batch), batch)
    x0 = spread * torch.randn(batch, 1, 4, 4)
    seen = {}

    def best(x, told, conditioning):
        seen["x"], t = x, seen["t"]
        a, s = rowwise(objective.alpha(t), x), rowwise(objective.sigma(t), x)
        noisy = x / rowwise(objective.path.c_in(t), x)
        estimate = a * spread**2 / (a**2 * spread**2 + s**2) * noisy
        eps = (noisy - a * estimate) / s
        return objective.prediction.target(estimate, eps, a, s)

    t = seen["t"] = objective.path.to_time(objective.levels(draws.stratified("timestep")))
    losses = objective.loss(best, x0, NOTHING, draws)
    a, s = objective.alpha(t), objective.sigma(t)
    error = spread**2 * s**2 / (a**2 * spread**2 + s**2)
    expected = error / objective.prediction.x0_error_scale(a, s) ** 2
    assert losses.mean().item() == pytest.approx(expected.mean().item(), rel=0.05)
    assert torch.isfinite(losses).all()


def test_all_objectives_agree_on_the_same_denoiser():
    """Told alike, at the same ratio of noise to signal, they estimate the same data from the same picture."""
    x0, noise = torch.randn(6, 2, 3, 3), torch.randn(6, 2, 3, 3)
    estimate = x0 + 0.1 * torch.randn(6, 2, 3, 3)
    for objective in OBJECTIVES.values():
        t = objective.time_at(torch.tensor([0.01, 0.1, 0.5, 1.0, 3.0, 8.0]))
        a, s = rowwise(objective.alpha(t), x0), rowwise(objective.sigma(t), x0)
        x = a * x0 + s * noise
        output = objective.prediction.target(estimate, (x - a * estimate) / s, a, s)
        back = objective.denoise(lambda x, told, conditioning, output=output: output, x, t, NOTHING)
        torch.testing.assert_close(back, estimate, rtol=1e-3, atol=1e-3)


def test_flow_predicts_noise_minus_data_at_even_levels():
    draws, x0 = Draws(0, range(64), 64), torch.randn(64, 2, 4, 4)
    told = []

    def net(x, level, conditioning):
        told.append(level)
        return draws.normal("noise", (2, 4, 4)) - x0

    assert Flow().loss(net, x0, NOTHING, draws).abs().max() == 0
    places = (told[0] / 1000).sort().values
    assert (places.diff() - 1 / 64).abs().max() < 1e-5


def test_edm_scales_the_input_to_variance_one():
    x0, draws = torch.randn(512, 1, 8, 8), Draws(0, range(512), 512)
    seen = []

    def net(x, level, conditioning):
        seen.append((x, level))
        return torch.zeros_like(x)

    EDM().loss(net, x0, NOTHING, draws)
    x, level = seen[0]
    assert x.std(dim=(1, 2, 3)).mean().item() == pytest.approx(1, abs=0.02)
    # ln(sigma) / 4 on the scale of a thousand: the middle of the log-normal is told as 250 * -1.2.
    assert level.mean().item() == pytest.approx(-300, abs=10)


def test_levels_and_weighting_are_those_passed_in():
    draws, x0 = Draws(0, range(256), 256), torch.randn(256, 1, 2, 2)

    def levels_of(objective):
        told = []

        def net(x, level, conditioning):
            told.append(level)
            return torch.zeros_like(x)

        objective.loss(net, x0, NOTHING, draws)
        return told[0]

    assert levels_of(Flow(levels=LogitNormal())).std() < levels_of(Flow()).std()
    assert levels_of(DDPM(SqrtLinear(), levels=LogitNormal())).std() < levels_of(DDPM(SqrtLinear())).std()
    net = lambda x, level, conditioning: torch.zeros_like(x)  # noqa: E731
    plain, least = (Flow(weighting=weighting).loss(net, x0, NOTHING, draws) for weighting in (None, MinSNR()))
    assert (plain != least).any()
    assert [*EDM(weighting=Uncertainty(MinSNR())).parameters()]


def test_direction_counts_on_top():
    draws, x0 = Draws(0, range(8), 8), torch.randn(8, 4, 2, 2)
    target = draws.normal("noise", (4, 2, 2)) - x0

    def against(x, level, conditioning):
        return -target

    plain, with_direction = (Flow(direction_weight=w).loss(against, x0, NOTHING, draws) for w in (0.0, 0.5))
    torch.testing.assert_close(with_direction, plain + 0.5 * 2)  # the cosine is -1 everywhere


def test_a_direction_that_an_output_does_not_have_yet_has_no_endless_gradient():
    """Networks begin with zeros."""
    draws, x0 = Draws(0, range(8), 8), torch.randn(8, 4, 2, 2)
    output = torch.zeros(8, 4, 2, 2, requires_grad=True)
    losses = [Flow(direction_weight=w).loss(lambda *_: output, x0, NOTHING, draws).sum() for w in (0.0, 1.0)]
    torch.testing.assert_close(losses[1], losses[0] + 8)
    plain, with_direction = (torch.autograd.grad(loss, output)[0] for loss in losses)
    assert plain.norm() > 1
    assert (with_direction - plain).norm(dim=1).max() == pytest.approx(100 / 4)  # of the mean over 4 pixels


@pytest.mark.parametrize("weighting", [VLB(), Uncertainty(VLB()), Uncertainty(Uncertainty(PlainAndVLB(0.1)))])
def test_the_bound_needs_steps(weighting):
    with pytest.raises(ConfigError, match="variational bound"):
        EDM(weighting=weighting)


NAMED = {
    "ddpm": lambda **given: DDPM(SqrtLinear(), **given),
    "edm": EDM,
    "flow": Flow,
    "interpolant": lambda **given: Interpolant(VP(), **given),
}


@pytest.mark.parametrize("make", NAMED.values(), ids=NAMED)
def test_absolute_errors_are_those_of_loss_type_l1(make):
    """The mean over each picture of |output - target|; squared by default."""
    objective, draws, x0 = make(distance=Absolute()), Draws(0, range(8), 8), torch.randn(8, 2, 4, 4)
    t = objective.path.to_time(objective.levels(draws.stratified("timestep")))
    a, s = (rowwise(level(t), x0) for level in (objective.alpha, objective.sigma))
    target = objective.prediction.target(x0, draws.normal("noise", (2, 4, 4)), a, s)
    off = torch.linspace(-2, 2, 32).reshape(2, 4, 4)

    def net(x, told, conditioning):
        return target + off

    expected = off.abs().mean().expand(8)
    torch.testing.assert_close(objective.loss(net, x0, NOTHING, draws), expected, rtol=1e-3, atol=1e-3)
    squared = make().loss(net, x0, NOTHING, draws)
    torch.testing.assert_close(squared, off.square().mean().expand(8), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(make(distance=Squared()).loss(net, x0, NOTHING, draws), squared, rtol=0, atol=0)


@pytest.mark.parametrize("weighting", [MinSNR(), P2()], ids=lambda w: type(w).__name__)
def test_weightings_multiply_absolute_errors_by_the_same_factor(weighting):
    draws, x0 = Draws(0, range(8), 8), torch.randn(8, 2, 4, 4)

    def losses(weighting, distance):
        objective = DDPM(SqrtLinear(), weighting=weighting, distance=distance)
        return objective.loss(lambda x, told, conditioning: torch.zeros_like(x), x0, NOTHING, draws)

    factors = [losses(weighting, distance) / losses(Plain(), distance) for distance in (Squared(), Absolute())]
    torch.testing.assert_close(*factors)


def test_the_bound_is_of_squared_errors():
    with pytest.raises(ConfigError, match="variational bound requires squared errors, found Absolute"):
        DDPM(SqrtLinear(), weighting=VLB(), distance=Absolute())


@pytest.mark.parametrize(("name", "good"), [("Absolute", True), ("Squared", True), ("Plain", False), ("MinSNR", False)])
def test_a_configuration_cannot_give_a_weighting_as_a_distance(name, good):
    """It would be called without complaint, and train on the output's own mean."""
    sit = Path(__file__).parents[2] / "configs" / "diffusion" / "sit_xl2_imagenet256.yaml"
    distance = f"model.params.objective.params.distance={{target: ldm.diffusion.weightings.{name}}}"
    config = load([sit], ["data.params.autoencoder=logs/none", distance])
    facts = {"channels": 4, "resolution": 32, "num_classes": 1000, "batch_size": 8, "num_items": 100}
    if good:
        config.check(facts)
    else:
        with pytest.raises(ConfigError, match=r"distance \(.*expected Distance"):
            config.check(facts)
