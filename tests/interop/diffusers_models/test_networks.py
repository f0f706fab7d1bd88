"""UNet2DModel, UNet2DConditionModel and DiTTransformer2DModel: their outputs by our networks, and ours by theirs."""

import inspect
import random

import diffusers
import pytest
import torch

from ldm.diffusion.conditioners.base import Conditioning
from ldm.errors import CheckpointError, ConfigError
from ldm.interop.diffusers_models import dit as diffusers_dit
from ldm.interop.diffusers_models import networks as module
from ldm.interop.diffusers_models import unet_settings as diffusers_unet_settings
from ldm.interop.models import node
from tests.interop.diffusers_files import built, difference, of_diffusers, plain, randomized

CLOSE = 1e-5
TIMES = torch.tensor([3.0, 977.0])
LABELS = torch.tensor([2, 0])
ROWS = 4
WIDE = {"model_channels": 128, "channel_mult": [1, 2], "num_res_blocks": 1, "attention_levels": [0]}
NARROW = {"model_channels": 16, "channel_mult": [1, 2, 2], "num_res_blocks": 2, "norm_groups": 4}
UNETS = {
    "plain": {**WIDE, "num_head_channels": 32},
    "classes": {**NARROW, "attention_levels": [1, 2], "num_head_channels": 8, "vector_channels": 10},
    "ADM": {**NARROW, "num_heads": 1, "scale_shift": True, "resample_in_blocks": True, "vector_channels": 10},
    "one group": {"model_channels": 7, "channel_mult": [1, 1], "num_res_blocks": 1, "num_heads": 1},
    "picture": {**NARROW, "attention_levels": [2], "num_heads": 1, "spatial_channels": 2},
    "the first DDPM": {**NARROW, "num_heads": 1, "norm_eps": 1e-6, "pad_end": True},
    "tokens": {**WIDE, "num_heads": 4, "context_dim": 24},
    "deep tokens": {**NARROW, "attention_levels": [0, 2], "num_head_channels": 8, "context_dim": 24}
    | {"transformer_depth": 2, "scale_shift": True},
    "tokens and classes": {**NARROW, "attention_levels": [1], "num_heads": 2, "context_dim": 24, "vector_channels": 10},
}
DITS = {
    "S": {"patch_size": 2, "hidden_size": 32, "depth": 2, "num_heads": 4},
    "small patches": {"patch_size": 1, "hidden_size": 48, "depth": 1, "num_heads": 3},
    "picture and vector": {"patch_size": 4, "hidden_size": 32, "depth": 3, "num_heads": 2}
    | {"spatial_channels": 2, "vector_channels": 10},
}


def unet(in_channels=3, **sizes):
    return node("diffusion.networks.unet.UNet", in_channels=in_channels, **sizes)


def dit(in_channels=4, **sizes):
    return node("diffusion.networks.dit.DiT", in_channels=in_channels, **sizes)


def vectors_of(network):
    """Class rows as `exported` takes them, and the rows that our network is given."""
    layer = getattr(network, "embed_vector", None)
    if layer is None:
        width = getattr(network, "hidden_size", None)
        rows = None if width is None else torch.randn(ROWS, width)
        return rows, rows
    rows = torch.randn(ROWS, layer.in_features)
    return (rows.double() @ layer.weight.double().T + layer.bias.double()).float(), rows


def compare(ours, theirs, rows):
    """Both networks on the same noise, times and conditions."""
    if isinstance(theirs, diffusers.DiTTransformer2DModel):
        as_published(theirs)
    size = 8
    x = torch.randn(2, ours.in_channels, size, size)
    picture = torch.randn(2, ours.spatial_channels, size, size) if ours.spatial_channels else None
    width = getattr(ours, "context_dim", None)
    tokens = None if width is None else torch.randn(2, 5, width)
    conditioning = Conditioning(None if rows is None else rows[LABELS], tokens, picture)
    given = {} if rows is None else {"class_labels": LABELS}
    given |= {} if tokens is None else {"encoder_hidden_states": tokens}
    found = ours(x, TIMES, conditioning)
    expected = theirs(x if picture is None else torch.cat([x, picture], dim=1), TIMES, **given).sample
    assert difference(found, expected[:, : found.shape[1]]) < CLOSE


def as_published(theirs):
    """Frequencies and epsilon of the published DiT, which the library's class has not."""
    for block in theirs.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
        block.norm3.eps = 1e-6


def imported_network(config, tensors, name, **more):
    found = module.imported(config | {"_class_name": name}, tensors, "config.json", "weights", **more)
    ours = built(found.params["network"])
    own = {key.removeprefix("network."): one for key, one in found.weights.items() if key.startswith("network.")}
    ours.load_state_dict(own)
    return found, ours, own


@pytest.mark.parametrize("name", module.CLASSES)
def test_every_setting_is_known_with_its_default(name):
    parameters = inspect.signature(getattr(diffusers, name).__init__).parameters
    defaults = {key: one.default for key, one in parameters.items() if key != "self"}
    expected = {**diffusers_unet_settings.DEFAULTS, diffusers_dit.NAME: diffusers_dit.DEFAULTS}[name]
    assert plain(defaults) == {key: value for key, value in expected.items() if key in defaults}
    # The one that a UNet2DConditionModel lacks is said anyway, since it is the same for both classes.
    assert expected.keys() >= defaults.keys()


@pytest.mark.parametrize(
    "node",
    [*(unet(**sizes) for sizes in UNETS.values()), *(dit(**sizes) for sizes in DITS.values())],
    ids=[*UNETS, *DITS],
)
def test_ours_computes_the_same_there_and_comes_back(node):
    ours = built(node)
    vectors, rows = vectors_of(ours)
    out = module.exported(node, ours.state_dict(), vectors, 8)
    theirs = of_diffusers(out.class_name, out.config, out.tensors)
    assert plain(theirs.config) == out.config
    compare(ours, theirs, rows)
    found, _, own = imported_network(out.config, out.tensors, out.class_name, no_class=True)
    returned = module.exported(found.params["network"], own, found.weights.get("conditioner.table.weight"), 8)
    assert (returned.class_name, returned.config) == (out.class_name, out.config)
    assert returned.tensors.keys() == out.tensors.keys()
    assert all(torch.equal(returned.tensors[key], one) for key, one in out.tensors.items())


THEIRS = {
    "UNet2DModel": {
        "attentive": {
            "block_out_channels": [32, 64],
            "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
            "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
        },
        "google/ddpm": {
            "block_out_channels": [32, 32, 64],
            "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D"],
            "up_block_types": ["UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
            "attention_head_dim": None,
            "downsample_padding": 0,
            "flip_sin_to_cos": False,
            "freq_shift": 1,
            "norm_eps": 1e-6,
        },
        "classes in residual blocks": {
            "block_out_channels": [32, 64],
            "down_block_types": ["ResnetDownsampleBlock2D", "AttnDownBlock2D"],
            "up_block_types": ["AttnUpBlock2D", "ResnetUpsampleBlock2D"],
            "downsample_type": "resnet",
            "upsample_type": "resnet",
            "resnet_time_scale_shift": "scale_shift",
            "attn_norm_num_groups": 32,
            "num_class_embeds": ROWS,
        },
    },
    "UNet2DConditionModel": {
        "like Stable Diffusion 1": {
            "block_out_channels": [32, 64],
            "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
            "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
            "cross_attention_dim": 24,
            "attention_head_dim": 4,
        },
        "like Stable Diffusion 2": {
            "block_out_channels": [32, 64],
            "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
            "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
            "cross_attention_dim": 24,
            "attention_head_dim": [2, 4],
            "use_linear_projection": True,
        },
        "lists": {
            "block_out_channels": [32, 32],
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
            "cross_attention_dim": [24, 24],
            "transformer_layers_per_block": [1, 2],
            "attention_head_dim": [8, 4],
            "layers_per_block": [1, 1],
            "in_channels": 6,
        },
    },
}
CASES = [(name, case) for name, cases in THEIRS.items() for case in cases]


@pytest.mark.parametrize(("name", "case"), CASES)
def test_theirs_computes_the_same_here(name, case):
    theirs = of_diffusers(name, THEIRS[name][case])
    found, ours, _ = imported_network(plain(theirs.config), theirs.state_dict(), name)
    rows = found.weights.get("conditioner.table.weight")
    compare(ours, theirs, rows)
    if rows is not None:  # a table without "no class"
        assert len(rows) == ROWS + 1
        assert not rows[-1].any()
        assert not found.knows_null
        assert found.params["conditioner"]["params"]["num_classes"] == ROWS


def equal_blocks(theirs):
    for block in theirs.transformer_blocks[1:]:
        block.norm1.emb.load_state_dict(theirs.transformer_blocks[0].norm1.emb.state_dict())
    return theirs


@pytest.mark.parametrize("out_channels", [None, 8, 3])
def test_a_dit_of_theirs_computes_the_same_here(out_channels):
    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "num_embeds_ada_norm": ROWS - 1}
    theirs = equal_blocks(of_diffusers(diffusers_dit.NAME, {**sizes, "sample_size": 8, "out_channels": out_channels}))
    found, ours, _ = imported_network(plain(theirs.config), theirs.state_dict(), diffusers_dit.NAME)
    assert found.knows_null
    assert found.params["conditioner"]["params"] == {"num_classes": ROWS - 1, "channels": 16}
    assert any("epsilon of 1e-05" in note for note in found.notes)
    assert any("variances" in note for note in found.notes) == (out_channels == 8)
    compare(ours, theirs, found.weights["conditioner.table.weight"])


def test_a_dit_whose_blocks_embed_in_their_own_way_is_none_of_ours():
    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "sample_size": 8}
    theirs = of_diffusers(diffusers_dit.NAME, sizes)
    with pytest.raises(CheckpointError, match=r"transformer_blocks\.1\.norm1\.emb\.\S+ differs from \S+blocks\.0"):
        imported_network(plain(theirs.config), theirs.state_dict(), diffusers_dit.NAME)


def test_whatever_is_accepted_computes_the_same():
    draws = random.Random(7)
    accepted = refused = 0
    for _ in range(16):
        levels = draws.randint(1, 3)
        sizes = {
            "model_channels": draws.choice([8, 12, 32]),
            "channel_mult": [1] + [draws.choice([1, 2, 3]) for _ in range(levels - 1)],
            "num_res_blocks": draws.randint(1, 2),
            "attention_levels": [level for level in range(levels) if draws.random() < 0.5],
            **draws.choice([{"num_heads": 1}, {"num_heads": 2}, {"num_head_channels": 4}]),
            "context_dim": draws.choice([None, None, 10]),
            "vector_channels": draws.choice([None, 6]),
            "spatial_channels": draws.choice([0, 0, 1]),
            "scale_shift": draws.random() < 0.5,
            "resample_in_blocks": draws.random() < 0.4,
            "norm_groups": draws.choice([None, 4, 4]),
            "norm_eps": draws.choice([1e-5, 1e-6]),
            "pad_end": draws.random() < 0.3,
        }
        if sizes["context_dim"]:
            sizes["transformer_depth"] = draws.randint(1, 2)
        made = unet(**sizes)
        ours = built(made)
        vectors, rows = vectors_of(ours)
        try:
            out = module.exported(made, ours.state_dict(), vectors)
        except ConfigError as error:
            refused += 1
            assert any(key in str(error) for key in ("norm_groups", "num_heads", "resample_in_blocks"))  # noqa: PT017
            continue
        accepted += 1
        compare(ours, of_diffusers(out.class_name, out.config, out.tensors), rows)
        found, _, own = imported_network(out.config, out.tensors, out.class_name, no_class=True)
        returned = module.exported(found.params["network"], own, found.weights.get("conditioner.table.weight"))
        assert returned.config == out.config
        assert all(torch.equal(returned.tensors[key], one) for key, one in out.tensors.items())
    assert accepted > 4
    assert refused > 1


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("UNet2DModel", {"center_input_sample": True}, "center_input_sample=True: expected False"),
        ("UNet2DModel", {"time_embedding_type": "fourier"}, "time_embedding_type='fourier'"),
        ("UNet2DModel", {"freq_shift": 2}, "freq_shift=2: expected 0 or 1"),
        ("UNet2DModel", {"act_fn": "mish"}, "act_fn='mish'"),
        ("UNet2DModel", {"class_embed_type": "timestep"}, "class_embed_type='timestep'"),
        ("UNet2DModel", {"add_attention": False}, "add_attention=False: expected True"),
        ("UNet2DModel", {"norm_num_groups": 48}, "norm_num_groups=48: does not divide"),
        ("UNet2DModel", {"resnet_time_scale_shift": "scale_shift"}, "attn_norm_num_groups=None: expected 32"),
        ("UNet2DModel", {"down_block_types": ["SkipDownBlock2D"] * 4}, "down_block_types="),
        ("UNet2DModel", {"up_block_types": ["UpBlock2D"] * 4}, "up_block_types="),
        ("UNet2DModel", {"out_channels": 6}, "out_channels=6: expected as many as in_channels=3"),
        ("UNet2DModel", {"downsample_type": "resnet"}, "down_block_types="),
        ("UNet2DConditionModel", {"attention_head_dim": [8, 8, 8, 10]}, "attention_head_dim=[8, 8, 8, 10]"),
        ("UNet2DConditionModel", {"transformer_layers_per_block": [1, 1, 2, 1]}, "transformer_layers_per_block="),
        ("UNet2DConditionModel", {"addition_embed_type": "text_time"}, "addition_embed_type='text_time'"),
        ("UNet2DConditionModel", {"encoder_hid_dim": 10}, "encoder_hid_dim=10: expected None"),
        ("UNet2DConditionModel", {"only_cross_attention": [True, False]}, "only_cross_attention="),
        ("UNet2DConditionModel", {"time_cond_proj_dim": 256}, "time_cond_proj_dim=256"),
        ("DiTTransformer2DModel", {"activation_fn": "geglu"}, "activation_fn='geglu'"),
        ("DiTTransformer2DModel", {"norm_elementwise_affine": True}, "norm_elementwise_affine=True"),
        ("DiTTransformer2DModel", {"norm_type": "ada_norm_single"}, "norm_type='ada_norm_single'"),
        ("DiTTransformer2DModel", {"num_layers": 10**8}, "num_layers=100000000"),
    ],
)
def test_settings_that_ours_cannot_express(name, changes, words):
    with pytest.raises(ConfigError) as error:
        module.imported({"_class_name": name, **changes}, {}, "folder/config.json", "weights")
    assert str(error.value).startswith("folder/config.json: ")
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (unet(**NARROW | {"norm_groups": None}, num_heads=1), "norm_groups=None: one number for all norms"),
        (unet(**{**WIDE, "attention_levels": [0, 1]}, num_heads=2), "num_heads: one width for all in diffusers"),
        (unet(**{**WIDE, "channel_mult": [2, 2]}, num_heads=1), "channel_mult=[2, 2]: the first is 1"),
        (unet(**WIDE, num_heads=1, context_dim=8, resample_in_blocks=True), "resample_in_blocks=True"),
        (unet(**WIDE, num_heads=1, longest_period=300.0), "longest_period=300"),
        (dit(**DITS["S"], rope=True), "rope=True"),
        (dit(**DITS["S"], swiglu=True, qk_norm=True), "qk_norm=True"),
        (dit(**DITS["S"], mlp_ratio=2.0), "mlp_ratio=2.0: 4 in diffusers"),
        (dit(**DITS["S"], context_dim=8), "context_dim=8: diffusers' has no tokens"),
    ],
)
def test_parameters_that_theirs_cannot_express(made, words):
    with pytest.raises(ConfigError) as error:
        module.exported(made, {}, None, 8, "the model")
    assert words in str(error.value)


def test_latents_of_a_dit_are_squares():
    with pytest.raises(ConfigError, match="latents of 8x16: squares alone"):
        module.exported(dit(**DITS["S"]), {}, None, [8, 16])


def test_networks_that_diffusers_has_not():
    made = node("diffusion.networks.edm2.MagnitudePreservingUNet", in_channels=4, model_channels=16)
    with pytest.raises(ConfigError, match=r"MagnitudePreservingUNet: expected UNet or DiT"):
        module.exported(made, {})


def test_a_dit_without_classes_ignores_the_label():
    made = dit(**DITS["S"])
    ours = built(made)
    out = module.exported(made, ours.state_dict(), None, 8)
    theirs = of_diffusers(out.class_name, out.config, out.tensors)
    as_published(theirs)
    x = torch.randn(2, 4, 8, 8)
    expected = theirs(x, TIMES, torch.tensor([0, 1])).sample
    assert difference(ours(x, TIMES, Conditioning()), expected) < CLOSE


def test_a_table_of_class_tokens():
    made = unet(**NARROW, attention_levels=[1], num_heads=2, context_dim=24)
    ours = built(made)
    rows = torch.randn(ROWS, 24)
    out = module.exported(made, ours.state_dict())
    config = out.config | {"encoder_hid_dim": ROWS, "encoder_hid_dim_type": "text_proj"}
    tensors = out.tensors | {"encoder_hid_proj.weight": rows.T.clone(), "encoder_hid_proj.bias": torch.zeros(24)}
    found, again, _ = imported_network(config, tensors, out.class_name, class_tokens=True)
    assert torch.equal(found.weights["conditioner.table.weight"], rows)
    assert found.params["conditioner"] == node(
        "diffusion.conditioners.classes.ClassToken", num_classes=ROWS - 1, channels=24
    )
    theirs = of_diffusers(out.class_name, config, tensors)
    x, one_hot = torch.randn(2, 3, 8, 8), torch.eye(ROWS)[LABELS][:, None]
    expected = theirs(x, TIMES, one_hot).sample
    assert difference(again(x, TIMES, Conditioning(tokens=rows[LABELS][:, None])), expected) < CLOSE


def test_tensors_have_memory_of_their_own():
    made = dit(**DITS["S"])
    out = module.exported(made, randomized(built(made)).state_dict(), torch.randn(ROWS, 32), 8)
    storages = [one.untyped_storage() for one in out.tensors.values()]
    assert len({one.data_ptr() for one in storages}) == len(storages)
    assert all(one.untyped_storage().nbytes() == one.nbytes for one in out.tensors.values())
