"""What CompVis' models are conditioned on, as our conditioners, and what becomes of the file's own encoder."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ldm.errors import CheckpointError, ConfigError
from ldm.interop.compvis import dense, text_transformer
from ldm.interop.compvis import text as compvis_text
from ldm.interop.compvis.conditioned import KEPT_FILE, TEXT_FOLDER, Conditioned, given
from ldm.interop.compvis.description import Description, part
from ldm.interop.models import RUN, Request, node, shapes
from ldm.interop.sources import Source
from ldm.interop.tables import SAME, Entry, each

FIRST_STAGE = "first_stage_model."
ENCODER = "cond_stage_model."
OTHER_ENCODERS = ("depth_model.",)
"""Of Stable Diffusion 2's model of depth."""


def conditioned(
    source: Source, request: Request, description: Description, unet: Mapping[str, Any], size: int, factor: int
) -> Conditioned:
    """The conditioner of what the UNet reads, out of what the file holds.

    Args:
        unet: the parameters of ours.
        size: the side of the latents.
        factor: pixels to one of the latents.

    Raises:
        ConfigError: captions without a tokenizer.
        CheckpointError: the text encoder or the table of classes does not fit.
    """
    encoder, twice = _encoder(source)
    parts = {}
    if unet["context_dim"] is not None:
        parts["tokens"] = _tokens(source, request, description, encoder, unet)
    if unet["spatial_channels"]:
        parts["picture"] = dense.picture(description, encoder, unet, size, factor)
    found = _beside(parts)
    used = bool(found.table) or found.text is not None
    kept = {} if used else {f"{ENCODER}{name}": one for name, one in encoder.items()}
    kept |= {name: one for name, one in source.tensors.items() if name.startswith(OTHER_ENCODERS)}
    notes = [*found.notes]
    if parts and not found.label_dropout:
        notes.append("Guidance is refused: what stood in place of a condition in its training is not known here.")
    if kept:
        notes.append(f"{KEPT_FILE} holds its own encoder of conditions, which ldm does not run.")
    return replace(found, dropped={**found.dropped, **twice}, notes=notes, kept=kept)


def _beside(parts: Mapping[str, Conditioned]) -> Conditioned:
    """One conditioner of them all."""
    if len(parts) < 2:
        return next(iter(parts.values()), Conditioned(node("diffusion.conditioners.base.Unconditional")))
    tokens, picture = (parts[name].within(f"conditioners.{name}.") for name in ("tokens", "picture"))
    both = {name: one.node for name, one in parts.items()}
    return replace(
        tokens,
        node=node("diffusion.conditioners.joint.Joint", conditioners=both),
        # Guidance would have to leave the picture as it is, and drops all conditions.
        label_dropout=0.0,
        table=[*tokens.table, *picture.table],
        shapes={**tokens.shapes, **picture.shapes},
        data={**tokens.data, **picture.data},
        notes=[*tokens.notes, *picture.notes],
    )


def _encoder(source: Source) -> tuple[dict[str, Tensor], dict[str, int]]:
    """The tensors of the encoder of conditions; none and a reason if it is the first stage once more."""
    encoder, first = source.part(ENCODER), source.part(FIRST_STAGE)
    if encoder and encoder.keys() <= first.keys() and all(_same(one, first[name]) for name, one in encoder.items()):
        return {}, {"the first stage once more, as the encoder of pictures": len(encoder)}
    return encoder, {}


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether all values are the same; shapes alone on the meta device, which has no values."""
    return one.shape == other.shape and (one.is_meta or torch.equal(one, other))


def _tokens(
    source: Source, request: Request, description: Description, encoder: Mapping[str, Tensor], unet: Mapping[str, Any]
) -> Conditioned:
    """Of what the UNet reads by cross-attention."""
    if [*encoder] == ["embedding.weight"]:
        return _classes(encoder["embedding.weight"], description, str(source.path))
    settings = part(description.params, "cond_stage_config")
    key = description.condition_key()
    if key == "coordinates_bbox" and (layouts := text_transformer.layouts(encoder)) is not None:
        return _layouts(layouts, description)
    if text_transformer.reads_texts(encoder, settings, request.text_encoder):
        return _transformer(text_transformer.found_in(encoder, request.text_encoder, str(source.path)), description)
    last_layer = settings.get("layer") == "last"
    text = compvis_text.found_in(encoder, str(source.path), last_layer=last_layer)
    if text is not None and request.text_encoder is None:
        raise ConfigError(
            f"{source.path}: holds a text encoder, but no file of this kind holds its tokenizer. Name a folder with "
            f"it: --text-encoder DIR; {compvis_text.TOKENIZER}"
        )
    width = unet["context_dim"]
    if text is not None:
        sizes = {"channels": width, "max_length": text.max_length}
        captions = node("diffusion.conditioners.text.FrozenText", encoder=f"{RUN}/{TEXT_FOLDER}", **sizes)
        dropout = description.label_dropout(lambda _: True)  # its null is the empty text
        return Conditioned(captions, dropout, dropped=text.dropped, text=text, tokenizer=request.text_encoder)
    if request.text_encoder is not None and not encoder:
        captions = node("diffusion.conditioners.text.FrozenText", encoder=str(request.text_encoder), channels=width)
        return Conditioned(captions, description.label_dropout(lambda _: True))
    places = encoder.get("transformer.pos_emb.emb.weight")
    shape = [None if places is None else places.shape[0], width]
    if not any(one.zero_null for one in description.alike):
        return given("tokens", shape, description)
    return given("tokens", shape, description, description.label_dropout(lambda one: one.zero_null))


def _layouts(made: Mapping[str, Any], description: Description) -> Conditioned:
    """A transformer of layouts, whose null is the layout without boxes, if it was trained with one."""
    params = made["params"]
    return Conditioned(
        made,
        description.label_dropout(lambda _: True),
        text_transformer.table(params["depth"]),
        shapes(made),
        data={"aligned": {"boxes": node("latents.aligned.Boxes", most=params["most"])}},
        notes=["The classes of its boxes are numbers of its own data, which no file of this kind names."],
    )


def _transformer(found: text_transformer.Found, description: Description) -> Conditioned:
    """A text transformer, whose null is the empty text."""
    return Conditioned(
        found.node,
        description.label_dropout(lambda _: True),
        text_transformer.table(found.sizes["depth"]),
        found.shapes,
        found.state,
        files={found.words.file_name: found.words.content},
    )


def _classes(table: Tensor, description: Description, path: str) -> Conditioned:
    """One token for each class: the last row is that of no class, if the model was trained with one."""
    number, width = table.shape
    dropout = description.label_dropout(lambda one: one.null_class == number - 1)
    classes = number - 1 if dropout else number
    change = SAME if dropout else each(_with_null_row, lambda ours: _without_null_row(ours, path))
    return Conditioned(
        node("diffusion.conditioners.classes.ClassToken", num_classes=classes, channels=width),
        dropout,
        [Entry("table.weight", ("embedding.weight",), change)],
        {"table.weight": torch.Size((classes + 1, width))},
    )


def _with_null_row(table: Tensor) -> Tensor:
    return torch.cat([table, table.new_zeros(1, table.shape[1])])


def _without_null_row(table: Tensor, path: str) -> Tensor:
    if not table.is_meta and bool(table[-1].any()):
        raise CheckpointError(f"{path}: the row of no class has been trained, and the other format has no place for it")
    return table[:-1]
