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
from ldm.interop.diffusers_models import dit, unet
from ldm.interop.diffusers_models.autoencoder_table import present_names
from ldm.interop.diffusers_models.config import OTHERWISE, Exported, apart, raise_all
from ldm.interop.diffusers_models.unet_settings import DEFAULTS
from ldm.interop.diffusers_models.unet_table import table_of
from ldm.interop.models import node, on_meta
from ldm.interop.tables import SAME, Dropped, Entry, constant, each, to_ours, to_theirs, under

UNETS = tuple(DEFAULTS)
CLASSES = (*UNETS, dit.NAME)
"""The classes that are read and written here."""


@dataclass(frozen=True)
class Imported:
    """A model of diffusers in our terms.

    Attributes:
        params: nodes of `network` and, unless it reads tokens of another model, `conditioner`.
        weights: `network...`, `conditioner...`.
        dropped: {reason: number of tensors}.
        notes: what a person should know, a sentence each.
        knows_null: it was trained with "no class", too.
    """

    params: Mapping[str, Any]
    weights: Mapping[str, Tensor]
    dropped: Mapping[str, int]
    notes: Sequence[str] = ()
    knows_null: bool = False


# ---- out -------------------------------------------------------------------------------------------------------


def exported(
    network: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    vectors: Tensor | None = None,
    sample_size: int | Sequence[int] | None = None,
    where: str = "the network",
) -> Exported:
    """A network of ours as a model of diffusers, with the class table that is a part of theirs.

    Args:
        network: its node.
        weights: its state_dict. A layer `embed_vector` is left out, since `vectors` have passed it.
        vectors: (K + 1, E): what each class, and last no class, adds to the noise level's embedding; None: nothing.
        sample_size: side of the latents, or (height, width).
        where: what is exported, for messages.

    Raises:
        ConfigError: names everything that no class of diffusers can express.
    """
    made = on_meta(network)
    own = {name: one for name, one in weights.items() if not name.startswith("embed_vector.")}
    if isinstance(made, DiT):
        rows = torch.zeros(1, made.hidden_size) if vectors is None else vectors
        rows = rows if len(rows) > 1 else rows.repeat(2, 1)  # theirs has one class at least, and "no class"
        name, config = dit.to_config(network, len(rows) - 1, sample_size, where)
        table = [*dit.table_of(made), *dit.class_table("classes", len(made.layers))]
        return Exported(name, config, apart(to_theirs(table, own | {"classes.weight": rows})))
    if not isinstance(made, UNet):
        raise_all(
            where, "diffusers has no class for", [f"network={network['target']}: expected UNet or DiT"], OTHERWISE
        )
    assert isinstance(made, UNet)
    name, config = unet.to_config(network, None if vectors is None else len(vectors), sample_size, where)
    theirs = to_theirs(table_of(made), own)
    classes = {} if vectors is None else {"class_embedding.weight": vectors}
    return Exported(name, config, apart(theirs | classes))


# ---- in --------------------------------------------------------------------------------------------------------


def imported(
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    where: str,
    origin: str,
    no_class: bool = False,
    class_tokens: bool = False,
) -> Imported:
    """A network of diffusers in our terms.

    Args:
        config: config.json; its `_class_name` is one of CLASSES.
        tensors: its state_dict; attention may have the names that it had before diffusers 0.15.
        where: the file of `config`, for messages.
        origin: the weights and what they are taken for, for messages.
        no_class: the last row of its class table is that of no class; a DiT's always is.
        class_tokens: its first layer for tokens is a table of classes, as the rows of which it is given.

    Raises:
        ConfigError: names every setting that our network cannot express.
        CheckpointError: tensors that do not fit, or a DiT whose blocks differ where ours has one layer for all.
    """
    if config["_class_name"] == dit.NAME:
        return _imported_dit(config, tensors, where, origin)
    own = {key: value for key, value in config.items() if not (class_tokens and key in _TOKENS)}
    network = unet.from_config(own, where)
    made = on_meta(network)
    assert isinstance(made, UNet)
    linear, sines_first = bool(config.get("use_linear_projection")), config.get("flip_sin_to_cos") is False
    table = under(table_of(made, linear, sines_first), "network.")
    shapes = {f"network.{name}": one.shape for name, one in made.state_dict().items()}
    params = {"network": network}
    if class_tokens:
        rows, width = config["encoder_hid_dim"], network["params"]["context_dim"]
        params["conditioner"] = _classes("ClassToken", rows - 1, width)
        table += [Entry(_ROWS, ("encoder_hid_proj.weight",), each(Tensor.t, Tensor.t))]
        shapes[_ROWS] = torch.Size([rows, width])
    elif made.vector_channels is not None:
        rows, width = config["num_class_embeds"], made.vector_channels
        params["conditioner"] = _classes("ClassVector", rows - no_class, width)
        table += [Entry(_ROWS, ("class_embedding.weight",), SAME if no_class else _NO_CLASS)]
        table += [constant("network.embed_vector.weight", torch.eye(width))]
        table += [constant("network.embed_vector.bias", torch.zeros(width))]
        shapes[_ROWS] = torch.Size([rows if no_class else rows + 1, width])
    elif made.context_dim is None:
        params["conditioner"] = node("diffusion.conditioners.base.Unconditional")
    dropped = [Dropped("encoder_hid_proj.bias", "zeros beside the class table")] if class_tokens else []
    fitted = to_ours(table, present_names(tensors), shapes, origin, dropped)
    unknown = made.vector_channels is not None and not no_class
    notes = ['It knows no "no class": that row of its table is zero, and guidance is refused.'] if unknown else []
    return Imported(params, fitted.weights, fitted.dropped, notes, knows_null=class_tokens or no_class)


_ROWS = "conditioner.table.weight"
_TOKENS = ("encoder_hid_dim", "encoder_hid_dim_type")
_NO_CLASS = each(lambda rows: torch.cat([rows, rows.new_zeros(1, rows.shape[1])]), lambda rows: rows[:-1])


def _classes(kind: str, number: int, channels: int) -> dict[str, Any]:
    """A conditioner; of no classes at all where the table has the row of no class alone."""
    return node(f"diffusion.conditioners.classes.{kind}", num_classes=number or None, channels=channels)


def _imported_dit(config: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str, origin: str) -> Imported:
    network = dit.from_config(config, where)
    dit.check_equal_blocks(tensors, origin)
    made = on_meta(network)
    assert isinstance(made, DiT)
    settings = {**dit.DEFAULTS, **config}
    classes, out = settings["num_embeds_ada_norm"], settings["out_channels"]
    table = [*under(dit.table_of(made, out), "network."), *dit.class_table("conditioner.table", len(made.layers))]
    shapes = {f"network.{name}": one.shape for name, one in made.state_dict().items()}
    shapes[_ROWS] = torch.Size([classes + 1, made.hidden_size])
    dropped = [Dropped("pos_embed.pos_embed", "fixed positions")]
    fitted = to_ours(table, tensors, shapes, origin, dropped)
    params = {"network": network, "conditioner": _classes("ClassVector", classes, made.hidden_size)}
    variances = out == 2 * made.in_channels
    notes = ["The half of its output that predicts variances was left out."] if variances else []
    notes.append(dit.NOTE.format(eps=settings["norm_eps"]))
    return Imported(params, fitted.weights, fitted.dropped, notes, knows_null=True)
