"""The running average against its closed form, its warm-up, and what it must not confuse."""

import numpy as np
import pytest
import torch
from torch import nn

from ldm.errors import ConfigError
from ldm.optim.ema import EMA, FixedDecay, HalfLife, PowerFunction, mixture, power_exponent


class Steady:
    """No warm-up: half and half."""

    def __call__(self, images_seen, images):
        return 0.5


def model(value=0.0):
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    for parameter in net.parameters():
        nn.init.constant_(parameter, value)
    return net


def set_to(net, value):
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.fill_(value)


def average(ema):
    return ema.average[0].weight[0, 0].item()


def test_closed_form():
    net = model(1.0)
    ema = EMA(net, Steady())
    for value in (2.0, 4.0, 8.0):
        set_to(net, value)
        ema.update(net, images=10)
    # 1/8 of the start, then 1/8, 1/4 and 1/2 of what came.
    assert average(ema) == pytest.approx(1 / 8 + 2 / 8 + 4 / 4 + 8 / 2)
    assert ema.images_seen == 30


@pytest.mark.parametrize("profile", [HalfLife(10_000), FixedDecay(0.9999)])
def test_the_start_is_forgotten_at_once(profile):
    net = model(1000.0)  # a start that would be seen
    ema = EMA(net, profile)
    for _ in range(30):
        set_to(net, 1.0)
        ema.update(net, images=8)
    assert average(ema) == pytest.approx(1.0, abs=0.02)


def test_half_life_is_counted_in_images():
    for images in (1, 8, 64):
        net = model(1.0)
        ema = EMA(net, HalfLife(64, ramp=0.05))
        ema.images_seen = 10**6  # long after the warm-up
        set_to(net, 0.0)
        for _ in range(64 // images):
            ema.update(net, images)
        assert average(ema) == pytest.approx(0.5, rel=1e-4)


def test_warm_up_of_the_half_life():
    profile = HalfLife(1000, ramp=0.05)
    assert profile(0, 8) == 0
    assert profile(2000, 100) == pytest.approx(0.5)  # half-life 100 images
    assert profile(10**9, 1000) == pytest.approx(0.5)


def test_classic_decay_and_its_warm_up():
    profile = FixedDecay(0.999)
    assert profile(0, 8) == pytest.approx(2 / 11)
    assert profile(8 * 89, 8) == pytest.approx(91 / 100)  # the 90th update
    assert profile(8 * 10**6, 8) == 0.999


@pytest.mark.parametrize("decay", [0.9999, 0.5])
def test_classic_decay_is_latent_diffusion_s(decay):
    """Its LitEma counts an update before it asks for that update's decay."""
    net = model(1.0)
    ema, expected = EMA(net, FixedDecay(decay)), 1.0
    for updates in range(1, 61):
        value = float(updates % 7)
        set_to(net, value)
        ema.update(net, images=8)
        expected -= (1 - min(decay, (1 + updates) / (10 + updates))) * (expected - value)
        assert average(ema) == pytest.approx(expected, rel=1e-5)


def test_small_updates_are_not_lost_to_half_precision():
    net = model(1.0).bfloat16()
    ema = EMA(net, FixedDecay(0.9999))
    ema.images_seen = 10**9
    set_to(net, 2.0)
    for _ in range(100):
        ema.update(net, images=1)
    # In bf16 an addition of 1e-4 to 1 would vanish.
    assert average(ema) == pytest.approx(2 - 0.9999**100, rel=1e-4)
    assert {p.dtype for p in ema.average.parameters()} == {torch.float32}


def test_buffers_are_copied():
    net = model(1.0)
    ema = EMA(net, Steady())
    net(torch.randn(16, 2) + 5)
    ema.update(net, images=1)
    torch.testing.assert_close(ema.average[1].running_mean, net[1].running_mean)
    assert ema.average[1].num_batches_tracked == 1


def test_is_never_trained():
    outer = nn.ModuleDict({"ema": EMA(model(), Steady())})
    outer.train()
    assert not outer["ema"].average.training
    assert not any(parameter.requires_grad for parameter in outer.parameters())


def test_state_comes_back_whole(tmp_path):
    net = model(1.0)
    ema = EMA(net, HalfLife(100))
    for value in (2.0, 5.0):
        set_to(net, value)
        ema.update(net, images=8)
    torch.save(ema.state_dict(), tmp_path / "ema.pt")
    twin = EMA(model(), HalfLife(100))
    twin.load_state_dict(torch.load(tmp_path / "ema.pt", weights_only=True))
    assert twin.images_seen == 16
    for _ in range(3):
        ema.update(net, images=8)
        twin.update(net, images=8)
    for ours, theirs in zip(ema.state_dict().values(), twin.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs


def test_average_does_not_share_memory_with_the_model():
    net = model(1.0)
    ema = EMA(net, Steady())
    set_to(net, 9.0)
    assert average(ema) == 1.0


def test_update_never_reads_the_device():
    with torch.device("meta"):
        net = model()
        ema = EMA(net, HalfLife(10))
        ema.update(net, images=4)
    assert ema.images_seen == 4


@pytest.mark.parametrize("width", [0.01, 0.05, 0.1, 0.25])
def test_power_function_has_the_width_asked_for(width):
    """The shares of the weights at all times, as the updates leave them: their mean and standard deviation."""
    profile, steps = PowerFunction(width), 4000
    shares = np.zeros(steps)
    for step in range(steps):
        keep = profile(step * 32, 32)
        shares *= keep
        shares[step] = 1 - keep
    times = (np.arange(steps) + 0.5) / steps
    mean = (shares * times).sum()
    assert shares.sum() == pytest.approx(1)
    assert np.sqrt((shares * (times - mean) ** 2).sum()) == pytest.approx(width, rel=0.01)


@pytest.mark.parametrize("width", [0.0, 0.29, -1.0])
def test_widths_that_no_power_function_has(width):
    with pytest.raises(ConfigError, match="std"):
        power_exponent(width)


def test_two_averages_are_those_of_two():
    net = model(1.0)
    both, first, second = (
        EMA(net, PowerFunction(0.05), [PowerFunction(0.1)]),
        EMA(net, PowerFunction(0.05)),
        EMA(net, PowerFunction(0.1)),
    )
    for value in (2.0, 4.0, 8.0):
        set_to(net, value)
        for ema in (both, first, second):
            ema.update(net, images=10)
    assert average(both) == average(first)
    assert both.extra[0][0].weight[0, 0] == average(second)
    again = EMA(model(), PowerFunction(0.05), [PowerFunction(0.1)])
    again.load_state_dict(both.state_dict())
    assert again.extra[0][0].weight[0, 0] == average(second)


@pytest.mark.parametrize("width", [0.04, 0.075, 0.12, 0.2])
@pytest.mark.parametrize("at", [1.0, 0.75])
def test_any_width_afterwards(width, at):
    """Against the average kept all along, of weights that drift and shake."""
    rng, steps = np.random.default_rng(0), 1600
    weights = np.cumsum(rng.normal(size=(steps, 20)) * 0.03, 0) + rng.normal(size=(steps, 20)) * 0.3
    profiles = [PowerFunction(0.05), PowerFunction(0.1)]
    wanted = PowerFunction(width)
    averages, direct = [np.zeros(20), np.zeros(20)], np.zeros(20)
    snapshots, times, exponents = [], [], []
    for step in range(int(at * steps)):
        images = step * 8
        keep = wanted(images, 8)
        direct = keep * direct + (1 - keep) * weights[step]
        for i, profile in enumerate(profiles):
            keep = profile(images, 8)
            averages[i] = keep * averages[i] + (1 - keep) * weights[step]
        if (step + 1) % 50 == 0:
            snapshots += [average.copy() for average in averages]
            times += [images + 8] * 2
            exponents += [profile.exponent for profile in profiles]
    shares = mixture(times, exponents, times[-1], wanted.exponent)
    made = (shares[:, None] * np.stack(snapshots)).sum(0)
    assert shares.sum() == pytest.approx(1, abs=0.02)
    assert np.abs(made - direct).max() < 0.02 * weights.std()


def test_a_snapshot_of_the_width_asked_for_is_taken_as_it_is():
    exponents = [power_exponent(0.05), power_exponent(0.1)] * 2
    shares = mixture([500, 500, 1000, 1000], exponents, 1000, power_exponent(0.1))
    np.testing.assert_allclose(shares, [0, 0, 0, 1], atol=1e-6)
