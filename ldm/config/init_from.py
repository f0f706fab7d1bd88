"""The section `init_from`: the weights that a new run starts from (ldm/training/init_from.py).

init_from: logs/<run>                                     # all of them, and everything has to fit
init_from: {run: logs/<run>, parts: [encoder, decoder]}   # these parts; the others are new
init_from: {run: logs/<run>, resize: [classes, channels]} # another number of classes and of channels
init_from: {run: logs/<run>, strict: false}               # what fits
init_from: {run: logs/<run>, adapter: <folder>}           # and an adapter of peft's on top (ldm/interop/lora.py)
"""

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any, Literal, get_type_hints

from ldm.config.hints import Parameter, Signature

Resized = Literal["classes", "channels", "resolution"]


@dataclass(frozen=True)
class InitFrom:
    """What a configuration says of it.

    Attributes:
        run: run folder (its newest good checkpoint) or checkpoint; a run of ours, or what `ldm convert` has made.
        parts: dotted names of modules, as in a checkpoint: `encoder`, `decoder`, `loss.discriminator` (stage 1),
            `network`, `conditioner`, `objective` (stage 2), or what lies in them; None: all.
        strict: every tensor of the parts has to fit; False: what does not is left new.
        average: of a diffusion model start from the averaged weights, False: from those of the last step. Either way
            both the new run's weights and its average do.
        resize: what may differ, by name.
        adapter: folder of an adapter as peft saves it, for a model with `model.params.adapter`; None: a new adapter.
    """

    run: str
    parts: Sequence[str] | None = None
    strict: bool = True
    average: bool = True
    resize: Sequence[Resized] = ()
    adapter: str | None = None


def parsed(value: Any) -> InitFrom | None:
    """The section of a checked configuration in plain containers; None: there is none."""
    if value is None:
        return None
    return InitFrom(**value) if isinstance(value, Mapping) else InitFrom(value)


def signature() -> Signature:
    """For the check of a configuration."""
    hints = get_type_hints(InitFrom, include_extras=True)
    return Signature(
        {field.name: Parameter(hints[field.name], field.default is MISSING) for field in fields(InitFrom)}, open=False
    )
