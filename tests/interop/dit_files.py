"""Files of DiT, SiT and LightningDiT with random weights, under their own names, of any size."""

import math

import torch
from torch import Tensor

from ldm.diffusion.networks.dit import positions

CLASSES = 10


def tensors(
    width: int,
    depth: int,
    *,
    patch: int = 2,
    channels: int = 4,
    side: int = 8,
    outputs: int = 2,
    modern: bool = False,
    heads: int = 0,
) -> dict[str, Tensor]:
    """A network of theirs; `outputs` 2 with a variance, `modern` LightningDiT's, whose heads are then so many.

    Returns:
        {name: weights}, as their `state_dict` has them.
    """
    inner = int(4 * width * 2 / 3) if modern else 4 * width
    shapes = {"x_embedder.proj": (width, channels, patch, patch), "t_embedder.mlp.0": (width, 256)}
    shapes |= {"t_embedder.mlp.2": (width, width), "final_layer.adaLN_modulation.1": (2 * width, width)}
    shapes["final_layer.linear"] = (patch * patch * outputs * channels, width)
    norms = ["final_layer.norm_final"]
    for block in (f"blocks.{n}" for n in range(depth)):
        shapes |= {f"{block}.attn.qkv": (3 * width, width), f"{block}.attn.proj": (width, width)}
        first, second = ("w12", "w3") if modern else ("fc1", "fc2")
        shapes |= {f"{block}.mlp.{first}": ((1 + modern) * inner, width), f"{block}.mlp.{second}": (width, inner)}
        shapes[f"{block}.adaLN_modulation.1"] = (6 * width, width)
        norms += [f"{block}.norm1", f"{block}.norm2"]
    made = {f"{name}.weight": torch.randn(shape) / math.prod(shape[1:]) ** 0.5 for name, shape in shapes.items()}
    made |= {f"{name}.bias": 0.1 * torch.randn(shape[0]) for name, shape in shapes.items()}
    made["y_embedder.embedding_table.weight"] = torch.randn(CLASSES + 1, width)
    made["pos_embed"] = positions(side // patch, side // patch, width, torch.device("cpu"))[None]
    if modern:
        made |= {f"{name}.weight": 1 + 0.1 * torch.randn(width) for name in norms}
        made |= {
            f"feat_rope.freqs_{wave}": torch.zeros((side // patch) ** 2, width // heads) for wave in ("cos", "sin")
        }
    return made
