"""With new input channels of zero, and rows of the same classes, the function of a model starts as it was."""

from functools import partial

import pytest
import torch

from ldm.autoencoder.losses import AutoencoderLoss
from ldm.autoencoder.module import AutoencoderKL
from ldm.autoencoder.networks import Decoder, Encoder
from ldm.config.load import build
from ldm.diffusion.conditioners.base import Conditioning
from ldm.diffusion.module import LatentDiffusion
from ldm.diffusion.networks.edm2 import MagnitudePreservingUNet
from ldm.optim.ema import EMA, FixedDecay
from ldm.training.resizing import resizings
from tests.tiny_runs import ADAM, node

UNET = {"model_channels": 8, "channel_mult": [1, 1], "num_res_blocks": 1, "num_heads": 1}
KINDS = {
    "unet": partial(node, "diffusion.networks.unet.UNet", **UNET),
    "dit": partial(node, "diffusion.networks.dit.DiT", patch_size=2, hidden_size=16, depth=1, num_heads=1),
    "edm2": partial(
        node,
        "diffusion.networks.edm2.MagnitudePreservingUNet",
        model_channels=8,
        channel_mult=[1, 1],
        num_res_blocks=1,
        attention_levels=[],
    ),
}
UNCONDITIONAL = node("diffusion.conditioners.base.Unconditional")


def made(network, conditioner=UNCONDITIONAL) -> LatentDiffusion:
    objective = build(node("diffusion.objectives.Flow"))
    module = LatentDiffusion(build(network), build(conditioner), objective, ADAM, partial(EMA, profile=FixedDecay()))
    for weight in module.denoiser.parameters():  # none starts at zero
        torch.nn.init.normal_(weight.data, std=0.2)
    return module


def resized(new, old, resize, classes=(None, None)):
    """`new`'s denoiser with the weights of `old`; returns the names that were resized."""
    ours, theirs = new.denoiser.state_dict(), old.denoiser.state_dict()
    shapes = [{name: one.shape for name, one in state.items()} for state in (ours, theirs)]
    changes = resizings(new, *shapes, resize, classes)
    misfits = {name for name in ours if name not in theirs or ours[name].shape != theirs[name].shape}
    assert misfits <= changes.keys()
    made = {name: changes[name](one, theirs[name]) if name in changes else theirs[name] for name, one in ours.items()}
    new.denoiser.load_state_dict(made)
    return {*changes}


def output(module, x, conditioning=None):
    return module.denoiser["network"].eval()(x, torch.full((len(x),), 300.0), conditioning or Conditioning())


@pytest.mark.parametrize("kind", KINDS)
def test_new_input_channels_change_nothing_at_first(kind):
    torch.manual_seed(0)
    old, new = made(KINDS[kind](in_channels=2)), made(KINDS[kind](in_channels=3))
    assert resized(new, old, ["channels"])
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(output(new, x)[:, :2], output(old, x[:, :2]), rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_channels_that_are_gone_are_as_if_they_were_zero(kind):
    torch.manual_seed(0)
    old, new = made(KINDS[kind](in_channels=3)), made(KINDS[kind](in_channels=2))
    resized(new, old, ["channels"])
    x = torch.randn(2, 2, 8, 8)
    if kind != "edm2":  # whose rows have unit length, with or without them
        whole = torch.cat([x, torch.zeros(2, 1, 8, 8)], 1)
        torch.testing.assert_close(output(new, x), output(old, whole)[:, :2], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_conditioning_image_is_new_input(kind):
    """As for inpainting: the latent grows, and the picture beside it keeps its place behind the latent."""
    torch.manual_seed(0)
    old = made(KINDS[kind](in_channels=2, spatial_channels=1))
    new = made(KINDS[kind](in_channels=3, spatial_channels=2))
    resized(new, old, ["channels"])
    x, picture = torch.randn(2, 3, 8, 8), torch.randn(2, 2, 8, 8)
    ours = output(new, x, Conditioning(spatial=picture))[:, :2]
    theirs = output(old, x[:, :2], Conditioning(spatial=picture[:, :1]))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_an_autoencoder_of_more_channels():
    torch.manual_seed(0)
    sizes = {"base_channels": 8, "channel_mult": [1, 1], "num_res_blocks": 1, "latent_channels": 2, "patch_size": 2}
    old, new = (AutoencoderKL(Encoder(c, **sizes), Decoder(c, **sizes), AutoencoderLoss(), ADAM) for c in (3, 4))
    ours, theirs = new.state_dict(), old.state_dict()
    shapes = [{name: one.shape for name, one in state.items()} for state in (ours, theirs)]
    changes = resizings(new, *shapes, ["channels"])
    assert {*changes} == {"encoder.conv_in.weight", "decoder.conv_out.weight", "decoder.conv_out.bias"}
    kept = {name: changes[name](ours[name], one) if name in changes else one for name, one in theirs.items()}
    new.load_state_dict(kept)
    images = torch.randn(2, 4, 8, 8)
    mean, before = new.encode(images).mean, old.encode(images[:, :3]).mean
    torch.testing.assert_close(mean, before)
    torch.testing.assert_close(new.decode(mean)[:, :3], old.decode(before))


@pytest.mark.parametrize("names", [(["b", "x", "a"], ["a", "b"]), (None, ["a", "b"])])
@pytest.mark.parametrize("kind", ["ClassVector", "ClassToken"])
def test_rows_of_classes(kind, names):
    network = KINDS["unet"](in_channels=2, **{"vector_channels" if kind == "ClassVector" else "context_dim": 8})
    table = partial(node, f"diffusion.conditioners.classes.{kind}", channels=8)
    new, old = made(network, table(num_classes=3)), made(network, table(num_classes=2))
    before = new.denoiser["conditioner"].table.weight.detach().clone()
    assert resized(new, old, ["classes"], names) == {"conditioner.table.weight"}
    a, b, none = old.denoiser["conditioner"].table.weight
    expected = [b, before[1], a, none] if names[0] else [a, b, before[2], none]
    assert torch.equal(new.denoiser["conditioner"].table.weight, torch.stack(expected))


@pytest.mark.parametrize("kind", KINDS)
def test_columns_of_one_hot_classes(kind):
    """A class that was known is what it was; of EDM2 up to the length of the rows, which is one again."""
    torch.manual_seed(0)
    one_hot = partial(node, "diffusion.conditioners.classes.ClassOneHot")
    old = made(KINDS[kind](in_channels=2, vector_channels=2), one_hot(num_classes=2))
    new = made(KINDS[kind](in_channels=2, vector_channels=4), one_hot(num_classes=4))
    assert resized(new, old, ["classes"]) == {"network.embed_vector.weight"}
    batch = {"class_label": torch.tensor([1, 0])}
    vectors = [module.denoiser["conditioner"](batch).vector for module in (old, new)]
    layers = [module.denoiser["network"].embed_vector for module in (old, new)]
    theirs, ours = (layer(vector) for layer, vector in zip(layers, vectors, strict=True))
    if isinstance(old.denoiser["network"], MagnitudePreservingUNet):
        ours, theirs = (torch.sign(one) for one in (ours, theirs))
    torch.testing.assert_close(ours, theirs)


def test_what_is_the_same_is_not_resized():
    network = KINDS["unet"](in_channels=2, vector_channels=8)
    table = node("diffusion.conditioners.classes.ClassVector", channels=8, num_classes=3)
    assert not resized(made(network, table), made(network, table), ["classes", "channels"])
    assert resized(made(network, table), made(network, table), ["classes"], (["a", "b", "c"], ["b", "a", "c"]))
