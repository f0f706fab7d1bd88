"""The transformer: published sizes, parity with diffusers, and what its switches change."""

import math

import pytest
import torch
import torch.nn.functional as F
from diffusers import DiTTransformer2DModel, PixArtTransformer2DModel

from ldm.diffusion.conditioners.base import Conditioning
from ldm.diffusion.conditioners.classes import ClassVector
from ldm.diffusion.networks.dit import DiT, positions, rotations
from ldm.diffusion.networks.dit_blocks import Block, rotate
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
    switches = {"rms_norm": True, "swiglu": True, "rope": True, "qk_norm": True}
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
        copies = {"attention.out": "attn1.to_out.0", "feed.fc1": "ff.net.0.proj", "feed.fc2": "ff.net.2"}
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


@torch.no_grad()
def test_attention_to_tokens_equals_pixart_in_diffusers():
    """Up to the last layer, which has no linear layer for its shift and scale there.

    All blocks there have one modulation and a table each: weights that are alike, and biases that are not, here.
    """
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 4, "attention_head_dim": 16, "cross_attention_dim": 64, "caption_channels": 12}
    theirs = PixArtTransformer2DModel(
        **sizes,
        num_layers=3,
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=8,
        use_additional_conditions=False,
    )
    net = DiT(4, 2, 64, 3, 4, context_dim=12)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    given = theirs.eval().state_dict()
    names = {"embed.0": "adaln_single.emb.timestep_embedder.linear_1"}
    names |= {"embed.2": "adaln_single.emb.timestep_embedder.linear_2"}
    names |= {f"embed_tokens.{layer}": f"caption_projection.linear_{number}" for layer, number in ((0, 1), (2, 2))}
    ours = {f"{name}.{kind}": given[f"{other}.{kind}"] for name, other in names.items() for kind in ("weight", "bias")}
    ours |= {"patches.weight": given["pos_embed.proj.weight"].flatten(1), "patches.bias": given["pos_embed.proj.bias"]}
    for i in range(3):
        here, there = f"layers.{i}", f"transformer_blocks.{i}"
        for kind in ("weight", "bias"):
            q, k, v = (given[f"{there}.attn1.to_{part}.{kind}"] for part in "qkv")
            ours[f"{here}.attention.qkv.{kind}"] = torch.cat([q, k, v])
            ours[f"{here}.cross.query.{kind}"] = given[f"{there}.attn2.to_q.{kind}"]
            pair = [given[f"{there}.attn2.to_{part}.{kind}"] for part in "kv"]
            ours[f"{here}.cross.key_value.{kind}"] = torch.cat(pair)
            copies = {"attention.out": "attn1.to_out.0", "cross.out": "attn2.to_out.0", "feed.fc1": "ff.net.0.proj"}
            for name, other in (copies | {"feed.fc2": "ff.net.2"}).items():
                ours[f"{here}.{name}.{kind}"] = given[f"{there}.{other}.{kind}"]
        ours[f"{here}.modulation.weight"] = given["adaln_single.linear.weight"]
        table = given[f"{there}.scale_shift_table"].flatten()
        ours[f"{here}.modulation.bias"] = given["adaln_single.linear.bias"] + table
    missing, unknown = net.eval().load_state_dict(ours, strict=False)
    assert not unknown
    assert {name.split(".")[0] for name in missing} == {"modulation_out", "out"}
    found = []
    for network in (net, theirs):
        network.norm_out.register_forward_pre_hook(lambda _, given: found.append(given[0]))
    x, t, tokens = torch.randn(3, 4, 8, 8), torch.tensor([0.0, 500.0, 999.0]), torch.randn(3, 5, 12)
    mask = torch.arange(5) < torch.tensor([[2], [5], [1]])
    net(x, t, Conditioning(tokens=tokens, token_mask=mask))
    theirs(x, tokens, t, {"resolution": None, "aspect_ratio": None}, encoder_attention_mask=mask)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rope", [False, True])
def test_tokens_in_sequence_are_patches_without_a_place(rope):
    torch.manual_seed(0)
    net = randomise(DiT(4, 2, 64, 1, 4, rope=rope, context_dim=12, tokens_in_sequence=True))
    x, t, tokens = torch.randn(2, 4, 8, 4), torch.tensor([3.0, 700.0]), torch.randn(2, 3, 12)
    seen = []
    net.layers[0].attention.register_forward_hook(lambda _, given, out: seen.append((*given, out)))
    out = net(x, t, Conditioning(tokens=tokens))
    assert out.shape == x.shape
    ((h, rotation, mask, attended),) = seen
    assert h.shape == attended.shape == (2, 3 + 8, 64)
    assert mask is None
    if rope:
        assert torch.equal(rotation[:, 3:], rotations(4, 2, 16, x.device))
        assert rotation[0, :3].eq(1).all()
        assert rotation[1, :3].eq(0).all()
    # The order of tokens is their encoder's affair.
    torch.testing.assert_close(net(x, t, Conditioning(tokens=tokens.flip(1))), out, rtol=1e-4, atol=1e-4)
    assert (net(x, t, Conditioning(tokens=2 * tokens)) - out).abs().max() > 1e-3


@pytest.mark.parametrize("in_sequence", [False, True])
def test_a_transformer_with_tokens_starts_as_one_without(in_sequence):
    """The published names, their order and initial values stay; a new network's output is zero."""
    torch.manual_seed(0)
    plain = DiT(4, 2, 64, 2, 4)
    torch.manual_seed(0)
    net = DiT(4, 2, 64, 2, 4, context_dim=12, tokens_in_sequence=in_sequence)
    parts = {"layers.0.cross", "layers.1.cross", "embed_tokens"} if not in_sequence else {"embed_tokens"}
    added = [name for name in net.state_dict() if name.startswith(tuple(parts))]
    assert [name for name in net.state_dict() if name not in added] == list(plain.state_dict())
    assert len(added) == (4 if in_sequence else 4 + 2 * 6)
    assert not net(torch.randn(2, 4, 8, 8), torch.zeros(2), Conditioning(tokens=torch.randn(2, 3, 12))).any()
    for block in net.layers:
        assert in_sequence or not any(parameter.any() for parameter in block.cross.out.parameters())


HEADS, DEPTH, PATCH = 4, 3, 2


def lightningdit_weights(normalise: bool, channels: int = 64, latents: int = 4) -> dict[str, torch.Tensor]:
    """Random weights under LightningDiT's own names, rows in its own order."""
    width, head = 4 * channels * 2 // 3, channels // HEADS
    shapes = {"t_embedder.mlp.0": (channels, 256), "t_embedder.mlp.2": (channels, channels)}
    shapes["x_embedder.proj"] = (channels, latents, PATCH, PATCH)
    for block in (f"blocks.{i}" for i in range(DEPTH)):
        shapes[f"{block}.attn.qkv"], shapes[f"{block}.attn.proj"] = (3 * channels, channels), (channels, channels)
        shapes[f"{block}.mlp.w12"], shapes[f"{block}.mlp.w3"] = (2 * width, channels), (channels, width)
        shapes[f"{block}.adaLN_modulation.1"] = (6 * channels, channels)
    shapes["final_layer.adaLN_modulation.1"] = (2 * channels, channels)
    shapes["final_layer.linear"] = (PATCH * PATCH * latents, channels)
    weights = {f"{name}.weight": torch.randn(shape) / math.prod(shape[1:]) ** 0.5 for name, shape in shapes.items()}
    weights |= {f"{name}.bias": 0.1 * torch.randn(shape[0]) for name, shape in shapes.items()}
    norms = {f"blocks.{i}.norm{j}": channels for i in range(DEPTH) for j in (1, 2)} | {
        "final_layer.norm_final": channels
    }
    if normalise:
        norms |= {f"blocks.{i}.attn.{which}_norm": head for i in range(DEPTH) for which in "qk"}
    return weights | {f"{name}.weight": 1 + 0.1 * torch.randn(size) for name, size in norms.items()}


def lightningdit(weights, x, t, vector):
    """The published network's velocity, in its own conventions: t = 1 is data, pairs of channels are neighbors.

    x (N,C,H,W), t (N,), vector (N,D) -> (N,C,H,W), in float64 throughout.
    """
    w = {name: weight.double() for name, weight in weights.items()}

    def linear(name, h):
        return h @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(name, h):
        scale = w.get(f"{name}.weight")
        return h if scale is None else h * (h.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * scale

    def wave(place, count):
        return place[:, None].double() * 10_000.0 ** (-torch.arange(count) / count).double()

    n, rows, columns = len(x), x.shape[2] // PATCH, x.shape[3] // PATCH
    angles = wave(t, 128)
    told = linear("t_embedder.mlp.2", F.silu(linear("t_embedder.mlp.0", torch.cat([angles.cos(), angles.sin()], 1))))
    told = F.silu(told + vector)[:, None]
    tokens = F.conv2d(x.double(), w["x_embedder.proj.weight"], w["x_embedder.proj.bias"], PATCH).flatten(2).mT
    channels = tokens.shape[-1]
    row, column = torch.arange(rows).repeat_interleave(columns), torch.arange(columns).repeat(rows)
    waves = [wave(place, channels // 4) for place in (column, row)]
    tokens = tokens + torch.cat([part for angle in waves for part in (angle.sin(), angle.cos())], dim=1)
    head = channels // HEADS
    turned = torch.cat([wave(row, head // 4), wave(column, head // 4)], dim=1)  # the angle of each pair
    turn = torch.polar(torch.ones_like(turned), turned)
    for block in (f"blocks.{i}" for i in range(DEPTH)):
        shift, scale, gate, shift_f, scale_f, gate_f = linear(f"{block}.adaLN_modulation.1", told).chunk(6, dim=-1)
        h = linear(f"{block}.attn.qkv", norm(f"{block}.norm1", tokens) * (1 + scale) + shift)
        q, k, v = h.reshape(n, -1, 3, HEADS, head).permute(2, 0, 3, 1, 4)
        pairs = [norm(f"{block}.attn.{name}_norm", part).unflatten(-1, (-1, 2)) for name, part in (("q", q), ("k", k))]
        q, k = (torch.view_as_real(torch.view_as_complex(pair.contiguous()) * turn).flatten(-2) for pair in pairs)
        seen = (q @ k.mT / head**0.5).softmax(-1) @ v
        tokens = tokens + gate * linear(f"{block}.attn.proj", seen.transpose(1, 2).flatten(2))
        first, second = linear(f"{block}.mlp.w12", norm(f"{block}.norm2", tokens) * (1 + scale_f) + shift_f).chunk(
            2, -1
        )
        tokens = tokens + gate_f * linear(f"{block}.mlp.w3", F.silu(first) * second)
    shift, scale = linear("final_layer.adaLN_modulation.1", told).chunk(2, dim=-1)
    h = linear("final_layer.linear", norm("final_layer.norm_final", tokens) * (1 + scale) + shift)
    h = h.reshape(n, rows, columns, PATCH, PATCH, -1)  # a patch's outputs: pixel by pixel
    return h.permute(0, 5, 1, 3, 2, 4).reshape(x.shape)


def from_lightningdit(weights):
    """The same function in our names and conventions: t = 0 is data, and velocities point at noise."""
    first = weights["t_embedder.mlp.0.weight"].double()
    cosines, sines = first.chunk(2, dim=1)  # of t' = 1 - t: cos(f - f t) and sin(f - f t), by the sums of angles
    f = 10_000.0 ** (-torch.arange(128) / 128).double()
    ours = {"embed.0.weight": torch.cat([cosines * f.cos() + sines * f.sin(), cosines * f.sin() - sines * f.cos()], 1)}
    ours["patches.weight"] = weights["x_embedder.proj.weight"].flatten(1)
    order = torch.arange(PATCH * PATCH * 4).reshape(PATCH, PATCH, 4).permute(2, 0, 1).flatten()
    names = {"t_embedder.mlp.2": "embed.2", "final_layer.adaLN_modulation.1": "modulation_out"}
    norms = {"final_layer.norm_final": "norm_out"}
    channels = len(weights["x_embedder.proj.weight"])
    head = channels // HEADS
    apart = torch.cat([torch.arange(0, head, 2), torch.arange(1, head, 2)])  # neighbors -> half a head apart
    rows = torch.arange(3 * channels).reshape(3, HEADS, head)
    rows[:2] = rows[:2, :, apart]
    for i in range(DEPTH):
        there, here = f"blocks.{i}", f"layers.{i}"
        for kind in ("weight", "bias"):
            ours[f"{here}.attention.qkv.{kind}"] = weights[f"{there}.attn.qkv.{kind}"][rows.flatten()]
        names |= {f"{there}.attn.proj": f"{here}.attention.out", f"{there}.adaLN_modulation.1": f"{here}.modulation"}
        names |= {f"{there}.mlp.w12": f"{here}.feed.fc1", f"{there}.mlp.w3": f"{here}.feed.fc2"}
        norms |= {f"{there}.norm1": f"{here}.norm_attention", f"{there}.norm2": f"{here}.norm_feed"}
        for which in "qk":
            if (scale := weights.get(f"{there}.attn.{which}_norm.weight")) is not None:
                ours[f"{here}.attention.norm_{which}.weight"] = scale[apart]
    for there, here in names.items():
        ours |= {f"{here}.{kind}": weights[f"{there}.{kind}"] for kind in ("weight", "bias")}
    ours |= {f"{here}.weight": weights[f"{there}.weight"] for there, here in norms.items()}
    ours |= {"embed.0.bias": weights["t_embedder.mlp.0.bias"], "patches.bias": weights["x_embedder.proj.bias"]}
    return ours | {f"out.{kind}": -weights[f"final_layer.linear.{kind}"][order] for kind in ("weight", "bias")}


@torch.no_grad()
@pytest.mark.parametrize("normalise", [False, True])
def test_equals_lightningdit(normalise):
    """Places added to the tokens *and* turning queries and keys; the published weights without their norms."""
    torch.manual_seed(0)
    weights = lightningdit_weights(normalise)
    switches = {"rms_norm": True, "swiglu": True, "rope": True, "qk_norm": normalise}
    x, t, vector = torch.randn(2, 4, 8, 12), torch.tensor([0.3, 0.9]), torch.randn(2, 64)
    expected = -lightningdit(weights, x, t, vector)
    gaps = {}
    for absolute in (True, None):
        net = DiT(4, PATCH, 64, DEPTH, HEADS, absolute_positions=absolute, **switches)
        net.load_state_dict(from_lightningdit(weights))
        gaps[absolute] = ((net(x, 1 - t, Conditioning(vector=vector)) - expected).norm() / expected.norm()).item()
    assert gaps[True] < 3e-6
    assert gaps[None] > 0.1  # rotary positions alone, as checkpoints from before the parameter have them


@torch.no_grad()
def test_positions_are_absolute_only_where_asked_for():
    """One color everywhere: rotary positions alone cannot tell its places apart, whatever the weights."""
    x, t = torch.randn(2, 4, 1, 1).expand(2, 4, 8, 8), torch.tensor([3.0, 700.0])
    nets = {}
    for switches in ((False, None), (False, True), (True, None), (True, False), (True, True)):
        torch.manual_seed(0)
        nets[switches] = randomise(DiT(4, 1, 64, 2, 4, rope=switches[0], absolute_positions=switches[1]))
    made = {switches: net(x, t, Conditioning()) for switches, net in nets.items()}
    spread = {switches: image.flatten(2).std(-1).max().item() for switches, image in made.items()}
    assert max(spread[True, None], spread[True, False]) < 1e-5
    assert min(spread[False, None], spread[False, True], spread[True, True]) > 1e-3
    assert torch.equal(made[True, None], made[True, False])  # old checkpoints with rotary positions
    assert torch.equal(made[False, None], made[False, True])  # and those without
    assert len({tuple(net.state_dict()) for net in nets.values()}) == 1  # no positions are stored
    with pytest.raises(ConfigError, match="tokens have no positions"):
        DiT(4, 1, 64, 2, 4, absolute_positions=False)


def test_starts_as_zero_and_with_blocks_that_change_nothing():
    net = DiT(4, 2, 64, 2, 4)
    x = torch.randn(2, 4, 8, 8)
    assert not net(x, torch.tensor([1.0, 2.0]), Conditioning()).any()
    tokens = torch.randn(2, 16, 64)
    assert torch.equal(net.layers[0](tokens, torch.randn(2, 64), None), tokens)


def test_places_of_any_rectangle_are_those_of_the_square_around_it():
    for table in (positions, rotations):
        square = table(7, 7, 32, torch.device("cpu")).unflatten(-2, (7, 7))
        for rows, columns in ((7, 7), (5, 7), (7, 3), (1, 6)):
            found = table(rows, columns, 32, torch.device("cpu")).unflatten(-2, (rows, columns))
            assert torch.equal(found, square[..., :rows, :columns, :])


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


@pytest.mark.parametrize("switch", ["rms_norm", "swiglu", "rope", "qk_norm"])
def test_every_switch_changes_the_function(switch):
    torch.manual_seed(0)
    plain = randomise(DiT(4, 2, 64, 2, 4))
    torch.manual_seed(0)
    other = randomise(DiT(4, 2, 64, 2, 4, **{switch: True}))
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([3.0, 700.0])
    assert (plain(x, t, Conditioning()) - other(x, t, Conditioning())).abs().max() > 1e-3


@pytest.mark.parametrize("rope", [False, True])
def test_checkpointing_changes_nothing(rope):
    net = randomise(DiT(4, 2, 64, 3, 4, rope=rope))
    x, t = torch.randn(2, 4, 8, 4), torch.tensor([3.0, 700.0])
    gradients = []
    for net.checkpointing in (False, True):
        net.zero_grad()
        net(x, t, Conditioning()).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_rows_do_not_see_one_another():
    net = randomise(DiT(4, 2, 64, 2, 4, rope=True))
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
    with pytest.raises(ConfigError, match="divisible by 4 x num_heads"):
        DiT(4, 2, 66, 1, 4)


def test_tokens_that_do_not_fit():
    with pytest.raises(ConfigError, match="tokens_in_sequence=True, context_dim=None"):
        DiT(4, 2, 64, 1, 4, tokens_in_sequence=True)
    net, x = DiT(4, 2, 64, 1, 4, context_dim=12), torch.zeros(1, 4, 8, 8)
    for found, given in ((None, Conditioning()), (13, Conditioning(tokens=torch.zeros(1, 2, 13)))):
        with pytest.raises(ConfigError, match=f"context_dim=12, but the conditioner's tokens slot has width {found}"):
            net(x, torch.zeros(1), given)


def test_a_picture_as_condition():
    net = randomise(DiT(4, 2, 64, 1, 4, spatial_channels=3))
    x, t = torch.randn(2, 4, 8, 8), torch.zeros(2)
    one, other = (net(x, t, Conditioning(spatial=torch.full((2, 3, 8, 8), value))) for value in (0.0, 1.0))
    assert (one - other).abs().max() > 1e-3


def test_blocks_are_blocks():
    assert all(isinstance(block, Block) for block in DiT(4, 2, 64, 3, 4).blocks())


def test_a_vector_of_another_width_is_projected():
    net = randomise(DiT(4, 2, 64, 1, 4, vector_channels=5))
    x, t, vector = torch.randn(2, 4, 8, 8), torch.tensor([0.0, 500.0]), torch.randn(2, 5)
    one, other = (net(x, t, Conditioning(vector=given)) for given in (vector, vector + 1))
    assert (one - other).abs().max() > 1e-3
    for wrong in (None, torch.randn(2, 64)):
        with pytest.raises(ConfigError, match="vector_channels=5, but the conditioner's vector slot has width"):
            net(x, t, Conditioning(vector=wrong))
