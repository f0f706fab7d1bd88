"""The UNet: published sizes, parity with diffusers' blocks, and what it promises about its inputs."""

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention as DiffusersAttention
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from ldm.diffusion.conditioners.base import Conditioning
from ldm.diffusion.networks.unet import ResBlock, UNet
from ldm.diffusion.networks.unet_attention import SelfAttention, SpatialTransformer
from ldm.errors import ConfigError


def randomise(module):
    """Every parameter away from its start, so that zeroed layers count too."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.1)
    return module.eval()


def copy_into(reference, ours, names):
    """Load the parameters of `ours` into `reference`, renamed; all of both must be used."""
    state = {}
    for name, value in ours.state_dict().items():
        place = next(key for key in names if name.startswith(key))
        target = name.replace(place, names[place], 1)
        state[target] = value.reshape(reference.state_dict()[target].shape)
    reference.load_state_dict(state)


def tiny(**changes):
    parameters = {
        "in_channels": 4,
        "model_channels": 32,
        "channel_mult": (1, 2),
        "num_res_blocks": 1,
        "attention_levels": (1,),
    }
    return randomise(UNet(**{**parameters, "num_heads": 4, **changes}))


@pytest.mark.parametrize(
    ("parameters", "count"),
    [
        # Rombach et al. 2022, tables 12 and 13; the exact figures are those of the authors' code.
        ({"in_channels": 3, "model_channels": 224, "channel_mult": (1, 2, 3, 4), "attention_levels": (1, 2, 3),
              "num_head_channels": 32}, 274_056_163),
        ({"in_channels": 4, "model_channels": 192, "channel_mult": (1, 2, 2, 4, 4), "attention_levels": (0, 1, 2, 3),
              "num_heads": 8, "scale_shift": True, "resample_in_blocks": True}, 294_966_916),
        ({"in_channels": 4, "model_channels": 256, "channel_mult": (1, 2, 4), "attention_levels": (0, 1, 2),
              "num_head_channels": 32, "context_dim": 512}, 394_984_196),
        ({"in_channels": 3, "model_channels": 128, "channel_mult": (1, 2, 3, 4), "attention_levels": (1, 2, 3),
              "num_head_channels": 32, "context_dim": 512, "transformer_depth": 3}, 246_277_379),
    ],
    ids=["celebahq_f4", "lsun_churches_f8", "imagenet_f8_class", "layout2img_f4"],
)  # fmt: skip
def test_published_parameter_counts(parameters, count):
    with torch.device("meta"):
        net = UNet(**parameters)
    assert sum(p.numel() for p in net.parameters()) == count


@pytest.mark.parametrize("context", [None, 8])
def test_norms_have_as_many_groups_as_are_asked_for(context):
    norms = [
        module for module in tiny(norm_groups=32, context_dim=context).modules() if isinstance(module, nn.GroupNorm)
    ]
    assert {norm.num_groups for norm in norms} == {32}
    usual = [module for module in tiny(context_dim=context).modules() if isinstance(module, nn.GroupNorm)]
    assert {norm.num_groups for norm in usual} == {8, 16, 24, 32}


@pytest.mark.parametrize("scale_shift", [False, True])
@pytest.mark.parametrize("resize", [1, 2, 0.5])
def test_res_block_equals_diffusers(scale_shift, resize):
    torch.manual_seed(0)
    c_in, c_out = (128, 256) if resize == 1 else (128, 128)
    ours = randomise(ResBlock(c_in, c_out, 64, scale_shift=scale_shift, resize=resize))
    reference = ResnetBlock2D(
        in_channels=c_in,
        out_channels=c_out,
        temb_channels=64,
        eps=1e-5,
        time_embedding_norm="scale_shift" if scale_shift else "default",
        up=resize == 2,
        down=resize == 0.5,
    ).eval()
    # diffusers' own resizing inside the block is the same repetition and pooling, without parameters.
    names = {"norm_in": "norm1", "conv_in": "conv1", "embedding": "time_emb_proj", "norm_out": "norm2"}
    copy_into(reference, ours, {**names, "conv_out": "conv2", "shortcut": "conv_shortcut"})
    x, embedding = torch.randn(2, c_in, 8, 8), torch.randn(2, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(x, F.silu(embedding), None), reference(x, embedding), rtol=1e-4, atol=1e-4)


def test_self_attention_equals_diffusers():
    torch.manual_seed(0)
    ours = randomise(SelfAttention(128, 4))
    reference = DiffusersAttention(
        128, heads=4, dim_head=32, bias=True, norm_num_groups=32, eps=1e-5, residual_connection=True
    ).eval()
    state = ours.state_dict()
    weights, biases = state["qkv.weight"].flatten(1).chunk(3), state["qkv.bias"].chunk(3)
    mapped = {"group_norm.weight": state["norm.weight"], "group_norm.bias": state["norm.bias"]}
    for name, weight, bias in zip(("to_q", "to_k", "to_v"), weights, biases, strict=True):
        mapped |= {f"{name}.weight": weight, f"{name}.bias": bias}
    mapped |= {"to_out.0.weight": state["out.weight"].flatten(1), "to_out.0.bias": state["out.bias"]}
    reference.load_state_dict(mapped)
    x = torch.randn(2, 128, 4, 4)
    with torch.no_grad():
        torch.testing.assert_close(ours(x, torch.empty(0), None), reference(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mask", [None, torch.arange(3) < torch.tensor([[1], [3]])], ids=["all", "masked"])
@pytest.mark.parametrize("depth", [1, 3])
def test_transformer_blocks_equal_diffusers(depth, mask):
    torch.manual_seed(0)
    ours = randomise(SpatialTransformer(128, 48, 4, depth))
    names = {"norm_self": "norm1", "norm_cross": "norm2", "norm_feed": "norm3"}
    for ours_name, theirs in (("attend_self", "attn1"), ("attend_cross", "attn2")):
        names |= {f"{ours_name}.query": f"{theirs}.to_q", f"{ours_name}.key": f"{theirs}.to_k"}
        names |= {f"{ours_name}.value": f"{theirs}.to_v", f"{ours_name}.out": f"{theirs}.to_out.0"}
    names |= {"feed.fc1": "ff.net.0.proj", "feed.fc2": "ff.net.2"}
    frame = ("norm.", "conv_in", "conv_out", "further")
    first = {name: value for name, value in ours.state_dict().items() if not name.startswith(frame)}
    x, tokens = torch.randn(2, 128, 4, 4), torch.randn(2, 3, 48)
    with torch.no_grad():
        inside = ours.conv_in(ours.norm(x)).flatten(2).transpose(1, 2)
        for state in (first, *(block.state_dict() for block in ours.further)):
            reference = BasicTransformerBlock(128, 4, 32, cross_attention_dim=48).eval()
            holder = type("Holder", (), {"state_dict": lambda self, state=state: state})()
            copy_into(reference, holder, names)
            inside = reference(inside, encoder_hidden_states=tokens, encoder_attention_mask=_bias(mask))
        expected = x + ours.conv_out(inside.transpose(1, 2).reshape_as(x))
        torch.testing.assert_close(ours(x, torch.empty(0), tokens, mask), expected, rtol=1e-4, atol=1e-4)


def _bias(mask):
    """As diffusers' networks hand a mask (N, M) on to their blocks: (N, 1, M), added to the scores."""
    return None if mask is None else (~mask * -10_000.0)[:, None]


def test_a_single_transformer_block_keeps_its_names_and_their_order():
    """By which the weights and the optimizers of every older checkpoint are loaded; further blocks add to them."""
    linear, plain = ("query.weight", "key.weight", "value.weight", "out.weight", "out.bias"), ("weight", "bias")
    parts = {"norm": plain, "conv_in": plain, "norm_self": plain, "attend_self": linear, "norm_cross": plain}
    parts |= {"attend_cross": linear, "norm_feed": plain}
    parts |= {"feed": ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"), "conv_out": plain}
    names = [f"{part}.{name}" for part, of in parts.items() for name in of]
    assert list(SpatialTransformer(8, 6, 1).state_dict()) == names
    deeper = list(SpatialTransformer(8, 6, 1, depth=3).state_dict())
    assert [name for name in deeper if not name.startswith("further.")] == names
    assert len(deeper) == len(names) + 2 * 20


def test_starts_as_zero():
    net = UNet(4, 32, (1, 2), 1, (1,), num_heads=4)
    out = net(torch.randn(2, 4, 8, 8), torch.tensor([1.0, 2.0]), Conditioning())
    assert out.shape == (2, 4, 8, 8)
    assert not out.any()


@pytest.mark.parametrize("depth", [1, 2])
def test_rows_do_not_mix_and_nothing_is_random(depth):
    net = tiny(
        vector_channels=16,
        context_dim=12,
        spatial_channels=2,
        scale_shift=True,
        resample_in_blocks=True,
        transformer_depth=depth,
    )
    x, level = torch.randn(3, 4, 8, 8), torch.tensor([0.0, 500.0, 999.0])
    vector, tokens, spatial = torch.randn(3, 16), torch.randn(3, 5, 12), torch.randn(3, 2, 8, 8)
    with torch.no_grad():
        together = net(x, level, Conditioning(vector, tokens, spatial))
        alone = net(x[1:2], level[1:2], Conditioning(vector[1:2], tokens[1:2], spatial[1:2]))
        torch.testing.assert_close(together[1:2], alone, rtol=1e-4, atol=1e-5)
        # Every input is heard.
        for changed in (
            net(x, level + 1, Conditioning(vector, tokens, spatial)),
            net(x, level, Conditioning(vector + 1, tokens, spatial)),
            net(x, level, Conditioning(vector, tokens * 2, spatial)),
            net(x, level, Conditioning(vector, tokens, spatial + 1)),
        ):
            assert (changed - together).abs().flatten(1).amax(1).min() > 1e-4


@pytest.mark.parametrize("context_dim", [None, 12])
def test_checkpointing_changes_nothing_but_memory(context_dim):
    tokens = None if context_dim is None else torch.randn(2, 3, 12)
    x, level = torch.randn(2, 4, 8, 8), torch.tensor([3.0, 700.0])
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(1)
        net = tiny(context_dim=context_dim, dropout=0.3, checkpointing=checkpointing).train()
        torch.manual_seed(2)
        with torch.autocast("cpu", torch.bfloat16):  # the second pass must see it too
            out = net(x, level, Conditioning(tokens=tokens))
        out.float().square().sum().backward()
        gradients.append([parameter.grad for parameter in net.parameters()])
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, again, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("changes", "shape", "conditioning", "words"),
    [
        ({}, (2, 3, 8, 8), Conditioning(), ["in_channels", "3, 8, 8"]),
        ({}, (2, 4, 9, 8), Conditioning(), ["divisible by 2", "9"]),
        ({}, (2, 4, 8, 8), Conditioning(vector=torch.zeros(2, 16)), ["vector_channels=None", "16"]),
        ({"vector_channels": 8}, (2, 4, 8, 8), Conditioning(), ["vector_channels=8", "None"]),
        ({"context_dim": 8}, (2, 4, 8, 8), Conditioning(tokens=torch.zeros(2, 1, 9)), ["context_dim=8", "9"]),
        ({"spatial_channels": 1}, (2, 4, 8, 8), Conditioning(), ["spatial_channels=1"]),
    ],
)
def test_inputs_that_do_not_fit_are_named(changes, shape, conditioning, words):
    with pytest.raises(ConfigError) as caught:
        tiny(**changes)(torch.zeros(shape), torch.zeros(shape[0]), conditioning)
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_heads": None}, ["num_heads", "num_head_channels"]),
        ({"num_head_channels": 8}, ["exactly one"]),
        ({"num_heads": 5}, ["64 channels", "num_heads=5"]),
        ({"num_heads": None, "num_head_channels": 48}, ["num_head_channels=48"]),
        ({"attention_levels": (2,)}, ["attention_levels", "0..1"]),
        ({"transformer_depth": 3}, ["transformer_depth=3", "set context_dim"]),
        ({"transformer_depth": 0, "context_dim": 8}, ["transformer_depth=0", "1 or more"]),
    ],
)
def test_parameters_that_contradict_are_named(changes, words):
    with pytest.raises(ConfigError) as caught:
        tiny(**changes)
    assert all(word in str(caught.value) for word in words)
