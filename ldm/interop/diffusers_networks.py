"""A network of ours and its class table as a model of diffusers, and the way back.

In diffusers a class table is a part of the network, and its rows are as wide as the embedding of the noise level, to
which they are added. Ours belongs to the conditioner (ClassVector), and a UNet brings its rows to that width by a
linear layer of its own. So going out that layer is applied to the rows, and coming in it is the identity.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ldm.diffusion.networks.dit import DiT
from ldm.diffusion.networks.unet import UNet
from ldm.interop import diffusers_dit as dit
from ldm.interop import diffusers_unet as unet
from ldm.interop.diffusers_autoencoder_table import present_names
from ldm.interop.diffusers_config import Exported, apart, arguments, on_meta, raise_all
from ldm.interop.diffusers_unet_settings import DEFAULTS
from ldm.interop.diffusers_unet_table import table_of
from ldm.interop.models import node
from ldm.interop.tables import Dropped, Entry, Fitted, each, to_ours, to_theirs, under

UNETS = tuple(DEFAULTS)
CLASSES = (*UNETS, dit.NAME)
"""The classes that are read and written here."""
NULL_ROW = "_null_class"
"""In a config.json that was written here: the class label of "no class", which the network was trained with. diffusers
takes no notice of keys that begin with an underscore."""

_VECTOR = "ldm.diffusion.conditioners.classes.ClassVector"
_JOINT = "ldm.diffusion.conditioners.joint.Joint"
_NO_VECTOR = ("ldm.diffusion.conditioners.base.Unconditional", "ldm.diffusion.conditioners.classes.ClassToken")


@dataclass(frozen=True)
class Imported:
    """A model of diffusers in our terms.

    Attributes:
        params: nodes of `network` and, unless it reads tokens of another model, `conditioner`.
        weights: `network...`, `conditioner...`.
        dropped: {reason: number of tensors}.
        notes: what a person should know, a sentence each.
        classes_dropped: it was trained with "no class", too.
    """

    params: Mapping[str, Any]
    weights: Mapping[str, Tensor]
    dropped: Mapping[str, int]
    notes: Sequence[str] = ()
    classes_dropped: bool = False


# ---- out -------------------------------------------------------------------------------------------------------


def exported(
    params: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    sample_size: int | Sequence[int] | None = None,
    where: str = "the model",
) -> Exported:
    """The network of a model of ours as a model of diffusers, with the class table if it has one.

    What else the conditioner holds (tokens, pictures) is not a part of their network.

    Args:
        params: of LatentDiffusion: nodes of network and conditioner; label_dropout.
        weights: `network...`, `conditioner...`.
        sample_size: side of the latents, or (height, width).
        where: what is exported, for messages.

    Raises:
        ConfigError: names everything that no class of diffusers can express.
    """
    network = params["network"]
    made = on_meta(network)
    if not isinstance(made, UNet | DiT):
        raise_all(where, "diffusers has no class for", [f"network={network['target']}: expected UNet or DiT"])
    rows, own = _class_rows(params, weights, where), _of_network(weights)
    if isinstance(made, DiT):
        return _dit(made, network, own, rows, sample_size, where)
    assert isinstance(made, UNet)
    if rows is not None and len(rows) == 1:  # data without classes: the same row for every picture
        own["embed.2.bias"] = own["embed.2.bias"] + rows[0]
        rows = None
    name, config = unet.to_config(network, None if rows is None else len(rows), sample_size, where)
    theirs = to_theirs(table_of(made), own)
    if rows is not None:
        theirs["class_embedding.weight"] = rows
        config |= {NULL_ROW: len(rows) - 1} if params.get("label_dropout", 0) > 0 else {}
    return Exported(name, config, apart(theirs))


def _dit(
    made: DiT,
    network: Mapping[str, Any],
    own: Mapping[str, Tensor],
    rows: Tensor | None,
    sample_size: int | Sequence[int] | None,
    where: str,
) -> Exported:
    if rows is None:
        rows = torch.zeros(1, made.hidden_size)
    rows = rows if len(rows) > 1 else rows.repeat(2, 1)  # theirs has one class at least, and "no class"
    name, config = dit.to_config(network, len(rows) - 1, sample_size, where)
    table = [*under(dit.table_of(made), "network."), *_dit_classes(len(made.layers))]
    weights = {f"network.{key}": one for key, one in own.items()} | {"conditioner.table.weight": rows}
    return Exported(name, config, apart(to_theirs(table, weights)))


def _class_rows(params: Mapping[str, Any], weights: Mapping[str, Tensor], where: str) -> Tensor | None:
    """What each class, and last "no class", adds to the embedding of the noise level: (classes + 1, width), or None."""
    places = [place for place, one in _parts(params["conditioner"]) if one["target"] == _VECTOR]
    others = [one["target"] for _, one in _parts(params["conditioner"]) if one["target"] not in (_VECTOR, *_NO_VECTOR)]
    projected = weights.get("network.embed_vector.weight")
    reads_vector = bool(places) or projected is not None
    if not reads_vector:
        return None
    if len(places) != 1 or (others and arguments(params["network"]).get("context_dim") is None):
        raise_all(
            where, "diffusers cannot express", [f"conditioner: a vector of {places or others}; ClassVector alone"]
        )
    rows = weights[f"{places[0]}table.weight"]
    if projected is None:
        return rows
    bias = weights["network.embed_vector.bias"]
    return (rows.double() @ projected.double().T + bias.double()).float()


def _parts(conditioner: Mapping[str, Any], place: str = "conditioner.") -> list[tuple[str, Mapping[str, Any]]]:
    """A conditioner, or the several of a Joint, with the beginning of the names of their weights."""
    if conditioner["target"] != _JOINT:
        return [(place, conditioner)]
    parts = conditioner["params"]["conditioners"].items()
    return [one for name, part in parts for one in _parts(part, f"{place}conditioners.{name}.")]


def _of_network(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without the layer that brings the class to the width of the embedding."""
    own = {name.removeprefix("network."): one for name, one in weights.items() if name.startswith("network.")}
    return {name: one for name, one in own.items() if not name.startswith("embed_vector.")}


# ---- in --------------------------------------------------------------------------------------------------------


def imported(config: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str, origin: str) -> Imported:
    """A network of diffusers in our terms.

    Args:
        config: config.json; its `_class_name` is one of CLASSES.
        tensors: its state_dict; attention may have the names that it had before diffusers 0.15.
        where: the file of `config`, for messages.
        origin: the weights and what they are taken for, for messages.

    Raises:
        ConfigError: names every setting that our network cannot express.
        CheckpointError: tensors that do not fit, or a DiT whose blocks differ where ours has one layer for all.
    """
    if config["_class_name"] == dit.NAME:
        return _imported_dit(config, tensors, where, origin)
    network = unet.from_config(config, where)
    made = on_meta(network)
    assert isinstance(made, UNet)
    linear, sines_first = bool(config.get("use_linear_projection")), config.get("flip_sin_to_cos") is False
    table = under(table_of(made, linear, sines_first), "network.")
    shapes = {f"network.{name}": one.shape for name, one in made.state_dict().items()}
    rows = config.get("num_class_embeds")
    if rows is None:
        fitted = to_ours(table, present_names(tensors), shapes, origin)
        unread = (
            {}
            if "context_dim" in network["params"]
            else {"conditioner": node("diffusion.conditioners.base.Unconditional")}
        )
        return Imported({"network": network} | unread, fitted.weights, fitted.dropped)
    width, known_null = shapes["network.embed_vector.bias"][0], config.get(NULL_ROW) == rows - 1
    table += [Entry("conditioner.table.weight", ("class_embedding.weight",), *([] if known_null else [_NO_CLASS]))]
    shapes["conditioner.table.weight"] = torch.Size([rows + (0 if known_null else 1), width])
    shapes = {name: shape for name, shape in shapes.items() if "embed_vector" not in name}
    fitted = to_ours(table, present_names(tensors), shapes, origin)
    same = {"network.embed_vector.weight": torch.eye(width), "network.embed_vector.bias": torch.zeros(width)}
    classes = node("diffusion.conditioners.classes.ClassVector", num_classes=rows - known_null, channels=width)
    return Imported(
        {"network": network, "conditioner": classes},
        fitted.weights | same,
        fitted.dropped,
        ()
        if known_null
        else ("it was trained on its classes alone, so its row of no class is zero and no guidance fits",),
        known_null,
    )


_NO_CLASS = each(lambda rows: torch.cat([rows, rows.new_zeros(1, rows.shape[1])]), lambda rows: rows[:-1])


def _imported_dit(config: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str, origin: str) -> Imported:
    network = dit.from_config(config, where)
    dit.check_equal_blocks(tensors, origin)
    made = on_meta(network)
    assert isinstance(made, DiT)
    settings = {**dit.DEFAULTS, **config}
    classes, out = settings["num_embeds_ada_norm"], settings["out_channels"]
    table = [*under(dit.table_of(made, out), "network."), *_dit_classes(len(made.layers))]
    shapes = {f"network.{name}": one.shape for name, one in made.state_dict().items()}
    shapes["conditioner.table.weight"] = torch.Size([classes + 1, made.hidden_size])
    dropped = [Dropped("pos_embed.pos_embed", "fixed positions")]
    fitted: Fitted = to_ours(table, tensors, shapes, origin, dropped)
    conditioner = node("diffusion.conditioners.classes.ClassVector", num_classes=classes, channels=made.hidden_size)
    variances = ["the half of its output that predicts variances was left out"] if out == 2 * made.in_channels else []
    return Imported(
        {"network": network, "conditioner": conditioner},
        fitted.weights,
        fitted.dropped,
        [*variances, dit.NOTE.format(eps=settings["norm_eps"])],
        True,
    )


def _dit_classes(blocks: int) -> list[Entry]:
    return dit.everywhere("conditioner.table", "class_embedder.embedding_table", blocks, bias=False)
