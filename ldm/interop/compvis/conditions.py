"""What CompVis' models are conditioned on, as our conditioners, and what becomes of the file's own encoder."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ldm.errors import CheckpointError, ConfigError
from ldm.interop.compvis import text as compvis_text
from ldm.interop.compvis import text_transformer
from ldm.interop.compvis.description import Description, part
from ldm.interop.models import RUN, Request, node
from ldm.interop.sources import Source
from ldm.interop.tables import SAME, Entry, each, under

FIRST_STAGE = "first_stage_model."
ENCODER = "cond_stage_model."
OTHER_ENCODERS = ("depth_model.",)
"""Of Stable Diffusion 2's model of depth."""
KEPT_FILE = "conditioner.safetensors"
TEXT_FOLDER = "text_encoder"


@dataclass(frozen=True)
class Conditioned:
    """A conditioner and what becomes of the file's own.

    Attributes:
        node: of our conditioner.
        label_dropout: 0 where the null conditioning is not known.
        table: of its weights in a checkpoint; theirs without `cond_stage_model.`.
        shapes: of its weights.
        state: what else a checkpoint has of it, such as a tokenizer.
        dropped: {reason: number of tensors}.
        notes: a sentence each.
        text: goes into the run folder, with the tokenizer of the folder `tokenizer`.
        files: {name: content}: go into the run folder as well.
        kept: tensors that go into the run folder under their own names.
    """

    node: Mapping[str, Any]
    label_dropout: float = 0.0
    table: Sequence[Entry] = ()
    shapes: Mapping[str, torch.Size] = field(default_factory=dict)
    state: Mapping[str, Tensor] = field(default_factory=dict)
    dropped: Mapping[str, int] = field(default_factory=dict)
    notes: Sequence[str] = ()
    text: compvis_text.TextEncoder | None = None
    tokenizer: Path | None = None
    files: Mapping[str, bytes] = field(default_factory=dict)
    kept: Mapping[str, Tensor] = field(default_factory=dict)

    def within(self, prefix: str) -> "Conditioned":
        """As a part of another conditioner: our names begin with this prefix, which ends with a dot."""
        return replace(
            self,
            table=under(self.table, prefix),
            shapes={f"{prefix}{name}": one for name, one in self.shapes.items()},
            state={f"{prefix}{name}": one for name, one in self.state.items()},
        )

    def write(self, folder: Path) -> None:
        """What belongs into the run folder besides the checkpoint.

        Raises:
            ConfigError: there is no tokenizer in its folder.
        """
        if self.text is not None and self.tokenizer is not None:
            self.text.write(folder / TEXT_FOLDER, self.tokenizer)
        for name, content in self.files.items():
            (folder / name).write_bytes(content)
        if self.kept:
            save_file({name: one.contiguous() for name, one in self.kept.items()}, folder / KEPT_FILE)


def conditioned(
    source: Source, request: Request, description: Description, unet: Mapping[str, Any], size: int
) -> Conditioned:
    """The conditioner of what the UNet reads, out of what the file holds.

    Args:
        unet: the parameters of ours.
        size: the side of the latents.

    Raises:
        ConfigError: captions without a tokenizer.
        CheckpointError: the text encoder or the table of classes does not fit.
    """
    encoder, twice = _encoder(source)
    tokens = None if unet["context_dim"] is None else _tokens(source, request, description, encoder, unet)
    picture = None if not unet["spatial_channels"] else _given("spatial", [unet["spatial_channels"], size, size])
    if tokens is None:
        found = Conditioned(picture or node("diffusion.conditioners.base.Unconditional"))
    elif picture is None:
        found = tokens
    else:
        both = node("diffusion.conditioners.joint.Joint", conditioners={"tokens": tokens.node, "picture": picture})
        # Guidance would have to leave the picture as it is, and drops all conditions.
        found = replace(tokens.within("conditioners.tokens."), node=both, label_dropout=0.0)
    used = bool(found.table) or found.text is not None
    kept = {} if used else {f"{ENCODER}{name}": one for name, one in encoder.items()}
    kept |= {name: one for name, one in source.tensors.items() if name.startswith(OTHER_ENCODERS)}
    notes = [*found.notes]
    if tokens is not None or picture is not None:
        notes += sorted({one.condition for one in description.alike if one.condition})
        if not found.label_dropout:
            notes.append("Guidance is refused: what stood in place of a condition in its training is not known here.")
    if kept:
        notes.append(f"{KEPT_FILE} holds its own encoder of conditions, which ldm does not run.")
    return replace(found, dropped={**found.dropped, **twice}, notes=notes, kept=kept)


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
    given = _given("tokens", [None if places is None else places.shape[0], width])
    zeros = any(one.zero_null for one in description.alike)
    return Conditioned(given, description.label_dropout(lambda one: one.zero_null) if zeros else 0.0)


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


def _given(slot: str, shape: Sequence[int | None]) -> dict[str, Any]:
    read = node("diffusion.conditioners.given.Field", key=slot, shape=[*shape])
    return node("diffusion.conditioners.given.Given", **{slot: read})
