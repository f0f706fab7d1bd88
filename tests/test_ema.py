"""The running average against its closed form, its warm-up, and what it must not confuse."""

import pytest
import torch
from torch import nn

from ldm.ema import EMA, Decay, HalfLife


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


@pytest.mark.parametrize("profile", [HalfLife(10_000), Decay(0.9999)])
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
    profile = Decay(0.999)
    assert profile(0, 8) == pytest.approx(1 / 10)
    assert profile(8 * 90, 8) == pytest.approx(91 / 100)
    assert profile(8 * 10**6, 8) == 0.999


def test_small_updates_are_not_lost_to_half_precision():
    net = model(1.0).bfloat16()
    ema = EMA(net, Decay(0.9999))
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
