"""Guidance against its formulas, and what it costs."""

from itertools import pairwise

import pytest
import torch

from ldm.diffusion.conditioners.base import Conditioning
from ldm.diffusion.noise_schedules import SqrtLinear
from ldm.diffusion.objectives import DDPM, EDM, Flow
from ldm.randomness import Draws
from ldm.sampling.guidance import autoguidance, classifier, classifier_free, limited_interval
from ldm.sampling.img2img import inpaint
from ldm.sampling.samplers import ancestral, ddim, dpmpp_2m, heun, unipc
from ldm.sampling.steps import start
from ldm.sampling.timesteps import shifted


class Counted:
    """denoise(x, t, c) = 0.5 x + c, counting calls and their rows."""

    def __init__(self):
        self.rows = []

    def __call__(self, x, t, conditioning):
        self.rows.append(len(x))
        assert t.shape == ()
        assert len(conditioning.vector) == len(x)
        return 0.5 * x + conditioning.vector[:, :, None, None]


told, untold = Conditioning(vector=torch.tensor([[1.0, 2.0], [3.0, 4.0]])), Conditioning(vector=torch.zeros(2, 2))
x = torch.randn(2, 2, 3, 3)


def test_formula_in_one_call_on_all_channels():
    denoise = Counted()
    guided = classifier_free(denoise, told, untold, 2.5)(x, torch.tensor(5.0))
    torch.testing.assert_close(guided, 0.5 * x + 2.5 * told.vector[:, :, None, None])
    assert denoise.rows == [4]


def test_scale_one_is_the_identity_at_no_cost():
    denoise = Counted()
    guided = classifier_free(denoise, told, untold, 1.0)(x, torch.tensor(5.0))
    assert torch.equal(guided, 0.5 * x + told.vector[:, :, None, None])
    assert denoise.rows == [2]


def test_scale_zero_is_unconditional():
    torch.testing.assert_close(classifier_free(Counted(), told, untold, 0.0)(x, torch.tensor(5.0)), 0.5 * x)


def test_rescaling_gives_back_the_spread():
    plain = classifier_free(Counted(), told, untold, 1.0)(x, torch.tensor(5.0))
    burnt = classifier_free(Counted(), told, untold, 7.0)(x, torch.tensor(5.0))
    mended = classifier_free(Counted(), told, untold, 7.0, rescale=1.0)(x, torch.tensor(5.0))
    torch.testing.assert_close(mended.flatten(1).std(1), plain.flatten(1).std(1))
    half = classifier_free(Counted(), told, untold, 7.0, rescale=0.5)(x, torch.tensor(5.0))
    torch.testing.assert_close(half, (burnt + mended) / 2)


def test_autoguidance_leads_away_from_the_worse():
    good, bad = (lambda x, t: 0.5 * x), (lambda x, t: 0.3 * x)
    torch.testing.assert_close(autoguidance(good, bad, 2.0)(x, torch.tensor(5.0)), 0.7 * x)
    torch.testing.assert_close(autoguidance(good, bad, 1.0)(x, torch.tensor(5.0)), 0.5 * x)


@pytest.mark.parametrize("channels", [1, 2, None])
def test_the_first_channels_alone(channels):
    """Every way of guidance: the first channels as with all of them, the others as with none."""
    t, sevens = torch.tensor(0.5), Conditioning(vector=torch.full((2, 2), 7.0))
    flow = Flow()
    ways = {
        "classifier-free": lambda n: classifier_free(Counted(), told, sevens, 2.5, channels=n),
        "autoguidance": lambda n: autoguidance(lambda x, t: 0.5 * x, lambda x, t: 0.3 * x, 2.0, n),
        "classifier": lambda n: classifier(lambda x, t: 0.5 * x, flow, lambda x, t: x.square().sum((1, 2, 3)), 2.0, n),
    }
    plain = {"classifier-free": classifier_free(Counted(), told, sevens, 1.0)(x, t)}
    for name, way in ways.items():
        whole, without, found = way(None)(x, t), plain.get(name, 0.5 * x), way(channels)(x, t)
        assert found.shape == x.shape
        assert torch.equal(found[:, :channels], whole[:, :channels])
        if channels is not None:
            assert torch.equal(found[:, channels:], without[:, channels:])
        assert not torch.isclose(whole, without).any()
        assert torch.equal(way(2)(x, t), whole)  # there are two


def test_the_spread_given_back_is_of_the_guided_channels():
    plain = classifier_free(Counted(), told, untold, 1.0)(x, torch.tensor(5.0))
    mended = classifier_free(Counted(), told, untold, 7.0, rescale=1.0, channels=1)(x, torch.tensor(5.0))
    torch.testing.assert_close(mended[:, :1].flatten(1).std(1), plain[:, :1].flatten(1).std(1))
    assert torch.equal(mended[:, 1:], plain[:, 1:])


@pytest.mark.parametrize(("scale", "begin", "ratio"), [(10.0, 0.1, 9.0), (6.7, 0.125, 7.0), (10.0, 0.11, 8.0909)])
def test_samples_as_lightningdit(scale, begin, ratio):
    """Their loop in their units, t = 1 data, against ours by what the configuration's header says."""
    points, wanted = 250, torch.linspace(-1, 1, 6)[None, :, None, None]

    def velocity(x, t, known):  # any function of a place, a time and whether the class is known
        return known * (wanted - x) * (0.5 + t) + torch.sin(x + 2 * t)

    times = torch.linspace(0, 1, points, dtype=torch.float64)
    times = 0.3 * times / (1 + (0.3 - 1) * times)
    noise = torch.randn(2, 6, 2, 2)
    theirs, guided = noise.double(), 0
    for t, s in pairwise(times):
        v = velocity(theirs, t, 1.0)
        if t >= begin:
            guided += 1
            without = velocity(theirs, t, 0.0)
            v[:, :3] = without[:, :3] + scale * (v[:, :3] - without[:, :3])
        theirs = theirs + (s - t) * v

    objective, led = Flow(), []

    def denoise(x, t, conditioning):  # our velocity is minus theirs: x0 = x - t v
        if conditioning.vector.shape[0] == 4:
            led.append(float(t))
        return x + t * velocity(x, 1 - t, conditioning.vector[:, :1, None, None])

    known, unknown = Conditioning(vector=torch.ones(2, 1)), Conditioning(vector=torch.zeros(2, 1))
    plain, steered = (
        classifier_free(denoise, known, unknown, value, channels=3 if value > 1 else None) for value in (1.0, scale)
    )
    grid = shifted(objective, points - 1, (4, 2, 2), 3.3333333)
    torch.testing.assert_close(1 - grid.double(), times, rtol=0, atol=1e-6)
    ours = ddim(limited_interval(steered, plain, objective, (0.0, ratio)), objective, noise, grid)
    assert len(led) == guided
    assert ((ours - theirs).norm() / theirs.norm()).item() < 1e-5


def test_interval():
    objective = EDM()
    chosen = limited_interval(lambda x, t: 2 * x, lambda x, t: x, objective, (0.5, 5.0))
    for sigma, factor in ((0.1, 1), (0.5, 1), (0.6, 2), (5.0, 2), (5.1, 1), (80.0, 1)):
        assert torch.equal(chosen(x, torch.tensor(sigma)), factor * x)


@pytest.mark.parametrize("objective", [DDPM(SqrtLinear()), EDM(), Flow()], ids=lambda o: type(o).__name__)
def test_a_classifier_leads_to_the_conditional_distribution(objective):
    """Two Gaussians of width s at +-1: with p(class | x_t) in closed form, guided samples come from the class alone."""
    spread, number = 0.4, 3000

    def of_class(x, t, centre):
        a, s = objective.alpha(t), objective.sigma(t)
        return -((x - a * centre) ** 2) / (2 * (a**2 * spread**2 + s**2))

    def log_probability(x, t):
        both = torch.stack([of_class(x, t, centre) for centre in (1.0, -1.0)])
        return both.log_softmax(0)[0].sum(1)

    def denoise(x, t):
        a, s = objective.alpha(t), objective.sigma(t)
        share = torch.stack([of_class(x, t, centre) for centre in (1.0, -1.0)]).softmax(0)
        slope = spread**2 * a / (a**2 * spread**2 + s**2)
        return sum(p * (c + slope * (x - a * c)) for p, c in zip(share, (1.0, -1.0), strict=True))

    times = objective.timesteps(100)
    noise = torch.randn(number, 1, generator=torch.Generator().manual_seed(0))
    guided = classifier(denoise, objective, log_probability, 1.0)
    x0 = heun(guided, objective, start(objective, noise, times[0]), times)
    assert x0.mean().item() == pytest.approx(1.0, abs=0.05)
    assert x0.std().item() == pytest.approx(spread, rel=0.1)


@pytest.mark.parametrize("sampler", [ddim, ancestral, heun, dpmpp_2m, unipc], ids=lambda s: s.__name__)
@pytest.mark.parametrize("objective", [DDPM(SqrtLinear()), EDM(), Flow()], ids=lambda o: type(o).__name__)
def test_inpainting_keeps_what_is_known_and_carries_it_on(sampler, objective):
    """Pairs of equal numbers: what is known of one half is true of the other."""
    known = torch.tensor([[0.8, 0.0], [-1.2, 0.0]])
    mask = torch.tensor([[True, False], [True, False]])

    def denoise(x, t):
        a, s = objective.alpha(t), objective.sigma(t)
        return (2 * a / (2 * a**2 + s**2) * x.mean(1, keepdim=True)).expand_as(x)  # both halves are one N(0, 1)

    draws, times = Draws(0, [1, 2], 2), objective.timesteps(100)
    x = start(objective, draws.normal("noise", (2,)), times[0])
    x0 = sampler(inpaint(denoise, known, mask), objective, x, times, draws=draws)
    assert torch.equal(x0[mask], known[mask])
    assert torch.isfinite(x0).all()


def test_an_image_comes_back_from_little_noise():
    """Image to image: with a weak start the sampler stays near where it began."""
    objective = Flow()
    image, times = torch.randn(4, 3), objective.timesteps(20)[-5:]  # a fifth of the way
    draws = Draws(0, range(4), 4)

    def denoise(x, t):
        a, s = objective.alpha(t), objective.sigma(t)
        return a / (a**2 + s**2) * x

    x0 = ddim(denoise, objective, start(objective, draws.normal("noise", (3,)), times[0], image), times)
    assert (x0 - image).abs().mean() < 0.3
