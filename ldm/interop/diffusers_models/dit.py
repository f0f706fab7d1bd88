"""DiTTransformer2DModel of diffusers, and our DiT: config.json and tensors, both ways.

Their class differs from the DiT that was published (facebookresearch/DiT), and from ours, in three things.
Each of their blocks embeds the noise level and the class with layers of its own: a model trained elsewhere has the same
numbers in all of them, and only such a one is a model of ours. Its frequencies are 10000^(-k/127) where DiT's are
10000^(-k/128), and its second norms have an epsilon of 1e-5 where DiT's have 1e-6: that is diffusers' arithmetic, not
what weights with equal blocks were trained with, so ours reads them as DiT does.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ldm.diffusion.networks.dit import DiT
from ldm.errors import CheckpointError
from ldm.interop.diffusers_models.config import OTHERWISE, Settings, arguments, raise_all
from ldm.interop.models import node
from ldm.interop.tables import Change, Entry, each, layer

NAME = "DiTTransformer2DModel"
DEFAULTS: Mapping[str, Any] = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": None,
    "num_layers": 28,
    "dropout": 0.0,
    "norm_num_groups": 32,
    "attention_bias": True,
    "sample_size": 32,
    "patch_size": 2,
    "activation_fn": "gelu-approximate",
    "num_embeds_ada_norm": 1000,
    "upcast_attention": False,
    "norm_type": "ada_norm_zero",
    "norm_elementwise_affine": False,
    "norm_eps": 1e-5,
}
"""Every setting of the class, with its default."""
# Settings of Transformer2DModel, which this class was a part of, that its files say still and that are not off.
_FORMER = {"attention_type": "default", "interpolation_scale": None}
_ONLY: Mapping[str, Sequence[Any]] = {
    "attention_bias": (True,),
    "activation_fn": ("gelu-approximate",),
    "norm_type": ("ada_norm_zero",),
    "norm_elementwise_affine": (False,),
    "norm_eps": (1e-5, 1e-6),
    "dropout": (0.0,),
    **{key: (value,) for key, value in _FORMER.items()},
}
NOTE = (
    "diffusers makes other pictures of these weights: it takes frequencies 10000^(-k/127) of the noise level in place "
    "of DiT's 10000^(-k/128), and in its second norms an epsilon of {eps:g} in place of 1e-6."
)


def from_config(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The node of our DiT.

    Raises:
        ConfigError: names every setting that our network cannot express.
    """
    settings = Settings(config, {**DEFAULTS, **_FORMER}, where)
    settings.only(_ONLY)
    heads, width = settings.whole("num_attention_heads"), settings.whole("attention_head_dim")
    given = settings.whole("in_channels")
    out = given if settings.values["out_channels"] is None else settings.whole("out_channels")
    if out > given and out != 2 * given:
        settings.refuse("out_channels", f"expected at most in_channels={given}, or twice that (with variances)")
    settings.whole("num_embeds_ada_norm")
    own = min(out, given)
    params = {
        "in_channels": own,
        "patch_size": settings.whole("patch_size"),
        "hidden_size": heads * width,
        "depth": settings.whole("num_layers"),
        "num_heads": heads,
        "spatial_channels": given - own,
    }
    settings.check()
    return node("diffusion.networks.dit.DiT", **params)


def to_config(
    network: Mapping[str, Any],
    num_classes: int,
    sample_size: int | Sequence[int] | None = None,
    where: str = "the network",
) -> tuple[str, dict[str, Any]]:
    """(class, config.json) of our DiT's node, with the epsilon that it has.

    Args:
        network: the node.
        num_classes: labels are 0 .. num_classes - 1; the row after them is "no class".
        sample_size: side of the latents, or (height, width).
        where: what is exported, for messages.

    Raises:
        ConfigError: names every parameter that diffusers' class cannot express.
    """
    sizes = arguments(network)
    problems = [f"{key}=True: diffusers has none" for key in ("rms_norm", "swiglu", "rope", "qk_norm") if sizes[key]]
    if sizes["mlp_ratio"] != 4:
        problems.append(f"mlp_ratio={sizes['mlp_ratio']}: 4 in diffusers")
    if sizes["absolute_positions"] is False:
        problems.append("absolute_positions=False: True in diffusers")
    if sizes["context_dim"] is not None:
        problems.append(f"context_dim={sizes['context_dim']}: diffusers' has no tokens")
    sides = [sample_size] if sample_size is None or isinstance(sample_size, int) else [*sample_size]
    if len({*sides}) > 1:
        problems.append(f"latents of {sides[0]}x{sides[1]}: squares alone in diffusers")
    raise_all(where, f"diffusers' {NAME} cannot express", problems, OTHERWISE)
    return NAME, dict(DEFAULTS) | {
        "num_attention_heads": sizes["num_heads"],
        "attention_head_dim": sizes["hidden_size"] // sizes["num_heads"],
        "in_channels": sizes["in_channels"] + sizes["spatial_channels"],
        "out_channels": sizes["in_channels"],
        "num_layers": sizes["depth"],
        "sample_size": DEFAULTS["sample_size"] if sides[0] is None else sides[0],
        "patch_size": sizes["patch_size"],
        "num_embeds_ada_norm": num_classes,
        "norm_eps": 1e-6,
    }


def table_of(network: DiT, out_channels: int | None = None) -> list[Entry]:
    """Of the network, without what it makes of a vector of another width.

    Args:
        out_channels: of theirs: twice as many as ours if it also outputs variances, which are left out.
    """
    own, patch = network.in_channels, network.patch_size
    given = own + network.spatial_channels
    as_convolution = each(lambda weight: weight.flatten(1), lambda weight: weight.unflatten(1, (given, patch, patch)))
    rows = _output_rows(own, out_channels or own, patch)
    entries = [
        *layer("patches", "pos_embed.proj", as_convolution),
        *layer("modulation_out", "proj_out_1"),
        *layer("out", "proj_out_2", rows, rows),
    ]
    for place, name in (("embed.0", "linear_1"), ("embed.2", "linear_2")):
        for kind in ("weight", "bias"):
            entries += _everywhere(f"{place}.{kind}", f"timestep_embedder.{name}.{kind}", len(network.layers))
    for number in range(len(network.layers)):
        ours, theirs = f"layers.{number}", f"transformer_blocks.{number}"
        parts = [f"{theirs}.attn1.to_{letter}" for letter in "qkv"]
        joined = Change(lambda tensors: torch.cat([*tensors]), lambda tensor: tensor.chunk(3))
        entries += [
            Entry(f"{ours}.attention.qkv.{kind}", tuple(f"{name}.{kind}" for name in parts), joined)
            for kind in ("weight", "bias")
        ]
        entries += layer(f"{ours}.attention.out", f"{theirs}.attn1.to_out.0")
        entries += layer(f"{ours}.feed.fc1", f"{theirs}.ff.net.0.proj")
        entries += layer(f"{ours}.feed.fc2", f"{theirs}.ff.net.2")
        entries += layer(f"{ours}.modulation", f"{theirs}.norm1.linear")
    return entries


def class_table(ours: str, blocks: int) -> list[Entry]:
    """The table of classes, the last row of which is that of no class."""
    return _everywhere(f"{ours}.weight", "class_embedder.embedding_table.weight", blocks)


def _everywhere(ours: str, theirs: str, blocks: int) -> list[Entry]:
    """A tensor of ours that is in each of their blocks."""
    names = tuple(f"transformer_blocks.{number}.norm1.emb.{theirs}" for number in range(blocks))
    return [Entry(ours, names, Change(lambda tensors: tensors[0], lambda tensor: [tensor] * blocks))]


def check_equal_blocks(tensors: Mapping[str, Tensor], origin: str) -> None:
    """CheckpointError unless all blocks embed the noise level and the class with the same numbers."""
    first = "transformer_blocks.0.norm1.emb."
    for name, tensor in tensors.items():
        _, marked, rest = name.partition(".norm1.emb.")
        expected = tensors.get(first + rest) if marked else None
        if expected is not None and expected.shape == tensor.shape and not torch.equal(expected, tensor):
            raise CheckpointError(
                f"{origin}: {name} differs from {first + rest}. Each block embeds the noise level and the class in its "
                f"own way, as diffusers' class does when it is trained; our DiT, like the published one, has one "
                f"embedding for all of its blocks, so this is no model of ours"
            )


def _output_rows(own: int, out: int, patch: int) -> Change:
    """Rows of the last layer: theirs (p, p, out), ours (own, p, p); theirs beyond `own` channels are left out."""

    def ours(tensor: Tensor) -> Tensor:
        return tensor.unflatten(0, (patch, patch, out))[:, :, :own].movedim(2, 0).flatten(0, 2)

    def theirs(tensor: Tensor) -> Tensor:
        rows = tensor.unflatten(0, (own, patch, patch)).movedim(0, 2)  # (p, p, own, ...)
        missing = rows.new_zeros(patch, patch, out - own, *rows.shape[3:])
        return torch.cat([rows, missing], dim=2).flatten(0, 2)

    return each(ours, theirs)
