"""Our LPIPS against torchvision's trunks under torchmetrics' heads, with the published weights."""

import functools
import hashlib
from dataclasses import replace

import pytest
import torch
from torch import nn
from torchmetrics.functional.image import lpips
from torchvision.models import alexnet, vgg16

from ldm.autoencoder.lpips import LPIPS, AlexNetLPIPS, _Distance
from ldm.errors import CheckpointError, ConfigError
from ldm.weights import cache

HUB = "vgg16-397923af.pth"


@pytest.fixture(scope="module", params=[LPIPS, AlexNetLPIPS])
def ours(request) -> LPIPS:
    return request.param()


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


def known(monkeypatch, path) -> None:
    """Let the catalog take a file for torchvision's vgg16."""
    entry = replace(cache.FILES["vgg16"], sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    monkeypatch.setitem(cache.FILES, "vgg16", entry)


@pytest.fixture
def nothing_there(tmp_path, monkeypatch):
    """Caches without a file."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setenv("LDM_WEIGHTS", str(tmp_path / "ldm"))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    return tmp_path


@functools.cache
def reference(name: str, file: str, network) -> nn.Module:
    """torchmetrics' LPIPS with its own trained heads, on torchvision's network with the published trunk."""
    theirs = lpips._LPIPS(net=name, pnet_rand=True)
    with torch.device("meta"):
        features = network(weights=None).features
    trunk = {name: value for name, value in cache.read(cache.find(file)).items() if name.startswith("features.")}
    features.load_state_dict({name.removeprefix("features."): value for name, value in trunk.items()}, assign=True)
    layers = [layer for layer in theirs.net.modules() if isinstance(layer, nn.Conv2d)]
    published = [layer for layer in features if isinstance(layer, nn.Conv2d)]
    for layer, weights in zip(layers, published, strict=True):
        layer.load_state_dict(weights.state_dict())
    return theirs


@pytest.mark.parametrize(
    ("kind", "name", "file", "network"),
    [(LPIPS, "vgg", "lpips-vgg16", vgg16), (AlexNetLPIPS, "alex", "lpips-alexnet", alexnet)],
)
@pytest.mark.parametrize("size", [(32, 48), (64, 64), (67, 95)])
def test_equals_torchmetrics_with_the_published_weights(kind, name, file, network, size):
    theirs = reference(name, file, network)
    generator = torch.Generator().manual_seed(0)
    a = torch.rand(3, 3, *size, generator=generator) * 2 - 1
    b = (a + 0.3 * torch.randn(a.shape, generator=generator)).clamp(-1, 1)
    with torch.no_grad():
        expected = theirs(a, b).flatten()
        assert (expected > 0.01).all()
        torch.testing.assert_close(kind()(a, b), expected, atol=1e-6, rtol=1e-6)


def test_blur_is_far_from_the_picture_and_a_shift_of_brightness_near():
    """What it is for: pixels say the opposite of this pair."""
    stripes = torch.zeros(1, 3, 64, 64)
    stripes[..., ::4] = stripes[..., 1::4] = 0.3
    brighter, smooth = stripes + 0.16, torch.full_like(stripes, 0.15)
    assert (smooth - stripes).square().mean() < (brighter - stripes).square().mean()
    for distance in (LPIPS(), AlexNetLPIPS()):
        assert distance(stripes, smooth) > 2 * distance(stripes, brighter)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_distance_of_features_has_the_gradients_of_its_definition(dtype, memory_format):
    torch.manual_seed(0)
    maps = [torch.randn(3, 8, 5, 7).relu().to(dtype).contiguous(memory_format=memory_format) for _ in range(2)]
    maps[1][:, :, 1, 2] = maps[0][0, :, 3, 3] = 0  # no feature is active there
    precise = torch.promote_types(dtype, torch.float32)
    weights, upstream = torch.rand(8, dtype=precise), torch.randn(3, dtype=precise)

    def defined(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        unit = [one / (one.norm(dim=1, keepdim=True) + 1e-10) for one in (x, y)]
        return ((unit[0] - unit[1]).square() * weights[:, None, None]).sum(1).mean((1, 2))

    exact = [one.detach().to(precise, copy=True).requires_grad_() for one in maps]
    given = [one.requires_grad_() for one in maps]
    wanted, found = defined(*exact), _Distance.apply(*given, weights)
    torch.testing.assert_close(found, wanted)
    by_definition = torch.autograd.grad(wanted, exact, upstream)
    active = [(one != 0).any(1, keepdim=True).expand_as(one) for one in maps]  # elsewhere it is 1e10 times as large
    relative = 1e-2 if dtype == torch.bfloat16 else 1e-5
    for ours, theirs, mask in zip(torch.autograd.grad(found, given, upstream), by_definition, active, strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours[mask], theirs[mask].to(dtype), rtol=relative, atol=1e-7)
        torch.testing.assert_close(ours[~mask], theirs[~mask].to(dtype), rtol=relative, atol=0)


def test_gradient_is_finite_where_features_vanish(ours):
    # A stage that outputs zero everywhere: the root of a sum of squares would have the gradient 0/0 there.
    dead = type(ours)()
    nn.init.constant_(dead.stages[4][-2].bias, -1e4)
    a = torch.rand(1, 3, 32, 32, requires_grad=True)
    dead(a, torch.rand(1, 3, 32, 32)).sum().backward()
    assert a.grad.isfinite().all()
    assert a.grad.abs().sum() > 0


def test_is_a_distance_per_image(ours, images):
    a, b = images
    torch.testing.assert_close(ours(a, a), torch.zeros(3))
    torch.testing.assert_close(ours(a, b), ours(b, a))
    torch.testing.assert_close(ours(a, b)[1:2], ours(a[1:2], b[1:2]))


@pytest.mark.parametrize(("kind", "smallest"), [(LPIPS, 16), (AlexNetLPIPS, 31)])
def test_pictures_that_are_too_small_are_refused(kind, smallest):
    distance = kind(pretrained=False)
    for size in ((smallest - 1, 32), (32, 8)):
        images = torch.zeros(2, 3, *size)
        with pytest.raises(ConfigError, match=f"{smallest} pixels or more on each side, found {size[0]} x {size[1]}"):
            distance(images, images)
    images = torch.zeros(2, 3, smallest, smallest)
    assert distance(images, images).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("channels", [2, 4])
def test_pictures_that_are_neither_gray_nor_color_are_refused(ours, channels):
    images = torch.zeros(2, channels, 32, 40)
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


@pytest.mark.parametrize("kind", [LPIPS, AlexNetLPIPS])
def test_random_trunk_is_always_the_same_and_leaves_the_generator_alone(kind, images):
    torch.manual_seed(5)
    first = kind(pretrained=False)(*images)
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(1))
    assert torch.equal(first, kind(pretrained=False)(*images))


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


def test_reads_the_trunk_from_the_hub_cache(nothing_there, monkeypatch):
    state, path = vgg16_state(), nothing_there / "hub" / "checkpoints" / HUB
    torch.save(state, path)
    known(monkeypatch, path)
    assert torch.equal(LPIPS().stages[1][1].weight, state["features.5.weight"])


def test_the_file_of_torchvision_goes_before_the_package_s(tmp_path, monkeypatch):
    """Runs that were started with it go on with the very same numbers."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    assert LPIPS().stages[0][0].weight.flatten()[0] == pytest.approx(-0.55373, abs=1e-5)
    (tmp_path / "checkpoints").mkdir()
    state = vgg16_state()
    torch.save(state, tmp_path / "checkpoints" / HUB)
    known(monkeypatch, tmp_path / "checkpoints" / HUB)
    assert torch.equal(LPIPS().stages[0][0].weight, state["features.0.weight"])


def test_a_foreign_file_in_the_hub_cache_is_refused(nothing_there):
    path = nothing_there / "hub" / "checkpoints" / HUB
    torch.save(vgg16_state(), path)
    with pytest.raises(CheckpointError, match="expected sha256 397923af") as error:
        LPIPS()
    assert str(path) in str(error.value)


def test_a_missing_trunk_says_which_file_goes_where_and_how_to_get_it(nothing_there):
    with pytest.raises(CheckpointError) as error:
        LPIPS()
    message = str(error.value)
    assert str(nothing_there / "hub" / "checkpoints" / HUB) in message
    assert f"https://download.pytorch.org/models/{HUB}" in message
    assert str(nothing_there / "ldm" / "lpips-vgg16.safetensors") in message
    assert "ldm weights --fetch lpips-vgg16" in message
    assert "perceptual: null" in message
    with pytest.raises(CheckpointError, match="ldm weights --fetch lpips-alexnet"):
        AlexNetLPIPS()
    with pytest.raises(CheckpointError, match=r"nowhere\.pth"):
        LPIPS(trunk=str(nothing_there / "nowhere.pth"))


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


@pytest.mark.parametrize("kind", [LPIPS, AlexNetLPIPS])
def test_builds_on_the_meta_device_without_weights(kind):
    with torch.device("meta"):
        built = kind(trunk="nowhere.pth")
    pair = torch.empty(2, 3, 32, 32, device="meta")
    assert built(pair, pair).shape == (2,)


def test_distances_are_float32_under_autocast(ours, images):
    images = [pair[:1, :, :31, :31] for pair in images]  # bf16 takes long where a CPU has to emulate it
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = ours(*images)
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(mixed, ours(*images), rtol=0.05, atol=0.0)


def test_under_autocast_its_weights_are_cast_once(ours, images):
    a, b = images
    before = list(ours.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        maps = ours.features(a)
        cast = ours._stages_for(a)
        again = ours._stages_for(b)
        x = (a - ours.shift) / ours.scale
        plain = [x := stage(x) for stage in ours.stages]
    assert cast is again
    assert {parameter.dtype for parameter in cast.parameters()} == {torch.bfloat16}
    for ours_map, theirs in zip(maps, plain, strict=True):
        assert ours_map.dtype == theirs.dtype == torch.bfloat16
        assert (ours_map - theirs).float().norm() <= 1e-2 * theirs.float().norm()
    assert all(one is other for one, other in zip(ours.parameters(), before, strict=True))
    assert ours.state_dict() == {}


def test_first_seen_in_inference_mode_it_still_trains(ours, images):
    a, b = images
    fresh = type(ours)(pretrained=False)
    with torch.autocast("cpu", torch.bfloat16):
        with torch.inference_mode():
            fresh(a, b)
        b = b.clone().requires_grad_()
        fresh(a, b).sum().backward()
    assert b.grad is not None
    assert b.grad.abs().sum() > 0
