"""The tensors of diffusers' UNet2DModel and UNet2DConditionModel, and of our UNet and ClassVector."""

import torch
from torch import Tensor, nn

from ldm.diffusion.networks.unet import Downsample, ResBlock, UNet, Upsample
from ldm.diffusion.networks.unet_attention import SelfAttention, SpatialTransformer
from ldm.interop.tables import LINEAR_AS_CONV2D, SAME, Change, Entry, each, layer

QKV_AS_CONV2D = Change(
    lambda tensors: torch.cat([*tensors])[:, :, None, None], lambda tensor: tensor[:, :, 0, 0].chunk(3)
)
QKV_BIAS = Change(lambda tensors: torch.cat([*tensors]), lambda tensor: tensor.chunk(3))


def table_of(network: UNet, linear_projection: bool = False, sines_first: bool = False) -> list[Entry]:
    """Of the network but for what it makes of the conditioning vector.

    Args:
        linear_projection: a transformer's first and last layers are linear, not convolutions (UNet2DConditionModel).
        sines_first: their embedding of the noise level has its sines before its cosines.
    """
    entries = layer("embed.0", "time_embedding.linear_1", _sines_after(network.model_channels) if sines_first else SAME)
    for ours, theirs in (
        ("embed.2", "time_embedding.linear_2"),
        ("conv_in", "conv_in"),
        ("norm_out", "conv_norm_out"),
        ("conv_out", "conv_out"),
    ):
        entries += layer(ours, theirs)
    projection = LINEAR_AS_CONV2D if linear_projection else SAME
    level = 0
    places = _Places()
    for number, chain in enumerate(network.down):
        entries += places.chain(chain, f"down.{number}", f"down_blocks.{level}", "downsamplers", projection)
        if places.resized:
            level, places = level + 1, _Places()
    entries += _Places().chain(network.middle, "middle", "mid_block", "", projection)
    level, places = 0, _Places()
    for number, chain in enumerate(network.up):
        entries += places.chain(chain, f"up.{number}", f"up_blocks.{level}", "upsamplers", projection)
        if places.resized:
            level, places = level + 1, _Places()
    return entries


class _Places:
    """Counts the layers of one of their blocks, while ours go by."""

    def __init__(self) -> None:
        self.blocks = self.attentions = 0
        self.resized = False

    def chain(self, made: nn.Module, ours: str, theirs: str, resize: str, projection: Change) -> list[Entry]:
        entries: list[Entry] = []
        for place, part in made.named_children():
            if isinstance(part, Downsample | Upsample):
                entries += layer(f"{ours}.{place}.conv", f"{theirs}.{resize}.0.conv")
                self.resized = True
            elif isinstance(part, ResBlock) and part.resize != 1:
                entries += _res_block(part, f"{ours}.{place}", f"{theirs}.{resize}.0")
                self.resized = True
            elif isinstance(part, ResBlock):
                entries += _res_block(part, f"{ours}.{place}", f"{theirs}.resnets.{self.blocks}")
                self.blocks += 1
            else:
                entries += _attention(part, f"{ours}.{place}", f"{theirs}.attentions.{self.attentions}", projection)
                self.attentions += 1
        return entries


def _res_block(made: ResBlock, ours: str, theirs: str) -> list[Entry]:
    names = {"norm_in": "norm1", "conv_in": "conv1", "embedding": "time_emb_proj", "norm_out": "norm2"}
    names |= {"conv_out": "conv2"} | ({} if isinstance(made.shortcut, nn.Identity) else {"shortcut": "conv_shortcut"})
    return [entry for own, name in names.items() for entry in layer(f"{ours}.{own}", f"{theirs}.{name}")]


def _attention(made: nn.Module, ours: str, theirs: str, projection: Change) -> list[Entry]:
    if isinstance(made, SelfAttention):
        parts = [f"{theirs}.{name}" for name in ("to_q", "to_k", "to_v")]
        return [
            *layer(f"{ours}.norm", f"{theirs}.group_norm"),
            Entry(f"{ours}.qkv.weight", tuple(f"{name}.weight" for name in parts), QKV_AS_CONV2D),
            Entry(f"{ours}.qkv.bias", tuple(f"{name}.bias" for name in parts), QKV_BIAS),
            *layer(f"{ours}.out", f"{theirs}.to_out.0", LINEAR_AS_CONV2D),
        ]
    assert isinstance(made, SpatialTransformer)
    blocks = [ours, *(f"{ours}.further.{number}" for number in range(len(made.further)))]
    return [
        *layer(f"{ours}.norm", f"{theirs}.norm"),
        *layer(f"{ours}.conv_in", f"{theirs}.proj_in", projection),
        *layer(f"{ours}.conv_out", f"{theirs}.proj_out", projection),
        *(
            entry
            for number, block in enumerate(blocks)
            for entry in _transformer(block, f"{theirs}.transformer_blocks.{number}")
        ),
    ]


def _transformer(ours: str, theirs: str) -> list[Entry]:
    entries = [*layer(f"{ours}.feed.fc1", f"{theirs}.ff.net.0.proj"), *layer(f"{ours}.feed.fc2", f"{theirs}.ff.net.2")]
    for number, name in enumerate(("self", "cross", "feed"), 1):
        entries += layer(f"{ours}.norm_{name}", f"{theirs}.norm{number}")
    for number, name in enumerate(("self", "cross"), 1):
        entries += layer(f"{ours}.attend_{name}.out", f"{theirs}.attn{number}.to_out.0")
        for own, letter in (("query", "q"), ("key", "k"), ("value", "v")):
            entries += layer(f"{ours}.attend_{name}.{own}", f"{theirs}.attn{number}.to_{letter}", bias=None)
    return entries


def _sines_after(channels: int) -> Change:
    """The columns that read sines, then cosines, as columns that read cosines, then sines."""
    half = channels // 2

    def swapped(weight: Tensor) -> Tensor:
        return torch.cat([weight[:, half : 2 * half], weight[:, :half], weight[:, 2 * half :]], dim=1)

    return each(swapped, swapped)
