"""Each objective teaches a small network a distribution in the plane; the samples' distance from the data is stated."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ldm.diffusion.conditioners.base import Conditioning
from ldm.diffusion.noise_levels import LogitNormal
from ldm.diffusion.noise_schedules import Cosine, SqrtLinear, ZeroTerminal
from ldm.diffusion.objectives import DDPM, EDM, Flow, Interpolant
from ldm.diffusion.paths import GVP, VP
from ldm.diffusion.predictions import X0, Eps, V
from ldm.diffusion.weightings import Absolute, MinSNR, Plain, Uncertainty
from ldm.layers import timestep_embedding
from ldm.randomness import Draws
from ldm.sampling.samplers import dpmpp_2m
from ldm.sampling.steps import start
from ldm.sampling.timesteps import karras

OBJECTIVES = {
    "ddpm, eps": lambda: DDPM(SqrtLinear()),
    "ddpm, x0, min-SNR": lambda: DDPM(Cosine(), X0(), MinSNR()),
    "ddpm, v, zero-terminal": lambda: DDPM(ZeroTerminal(SqrtLinear()), V()),
    "edm": EDM,
    "edm, uncertainty": lambda: EDM(weighting=Uncertainty(Plain())),
    "flow": Flow,
    "flow, logit-normal": lambda: Flow(levels=LogitNormal()),
    "ddpm, absolute error": lambda: DDPM(SqrtLinear(), distance=Absolute()),
    "gvp": lambda: Interpolant(GVP()),
    "gvp, x0, min-SNR": lambda: Interpolant(GVP(), X0(), MinSNR()),
    "vp": lambda: Interpolant(VP()),
    "vp, eps": lambda: Interpolant(VP(), Eps()),
}
BATCH, STEPS, SAMPLES = 512, 1200, 4000


class Net(nn.Module):
    """Four layers over sines of the place; the noise level, told by sinusoids, scales and shifts the first two."""

    def __init__(self) -> None:
        super().__init__()
        self.place = nn.Linear(2 + 12, 128)
        self.middle = nn.ModuleList([nn.Linear(128, 128), nn.Linear(128, 128)])
        self.told = nn.ModuleList([nn.Linear(32, 256), nn.Linear(32, 256)])
        self.out = nn.Linear(128, 2)

    def forward(self, x, noise_level, conditioning):
        place, level = x.flatten(1), timestep_embedding(noise_level, 32)  # (N, 2), (N, 32)
        waves = torch.cat([place * 2**k for k in range(3)], dim=1)  # (N, 6)
        h = self.place(torch.cat([place, waves.sin(), waves.cos()], dim=1))  # (N, 128)
        for layer, told in zip(self.middle, self.told, strict=True):
            scale, shift = told(level).chunk(2, dim=1)  # 2 x (N, 128)
            h = layer(F.silu(h * (1 + scale) + shift))  # (N, 128)
        return self.out(F.silu(h)).reshape(x.shape)  # (N, 2, 1, 1)


def ring(number, generator):
    """Eight bumps on a circle, zero mean and unit variance in each direction: (number, 2, 1, 1)."""
    angle = torch.randint(0, 8, (number,), generator=generator) * (math.pi / 4)
    centres = math.sqrt(2) * torch.stack([angle.cos(), angle.sin()], dim=1)
    return (centres + 0.1 * torch.randn(number, 2, generator=generator))[:, :, None, None]


def distance(a, b):
    """Sliced Wasserstein distance of order 1 between equally many points in the plane, over 32 directions."""
    angles = torch.arange(32) * (math.pi / 32)
    directions = torch.stack([angles.cos(), angles.sin()])  # (2, 32)
    projected = [(points.flatten(1) @ directions).sort(dim=0).values for points in (a, b)]
    return (projected[0] - projected[1]).abs().mean().item()


def trained(objective, net):
    optimizer = torch.optim.Adam([*net.parameters(), *objective.parameters()], lr=2e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, STEPS)
    data = torch.Generator().manual_seed(1)
    for step in range(STEPS):
        draws = Draws(0, range(step * BATCH, (step + 1) * BATCH), BATCH)
        objective.loss(net, ring(BATCH, data), Conditioning(), draws).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


@pytest.mark.slow
@pytest.mark.parametrize("name", OBJECTIVES)
def test_samples_lie_where_the_data_lies(name):
    torch.manual_seed(0)
    objective, net = OBJECTIVES[name](), Net()
    trained(objective, net)
    generator = torch.Generator().manual_seed(2)
    noise, times = torch.randn(SAMPLES, 2, 1, 1, generator=generator), karras(objective, 40, (2, 1, 1))
    with torch.no_grad():
        x = start(objective, noise, times[0])
        samples = dpmpp_2m(lambda x, t: objective.denoise(net, x, t, Conditioning()), objective, x, times)
    data = ring(SAMPLES, generator)
    # Two draws of the data are 0.02 to 0.03 apart, a ring without bumps 0.08, a Gaussian of its variance 0.25.
    assert distance(samples, data) < 0.1
    nearest = torch.cdist(samples.flatten(1), math.sqrt(2) * unit_circle()).min(dim=1).values
    assert (nearest < 0.35).float().mean() > 0.9  # on a ring without bumps 0.64 are
    counts = torch.cdist(samples.flatten(1), unit_circle()).argmin(dim=1).bincount(minlength=8) / SAMPLES
    assert bool(((counts > 0.08) & (counts < 0.17)).all())


def unit_circle():
    angles = torch.arange(8) * (math.pi / 4)
    return torch.stack([angles.cos(), angles.sin()], dim=1)


def test_the_distance_tells_a_ring_from_its_bumps():
    generator = torch.Generator().manual_seed(3)
    data, again = ring(SAMPLES, generator), ring(SAMPLES, generator)
    turn = torch.rand(SAMPLES, generator=generator) * 2 * math.pi
    smooth = math.sqrt(2) * torch.stack([turn.cos(), turn.sin()], dim=1)
    assert distance(data, again) < 0.04
    assert distance(data, torch.randn(SAMPLES, 2, generator=generator)) > 0.15
    assert (torch.cdist(smooth, math.sqrt(2) * unit_circle()).min(dim=1).values < 0.35).float().mean() < 0.75
