"""rFD in validation: the Fréchet distance of all reconstructions to all originals, however they are cut and shared."""

from types import SimpleNamespace

import pytest
import torch

from ldm.evaluation import reconstruction
from ldm.evaluation.distances.frechet import frechet_distance
from ldm.evaluation.moments import Moments
from ldm.evaluation.reconstruction import ReconstructionDistance
from ldm.images import to_uint8
from tests.evaluation.spaces import Projection


@pytest.fixture(autouse=True)
def projection(monkeypatch):
    monkeypatch.setattr(reconstruction, "choose", lambda name, *, weights: Projection(width=4))


def pictures(seed: int) -> torch.Tensor:
    return torch.rand(30, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) * 2.4 - 1.2


def shown(metric: ReconstructionDistance, originals: torch.Tensor, decoded: torch.Tensor) -> float:
    metric.update({"image": originals}, SimpleNamespace(reconstruction=decoded))
    return 0.0


@pytest.mark.parametrize("batch", [30, 7, 1])
def test_it_is_the_distance_of_the_pictures_as_they_are_shown(batch):
    originals, decoded = pictures(0).clamp(-1, 1), pictures(1)
    metric = ReconstructionDistance()
    for start in range(0, 30, batch):
        shown(metric, originals[start : start + batch], decoded[start : start + batch])
    space = Projection(width=4)
    one, other = (Moments.of(space(to_uint8(images))[:, :4]) for images in (originals, decoded))
    assert metric.compute().item() == pytest.approx(frechet_distance(one, other), rel=1e-9)


def test_equal_pictures_are_at_no_distance_and_a_reset_forgets():
    metric = ReconstructionDistance()
    shown(metric, pictures(0), pictures(1))
    metric.reset()
    shown(metric, pictures(2), pictures(2))
    assert metric.compute().item() == pytest.approx(0, abs=1e-9)


def test_two_ranks_see_what_one_sees(grouped):
    originals, decoded = pictures(0), pictures(1)

    def work(rank: int) -> float:
        metric = ReconstructionDistance()
        shown(metric, originals[rank::2], decoded[rank::2])
        return metric.compute().item()

    alone = ReconstructionDistance()
    shown(alone, originals, decoded)
    assert grouped(2, work) == pytest.approx([alone.compute().item()] * 2, rel=1e-9)
