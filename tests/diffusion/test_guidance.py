"""Guidance against its formulas, and what it costs."""

import pytest
import torch

from ldm.diffusion.conditioning import Conditioning
from ldm.diffusion.grids import Default
from ldm.diffusion.guidance import autoguidance, classifier, classifier_free, inpaint, within
from ldm.diffusion.noise_schedules import SqrtLinear
from ldm.diffusion.objectives import DDPM, EDM, Flow
from ldm.diffusion.samplers import ancestral, ddim, dpm_solver, heun, start, unipc
from ldm.randomness import Draws


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


def test_interval():
    objective = EDM()
    chosen = within(lambda x, t: 2 * x, lambda x, t: x, objective, above=0.5, up_to=5.0)
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

    times = Default()(objective, 100)
    noise = torch.randn(number, 1, generator=torch.Generator().manual_seed(0))
    guided = classifier(denoise, objective, log_probability, 1.0)
    x0 = heun(guided, objective, start(objective, noise, times[0]), times)
    assert x0.mean().item() == pytest.approx(1.0, abs=0.05)
    assert x0.std().item() == pytest.approx(spread, rel=0.1)


@pytest.mark.parametrize("sampler", [ddim, ancestral, heun, dpm_solver, unipc], ids=lambda s: s.__name__)
@pytest.mark.parametrize("objective", [DDPM(SqrtLinear()), EDM(), Flow()], ids=lambda o: type(o).__name__)
def test_inpainting_keeps_what_is_known_and_carries_it_on(sampler, objective):
    """Pairs of equal numbers: what is known of one half is true of the other."""
    known = torch.tensor([[0.8, 0.0], [-1.2, 0.0]])
    mask = torch.tensor([[True, False], [True, False]])

    def denoise(x, t):
        a, s = objective.alpha(t), objective.sigma(t)
        return (2 * a / (2 * a**2 + s**2) * x.mean(1, keepdim=True)).expand_as(x)  # both halves are one N(0, 1)

    draws, times = Draws(0, [1, 2], 2), objective.grid(100)
    x = start(objective, draws.normal("noise", (2,)), times[0])
    x0 = sampler(inpaint(denoise, known, mask), objective, x, times, draws=draws)
    assert torch.equal(x0[mask], known[mask])
    assert torch.isfinite(x0).all()


def test_an_image_comes_back_from_little_noise():
    """Image to image: with a weak start the sampler stays near where it began."""
    objective = Flow()
    image, times = torch.randn(4, 3), objective.grid(20)[-5:]  # a fifth of the way
    draws = Draws(0, range(4), 4)

    def denoise(x, t):
        a, s = objective.alpha(t), objective.sigma(t)
        return a / (a**2 + s**2) * x

    x0 = ddim(denoise, objective, start(objective, draws.normal("noise", (3,)), times[0], image), times)
    assert (x0 - image).abs().mean() < 0.3
