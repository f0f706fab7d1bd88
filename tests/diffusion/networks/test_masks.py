"""Tokens with a mask: nothing in any network that reads tokens depends on padding, however long it is."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ldm.diffusion.conditioners.base import Conditioning
from ldm.diffusion.networks.dit import DiT
from ldm.diffusion.networks.unet import UNet

WIDTH = 12
LENGTHS = (3, 1, 5)
DIT = partial(DiT, 4, 1, 32, 2, 2, context_dim=WIDTH)
NETWORKS = {
    "unet": partial(UNet, 4, 16, (1, 2), 1, (0, 1), num_heads=2, context_dim=WIDTH, transformer_depth=2),
    "dit, cross": DIT,
    "dit, cross, modern": partial(DIT, rope=True, qk_norm=True, rms_norm=True, swiglu=True),
    "dit, in sequence": partial(DIT, tokens_in_sequence=True),
    "dit, in sequence, modern": partial(DIT, tokens_in_sequence=True, rope=True, qk_norm=True),
}
SIDES = {"plain products": 8, "fused kernel": 12}  # squared: below and above what attend() takes for few


@pytest.fixture(params=NETWORKS)
def net(request):
    torch.manual_seed(0)
    made = NETWORKS[request.param]()
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.2)
    return made


def inputs(side):
    random = torch.Generator().manual_seed(1)
    x = torch.randn(len(LENGTHS), 4, side, side, generator=random)
    return x, torch.tensor([3.0, 500.0, 999.0]), torch.randn(len(LENGTHS), max(LENGTHS), WIDTH, generator=random)


def masked(tokens, padding=0, garbage=0.0):
    """The tokens, as long as LENGTHS says, with `garbage` after them, and more of it."""
    tokens = F.pad(tokens, (0, 0, 0, padding))
    mask = torch.arange(tokens.shape[1]) < torch.tensor(LENGTHS)[:, None]
    return Conditioning(tokens=torch.where(mask[..., None], tokens, garbage), token_mask=mask)


def computed(net, x, level, conditioning, precision=torch.float32):
    """Output, and the gradient of every parameter."""
    net.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
        out = net(x, level, conditioning)
    out.float().square().mean().backward()
    return [out.detach().float(), *(parameter.grad.clone() for parameter in net.parameters())]


def assert_alike(ours, theirs, tolerance):
    for one, other in zip(ours, theirs, strict=True):
        assert torch.isfinite(one).all()
        assert (one - other).abs().max() <= tolerance * other.abs().max() + 1e-6


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", SIDES)
def test_longer_padding_changes_nothing(net, way, precision):
    x, level, tokens = inputs(SIDES[way])
    tolerance = 1e-5 if precision == torch.float32 else 0.05
    short = computed(net, x, level, masked(tokens), precision)
    for garbage in (1e30, float("nan")):
        assert_alike(computed(net, x, level, masked(tokens, 9, garbage), precision), short, tolerance)


@pytest.mark.parametrize("way", SIDES)
def test_a_padded_row_is_the_row_without_padding(net, way):
    x, level, tokens = inputs(SIDES[way])
    with torch.no_grad():
        together = net(x, level, masked(tokens, 2, 7.0))
        for row, length in enumerate(LENGTHS):
            chosen = slice(row, row + 1)
            alone = net(x[chosen], level[chosen], Conditioning(tokens=tokens[chosen, :length]))
            assert_alike(together[chosen], alone, 1e-5)


def test_a_mask_of_tokens_alone_is_none(net):
    x, level, tokens = inputs(8)
    everything = torch.ones(tokens.shape[:2], dtype=torch.bool)
    bare = computed(net, x, level, Conditioning(tokens=tokens))
    assert_alike(computed(net, x, level, Conditioning(tokens=tokens, token_mask=everything)), bare, 1e-5)


def test_every_token_is_heard_and_learns_and_padding_does_neither(net):
    x, level, tokens = inputs(8)
    given = masked(tokens, 2, 7.0)
    given.tokens.requires_grad_()
    net(x, level, given).square().mean().backward()
    learned = given.tokens.grad.abs().amax(2)
    assert torch.equal(learned > 0, given.token_mask)


def test_recomputed_and_compiled_blocks_know_the_mask(net):
    x, level, tokens = inputs(8)
    given = masked(tokens, 2, 5.0)
    plain = computed(net, x, level, given)
    net.checkpointing = True
    again = computed(net, x, level, given)
    assert all(torch.equal(one, other) for one, other in zip(again, plain, strict=True))
    net.checkpointing = False
    for block in net.blocks()[:2]:
        block.compile(backend="eager")
    assert_alike(computed(net, x, level, given), plain, 1e-5)
