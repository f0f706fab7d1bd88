"""What becomes of the encoder of conditions of CompVis' models: a conditioner of ours, and files beside it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ldm.interop.compvis import text as compvis_text
from ldm.interop.compvis.description import Description
from ldm.interop.models import node
from ldm.interop.tables import Entry, under

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
        data: parameters of the data module, by which what it reads is in a batch.
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
    data: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
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


def given(slot: str, shape: Sequence[int | None], description: Description, label_dropout: float = 0.0) -> Conditioned:
    """A condition that comes ready-made, with a sentence on what it is, where that is known."""
    read = node("diffusion.conditioners.given.Field", key=slot, shape=[*shape])
    notes = sorted({one.condition for one in description.alike if one.condition})
    return Conditioned(node("diffusion.conditioners.given.Given", **{slot: read}), label_dropout, notes=notes)
