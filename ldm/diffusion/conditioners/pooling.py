"""From the tokens of a text to one vector: ways of pooling, each as a text encoder was trained for it.

All read the encoder's output, whichever layer the tokens of a feature come from, and only a text's own tokens, not
its padding.
"""

import functools
import json
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch.nn.functional as F
from torch import Tensor

from ldm.diffusion.conditioners.text_models import TextModel, projection
from ldm.errors import CheckpointError
from ldm.weights.digest import weight_hash


class Pooling(Protocol):
    """A way of pooling."""

    def channels(self, model: TextModel) -> int:
        """The vector's width; reads the encoder's description alone."""
        ...

    def describe(self, model: TextModel) -> dict[str, Any]:
        """All that determines the vector besides the tokens, in plain values."""
        ...

    def __call__(self, model: TextModel, tokens: Tensor, ids: Tensor) -> Tensor:
        """The vector (V,) of a text's tokens (L, D) float32 with their numbers (L,)."""
        ...


@dataclass(frozen=True)
class _OfTokens(ABC):
    """Args: normalize: to length 1."""

    normalize: bool = False

    def channels(self, model: TextModel) -> int:
        return int(model.config.hidden_size)

    def describe(self, model: TextModel) -> dict[str, Any]:
        return {"by": type(self).__name__, "normalize": self.normalize}

    def __call__(self, model: TextModel, tokens: Tensor, ids: Tensor) -> Tensor:
        vector = self.pool(model, tokens, ids)
        return F.normalize(vector, dim=0) if self.normalize else vector

    @abstractmethod
    def pool(self, model: TextModel, tokens: Tensor, ids: Tensor) -> Tensor: ...


class Mean(_OfTokens):
    """The mean of a text's tokens: most sentence encoders; T5 and others that were trained without pooling."""

    def pool(self, model: TextModel, tokens: Tensor, ids: Tensor) -> Tensor:
        return tokens.mean(dim=0)


class First(_OfTokens):
    """The first token, BERT's [CLS], as it is."""

    def pool(self, model: TextModel, tokens: Tensor, ids: Tensor) -> Tensor:
        return tokens[0]


class Last(_OfTokens):
    """The last token, the only one of a decoder such as Gemma that has seen the whole text."""

    def pool(self, model: TextModel, tokens: Tensor, ids: Tensor) -> Tensor:
        return tokens[-1]


class EndOfText(_OfTokens):
    """The token that ends a text, at its first place: CLIP's pooled output."""

    def pool(self, model: TextModel, tokens: Tensor, ids: Tensor) -> Tensor:
        return tokens[int((ids == ids[-1]).int().argmax())]


class Projected(EndOfText):
    """CLIP's pooled output in the space that texts share with pictures, as SDXL reads that of its second encoder."""

    def channels(self, model: TextModel) -> int:
        return int(model.config.projection_dim)

    def describe(self, model: TextModel) -> dict[str, Any]:
        return {**super().describe(model), "projection": weight_hash({"": projection(model.folder)})}

    def pool(self, model: TextModel, tokens: Tensor, ids: Tensor) -> Tensor:
        return F.linear(super().pool(model, tokens, ids), projection(model.folder).to(tokens.device))


@dataclass(frozen=True)
class SentencePooling:
    """What the encoder's own folder says (`modules.json` and `1_Pooling/config.json` of sentence-transformers).

    Raises:
        CheckpointError: on use: the folder says nothing, or what this does not do.
    """

    def channels(self, model: TextModel) -> int:
        return _of_folder(model.folder).channels(model)

    def describe(self, model: TextModel) -> dict[str, Any]:
        return _of_folder(model.folder).describe(model)

    def __call__(self, model: TextModel, tokens: Tensor, ids: Tensor) -> Tensor:
        return _of_folder(model.folder)(model, tokens, ids)


_MODES: dict[str, Callable[..., _OfTokens]] = {
    "pooling_mode_mean_tokens": Mean,
    "pooling_mode_cls_token": First,
    "pooling_mode_lasttoken": Last,
}


@functools.cache
def _of_folder(folder: str) -> _OfTokens:
    path = Path(folder, "modules.json")
    try:
        modules = [(module["type"].rpartition(".")[2], module["path"]) for module in json.loads(path.read_text())]
        kinds = [kind for kind, _ in modules]
        if kinds[:2] != ["Transformer", "Pooling"] or kinds[2:] not in ([], ["Normalize"]):
            raise CheckpointError(
                f"{path}: expected Transformer, Pooling and perhaps Normalize, found {', '.join(kinds)}; name a "
                f"pooling that you want instead (ldm/diffusion/conditioners/pooling.py)"
            )
        path = Path(folder, modules[1][1], "config.json")
        modes = [name for name, is_on in json.loads(path.read_text()).items() if name.startswith("pooling_") and is_on]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: expected what a sentence encoder says of its pooling, found nothing that can be read ({error}); "
            f"name the pooling yourself, such as ldm.diffusion.conditioners.pooling.Mean"
        ) from error
    if len(modes) != 1 or modes[0] not in _MODES:
        raise CheckpointError(f"{path}: expected one of {', '.join(_MODES)}, found {', '.join(modes) or 'none'}")
    return _MODES[modes[0]](normalize="Normalize" in kinds)
