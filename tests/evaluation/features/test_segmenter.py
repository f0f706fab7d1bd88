import pytest
import torch

from ldm.evaluation.features.classifier import UNLABELED, unit_range
from ldm.evaluation.features.segmenter import Segmenter, restored, train_segmenter


def squares(number, seed, side=16):
    """Noisy pictures with a brighter and a darker square, and their maps."""
    generator = torch.Generator().manual_seed(seed)
    maps = torch.zeros(number, side, side, dtype=torch.int16)
    for one in maps:
        top, left = torch.randint(side // 2, (2,), generator=generator).tolist()
        one[top : top + side // 2, left : left + side // 2] = 1
        one[: side // 4, : side // 4] = 2
    light = torch.tensor([100, 200, 0])[maps.long()] + torch.randint(55, maps.shape, generator=generator)
    return light[:, None].to(torch.uint8), maps


def trained(**changes):
    settings = {"epochs": 12, "batch_size": 16, "width": 16, "learning_rate": 1e-2} | changes
    return train_segmenter(*squares(160, seed=0), 3, **settings)


@pytest.fixture(scope="module")
def model():
    return trained()


def test_a_segmenter_learns_what_it_is_shown(model):
    images, maps = squares(50, seed=1)
    assert (model(unit_range(images)).argmax(1) == maps).float().mean() > 0.95


def test_training_is_a_function_of_its_arguments(model):
    torch.manual_seed(99)
    before = torch.get_rng_state()
    again = trained()
    assert torch.equal(torch.get_rng_state(), before)
    for ours, theirs in zip(model.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)


def test_unlabeled_pixels_count_for_nothing():
    images, maps = squares(16, seed=0)
    maps[:, 8:] = UNLABELED
    maps[:8] = UNLABELED  # a whole batch may have few that are not
    ours = train_segmenter(images, maps, 3, epochs=1, batch_size=16, width=4)
    assert all(torch.isfinite(one).all() for one in ours.state_dict().values())


@pytest.mark.parametrize("size", [(16, 16), (13, 30), (8, 9), (1, 3)])
def test_pictures_of_any_size(model, size):
    assert model(torch.zeros(2, 1, *size)).shape == (2, 3, *size)


def test_it_is_restored_from_its_tensors():
    model = Segmenter(3, 7, 4).eval()
    again = restored(model.state_dict()).eval()
    images = torch.randn(2, 3, 16, 16)
    assert (again.channels, again.num_classes) == (3, 7)
    assert torch.equal(again(images), model(images))
