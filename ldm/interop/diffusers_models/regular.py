"""Networks of ours as ones that classes of diffusers express, and what our pipeline then does in their place.

Two habits of ours no class of the library has: narrow networks whose norms differ in their number of groups, and first
stages that work on patches of pixels. Neither is in the weights, so that a pipeline can do it (carried_pipeline.py).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ldm.interop.diffusers_models.config import arguments, groups
from ldm.interop.models import on_meta


@dataclass(frozen=True)
class Regular:
    """Networks with the same weights as ours.

    Attributes:
        nodes: by part.
        norm_groups: {channels: groups} that the norms have in truth; {}: as the nodes say.
        patch_size: of the pixels that the channels of encoder and decoder hold.
    """

    nodes: Mapping[str, Any]
    norm_groups: Mapping[str, int] = field(default_factory=dict)
    patch_size: int = 1


def of_one_number(nodes: Mapping[str, Any]) -> Regular:
    """The networks with one number of groups for all norms."""
    networks = {name: made for name, made in nodes.items() if "norm_groups" in arguments(made)}
    found = groups(*map(on_meta, networks.values()))
    if len({*found.values()}) <= 1:
        return Regular(nodes)
    common = math.gcd(*found.values())
    regular = {name: {**made, "params": {**made["params"], "norm_groups": common}} for name, made in networks.items()}
    return Regular({**nodes, **regular}, {str(channels): number for channels, number in found.items()})


def without_patches(stage: Regular) -> Regular:
    """A first stage whose encoder and decoder have the pixels of a patch as channels; of a codec without, itself."""
    if "encoder" not in stage.nodes or (size := arguments(stage.nodes["encoder"]).get("patch_size", 1)) == 1:
        return stage
    nodes = dict(stage.nodes)
    for part, key in (("encoder", "in_channels"), ("decoder", "out_channels")):
        params = nodes[part]["params"]
        nodes[part] = {**nodes[part], "params": {**params, key: params[key] * size**2, "patch_size": 1}}
    return replace(stage, nodes=nodes, patch_size=size)
