"""Our LPIPS against that of torchmetrics on the same random trunk."""

import pytest
import torch
from torch import nn
from torchmetrics.functional.image import lpips
from torchvision.models import vgg16

from ldm.autoencoder.lpips import LPIPS, TRUNK_FILE
from ldm.errors import CheckpointError, ConfigError


@pytest.fixture(scope="module")
def ours() -> LPIPS:
    return LPIPS(pretrained=False)


@pytest.fixture(scope="module")
def images() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    a = torch.rand(3, 3, 32, 48, generator=generator) * 2 - 1
    return a, (a + 0.3 * torch.randn(a.shape, generator=generator)).clamp(-1, 1)


def vgg16_state() -> dict[str, torch.Tensor]:
    """The shape of torchvision's file, without the 120 million numbers of the classifier."""
    with torch.device("meta"):
        features = vgg16(weights=None).features
    features = features.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(1)
    return {
        f"features.{name}": torch.randn(value.shape, generator=generator) * 0.02
        for name, value in features.state_dict().items()
    }


def test_parity_with_torchmetrics(ours, images):
    theirs = lpips._LPIPS(net="vgg", pnet_rand=True)
    layers = [layer for stage in ours.stages for layer in stage if isinstance(layer, nn.Conv2d)]
    reference = [layer for layer in theirs.net.modules() if isinstance(layer, nn.Conv2d)]
    for mine, other in zip(layers, reference, strict=True):
        other.load_state_dict(mine.state_dict())
    a, b = images
    expected = theirs(a, b).flatten().detach()
    assert (expected > 0.01).all()
    torch.testing.assert_close(ours(a, b), expected, atol=1e-6, rtol=1e-5)


def test_gradient_is_finite_where_features_vanish(ours):
    # A stage that outputs zero everywhere: the root of a sum of squares would have the gradient 0/0 there.
    dead = LPIPS(pretrained=False)
    nn.init.constant_(dead.stages[4][-2].bias, -1e3)
    a = torch.rand(1, 3, 16, 16, requires_grad=True)
    dead(a, torch.rand(1, 3, 16, 16)).sum().backward()
    assert a.grad.isfinite().all()
    assert a.grad.abs().sum() > 0


def test_is_a_distance_per_image(ours, images):
    a, b = images
    torch.testing.assert_close(ours(a, a), torch.zeros(3))
    torch.testing.assert_close(ours(a, b), ours(b, a))
    torch.testing.assert_close(ours(a, b)[1:2], ours(a[1:2], b[1:2]))


@pytest.mark.parametrize("size", [(15, 32), (32, 8)])
def test_pictures_that_cannot_be_halved_four_times_are_refused(ours, size):
    images = torch.zeros(2, 3, *size)
    with pytest.raises(ConfigError, match=f"16 pixels or more on each side, found {size[0]} x {size[1]}"):
        ours(images, images)
    images = torch.zeros(2, 3, 16, 16)
    assert ours(images, images).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("channels", [2, 4])
def test_pictures_that_are_neither_gray_nor_color_are_refused(ours, channels):
    images = torch.zeros(2, channels, 16, 24)
    with pytest.raises(ConfigError, match=rf"1 or 3 channels .*found {channels}: leave it out"):
        ours(images, images)


def test_grey_images_are_repeated(ours, images):
    a, b = (image[:, :1] for image in images)
    torch.testing.assert_close(ours(a, b), ours(a.repeat(1, 3, 1, 1), b.repeat(1, 3, 1, 1)))


def test_frozen_for_ever(ours, images):
    holder = nn.Sequential(ours)
    holder.train()
    assert not any(module.training for module in ours.modules())
    assert not any(parameter.requires_grad for parameter in ours.parameters())
    assert torch.equal(ours(*images), ours(*images))


def test_random_trunk_is_always_the_same_and_leaves_the_generator_alone(images):
    torch.manual_seed(5)
    first = LPIPS(pretrained=False)(*images)
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(1))
    assert torch.equal(first, LPIPS(pretrained=False)(*images))


def test_weights_stay_out_of_checkpoints_and_loading_stays_strict(ours, images):
    holder = nn.ModuleDict({"perceptual": ours, "other": nn.Linear(2, 2)})
    state = holder.state_dict()
    assert set(state) == {"other.weight", "other.bias"}
    before = ours(*images)
    holder.load_state_dict(state)
    assert torch.equal(before, ours(*images))
    with pytest.raises(RuntimeError, match=r"other\.bias"):
        holder.load_state_dict({"other.weight": state["other.weight"]})
    with pytest.raises(RuntimeError, match="stranger"):
        holder.load_state_dict({**state, "stranger": torch.zeros(1)})


def test_reads_the_trunk_from_a_path(tmp_path, images):
    state = vgg16_state()
    torch.save(state, tmp_path / "vgg.pth")
    loaded = LPIPS(trunk=str(tmp_path / "vgg.pth"))
    assert torch.equal(loaded.stages[4][-2].weight, state["features.28.weight"])
    assert torch.equal(loaded.stages[0][0].bias, state["features.0.bias"])


def test_reads_the_trunk_from_the_hub_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    state = vgg16_state()
    torch.save(state, tmp_path / "checkpoints" / TRUNK_FILE)
    assert torch.equal(LPIPS().stages[1][1].weight, state["features.5.weight"])


def test_a_missing_trunk_says_which_file_goes_where(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(CheckpointError) as error:
        LPIPS()
    assert str(tmp_path / "checkpoints" / TRUNK_FILE) in str(error.value)
    assert f"https://download.pytorch.org/models/{TRUNK_FILE}" in str(error.value)
    with pytest.raises(CheckpointError, match=r"nowhere\.pth"):
        LPIPS(trunk=str(tmp_path / "nowhere.pth"))


@pytest.mark.parametrize("content", [b"", b"not weights"])
def test_a_broken_trunk_is_named(tmp_path, content):
    (tmp_path / "vgg.pth").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"vgg\.pth"):
        LPIPS(trunk=str(tmp_path / "vgg.pth"))


def test_a_foreign_trunk_is_named_with_what_differs(tmp_path):
    state = vgg16_state()
    state["features.5.weight"] = torch.zeros(1)
    torch.save(state, tmp_path / "vgg.pth")
    with pytest.raises(CheckpointError, match=r"features\.5\.weight.*\(128, 64, 3, 3\).*\(1,\)"):
        LPIPS(trunk=str(tmp_path / "vgg.pth"))
    del state["features.5.weight"]
    torch.save(state, tmp_path / "vgg.pth")
    with pytest.raises(CheckpointError, match=r"features\.5\.weight.*missing"):
        LPIPS(trunk=str(tmp_path / "vgg.pth"))


def test_builds_on_the_meta_device_without_weights():
    with torch.device("meta"):
        built = LPIPS(trunk="nowhere.pth")
    pair = torch.empty(2, 3, 32, 32, device="meta")
    assert built(pair, pair).shape == (2,)


def test_distances_are_float32_under_autocast(ours, images):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = ours(*images)
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(mixed, ours(*images), rtol=0.05, atol=0.0)
