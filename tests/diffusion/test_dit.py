"""The transformer: published sizes, parity with diffusers, and what its switches change."""

import pytest
import torch
from diffusers import DiTTransformer2DModel

from ldm.diffusion.conditioning import ClassVector, Conditioning
from ldm.diffusion.dit import Block, DiT, positions, rotate, rotations
from ldm.errors import ConfigError

SIZES = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}
# Peebles and Xie 2023, table 4, in millions; of patches of 2, 4 and 8.
PUBLISHED = {
    ("S", 2): 33, ("S", 4): 33, ("S", 8): 33,
    ("B", 2): 130, ("B", 4): 131, ("B", 8): 131,
    ("L", 2): 458, ("L", 4): 459, ("L", 8): 459,
    ("XL", 2): 675, ("XL", 4): 675, ("XL", 8): 676,
}  # fmt: skip


def make(size, patch, **switches):
    channels, depth, heads = SIZES[size]
    with torch.device("meta"):
        return DiT(4, patch, channels, depth, heads, **switches), ClassVector(1000, channels)


def count(*modules):
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


@pytest.mark.parametrize(("size", "patch"), PUBLISHED)
def test_published_sizes(size, patch):
    assert round(count(*make(size, patch)) / 1e6) == pytest.approx(PUBLISHED[size, patch], abs=1)


def test_xl_2_to_the_last_parameter():
    """Theirs counts its fixed table of 256 positions, and predicts the variance in as many channels again."""
    positions_table, variance = 256 * 1152, (1152 + 1) * 2 * 2 * 4
    assert count(*make("XL", 2)) + positions_table + variance == 675_129_632


@pytest.mark.parametrize("patch", [1, 2])
def test_modern_form_is_as_large(patch):
    switches = {"rms_norm": True, "swiglu": True, "rotary": True, "normalise_attention": True}
    assert count(*make("XL", patch, **switches)) == pytest.approx(675e6, rel=0.01)


def randomise(module):
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return module.eval()


@torch.no_grad()
def test_equals_diffusers():
    ours, table = randomise(DiT(4, 2, 64, 3, 4)), randomise(ClassVector(10, 64))
    reference = DiTTransformer2DModel(4, 16, 4, 4, num_layers=3, sample_size=8, patch_size=2, num_embeds_ada_norm=10)
    reference.eval()
    torch.testing.assert_close(reference.pos_embed.pos_embed[0], positions(4, 4, 64, torch.device("cpu")))
    state = {}
    mine = ours.state_dict()

    def copy(theirs, weight, bias):
        state[f"{theirs}.weight"], state[f"{theirs}.bias"] = weight, bias

    copy("pos_embed.proj", mine["patches.weight"].reshape(64, 4, 2, 2), mine["patches.bias"])
    for i in range(3):
        block, theirs = f"layers.{i}", f"transformer_blocks.{i}"
        for ours_name, name in (("embed.0", "linear_1"), ("embed.2", "linear_2")):
            place = f"{theirs}.norm1.emb.timestep_embedder.{name}"
            copy(place, mine[f"{ours_name}.weight"], mine[f"{ours_name}.bias"])
        state[f"{theirs}.norm1.emb.class_embedder.embedding_table.weight"] = table.table.weight
        copy(f"{theirs}.norm1.linear", mine[f"{block}.modulation.weight"], mine[f"{block}.modulation.bias"])
        qkv = zip(*(mine[f"{block}.attention.qkv.{kind}"].chunk(3) for kind in ("weight", "bias")), strict=True)
        for name, (weight, bias) in zip(("to_q", "to_k", "to_v"), qkv, strict=True):
            copy(f"{theirs}.attn1.{name}", weight, bias)
        copies = {"attention.out": "attn1.to_out.0", "feed.widen": "ff.net.0.proj", "feed.narrow": "ff.net.2"}
        for ours_name, name in copies.items():
            copy(f"{theirs}.{name}", mine[f"{block}.{ours_name}.weight"], mine[f"{block}.{ours_name}.bias"])
    copy("proj_out_1", mine["modulation_out.weight"], mine["modulation_out.bias"])
    # A patch's outputs: channel by channel here, pixel by pixel there.
    order = torch.arange(16).reshape(4, 2, 2).permute(1, 2, 0).flatten()
    copy("proj_out_2", mine["out.weight"][order], mine["out.bias"][order])
    reference.load_state_dict(state)
    for block in reference.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0  # as the authors' code
        block.norm1.norm.eps = block.norm3.eps = 1e-6
    x, t, labels = torch.randn(3, 4, 8, 8), torch.tensor([0.0, 500.0, 999.0]), torch.tensor([1, 9, 10])
    expected = reference(x, t, labels).sample
    vector = Conditioning(vector=table.table(labels))
    torch.testing.assert_close(ours(x, t, vector), expected, rtol=1e-4, atol=1e-4)


def test_starts_as_zero_and_with_blocks_that_change_nothing():
    net = DiT(4, 2, 64, 2, 4)
    x = torch.randn(2, 4, 8, 8)
    assert not net(x, torch.tensor([1.0, 2.0]), Conditioning()).any()
    tokens = torch.randn(2, 16, 64)
    assert torch.equal(net.layers[0](tokens, torch.randn(2, 64), None), tokens)


def test_rotation_sees_only_distances():
    """Turned queries and keys: their product is a function of how far apart they stand, along each axis."""
    q, k = torch.randn(2, 1, 1, 1, 32).unbind(0)
    turned = rotations(5, 7, 32, torch.device("cpu"))
    q, k = rotate(q.expand(1, 1, 35, 32), turned), rotate(k.expand(1, 1, 35, 32), turned)
    scores = (q @ k.transpose(-1, -2)).reshape(5, 7, 5, 7)
    torch.testing.assert_close(scores[1, 2, 3, 4], scores[0, 0, 2, 2])
    torch.testing.assert_close(scores[4, 1, 2, 6], scores[3, 0, 1, 5])
    assert (scores[1, 2, 3, 4] - scores[1, 2, 4, 3]).abs() > 1e-3
    torch.testing.assert_close(q.norm(dim=-1), q[:, :, :1].norm(dim=-1).expand(1, 1, 35))


@pytest.mark.parametrize("switch", ["rms_norm", "swiglu", "rotary", "normalise_attention"])
def test_every_switch_changes_the_function(switch):
    torch.manual_seed(0)
    plain = randomise(DiT(4, 2, 64, 2, 4))
    torch.manual_seed(0)
    other = randomise(DiT(4, 2, 64, 2, 4, **{switch: True}))
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([3.0, 700.0])
    assert (plain(x, t, Conditioning()) - other(x, t, Conditioning())).abs().max() > 1e-3


@pytest.mark.parametrize("rotary", [False, True])
def test_checkpointing_changes_nothing(rotary):
    net = randomise(DiT(4, 2, 64, 3, 4, rotary=rotary))
    x, t = torch.randn(2, 4, 8, 4), torch.tensor([3.0, 700.0])
    gradients = []
    for net.checkpointing in (False, True):
        net.zero_grad()
        net(x, t, Conditioning()).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_rows_do_not_see_one_another():
    net = randomise(DiT(4, 2, 64, 2, 4, rotary=True))
    x, t, vector = torch.randn(3, 4, 8, 8), torch.tensor([3.0, 50.0, 700.0]), torch.randn(3, 64)
    together = net(x, t, Conditioning(vector=vector))
    torch.testing.assert_close(
        net(x[1:2], t[1:2], Conditioning(vector=vector[1:2])), together[1:2], rtol=1e-4, atol=1e-4
    )


def test_inputs_that_do_not_fit():
    net, t = DiT(4, 2, 64, 1, 4), torch.zeros(1)
    cases = {
        "channels": (torch.zeros(1, 3, 8, 8), Conditioning()),
        "divisible by 2": (torch.zeros(1, 4, 7, 8), Conditioning()),
        "no tokens": (torch.zeros(1, 4, 8, 8), Conditioning(tokens=torch.zeros(1, 2, 64))),
        "width 32": (torch.zeros(1, 4, 8, 8), Conditioning(vector=torch.zeros(1, 32))),
        "spatial_channels=0": (torch.zeros(1, 4, 8, 8), Conditioning(spatial=torch.zeros(1, 2, 8, 8))),
    }
    for message, (x, conditioning) in cases.items():
        with pytest.raises(ConfigError, match=message):
            net(x, t, conditioning)
    with pytest.raises(ConfigError, match="divisible by 4 x heads"):
        DiT(4, 2, 66, 1, 4)


def test_a_picture_as_condition():
    net = randomise(DiT(4, 2, 64, 1, 4, spatial_channels=3))
    x, t = torch.randn(2, 4, 8, 8), torch.zeros(2)
    one, other = (net(x, t, Conditioning(spatial=torch.full((2, 3, 8, 8), value))) for value in (0.0, 1.0))
    assert (one - other).abs().max() > 1e-3


def test_blocks_are_blocks():
    assert all(isinstance(block, Block) for block in DiT(4, 2, 64, 3, 4).blocks())
