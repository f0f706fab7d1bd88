"""Text encoders of the package transformers, in folders: read from there, never downloaded, never trained.

A process loads each once, however many conditioners and features read it, and only when it is asked for what it makes
or for the hash of its weights. When it is released its memory is free, and what is known of it stays.
"""

import functools
import json
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.diffusion.conditioners.frozen import FrozenModel, quiet, read, reading
from ldm.errors import CheckpointError, ConfigError
from ldm.runtime.full_precision import full_precision
from ldm.weights import cache
from ldm.weights.catalog import FILES

_WHAT = "text encoder"
_PROBES = ("", "A photo of two Red cats, and a café.", "3 boats\n by night 🌙!  漢字 קוד")
"""Probe texts: tokenizers of equal vocabularies still differ in case, accents, whitespace, and special tokens."""


class TextModel(FrozenModel):
    """The text encoder in a folder.

    Args:
        encoder: the folder, or a name in the catalog of weights.
        compute: the type of its weights in memory, and so of most of its sums.

    Attributes:
        config: its description; of a whole CLIP that of its text half.

    Raises:
        ConfigError: transformers is not installed.
        CheckpointError: there is no encoder.
    """

    def __init__(self, encoder: str, compute: torch.dtype = torch.float32) -> None:
        self.config = description(encoder)
        super().__init__(located(encoder), _kind(self.config), _WHAT, compute)

    @functools.cached_property
    def tokenizer(self) -> Any:
        """Of transformers.

        Raises:
            CheckpointError: there is none, or it cannot be read.
        """
        import transformers

        folder = _tokenizer_folder(Path(self.folder))
        _require_tokenizer(folder, ("*tokenizer*", "*vocab*", "*.model"))
        with reading(self.folder, _WHAT), quiet():
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        if files := sorted(set(tokenizer.vocab_files_names.values())):  # where it finds none, it has no words
            _require_tokenizer(folder, files)
        return tokenizer

    @functools.cached_property
    def vocabulary(self) -> str:
        """sha256 (hex) of how the tokenizer acts, whatever its files are called: its words, and what it makes of them.

        Texts that it cuts and pads are among them.
        """
        words = sorted(self.tokenizer.get_vocab().items(), key=lambda word: (word[1], word[0]))
        with quiet():  # that this is longer than what the encoder reads
            all_words = self.tokenizer.convert_tokens_to_string([word for word, _ in words])
            acts = [words, *(self.tokenizer(text)["input_ids"] for text in (all_words, *_PROBES))]
            acts += [self.words(text, 8, padding=self.pads)["input_ids"].tolist() for text in _PROBES]
        return sha256(json.dumps(acts).encode()).hexdigest()

    @property
    def masked(self) -> bool:
        """Whether padding is hidden from the network.

        CLIP's words never see what follows them, so that nothing is to be hidden; where every word sees all others,
        padding would change them.
        """
        import transformers

        return _kind(self.config) is not transformers.CLIPTextModel

    @property
    def pads(self) -> bool:
        """Whether the tokenizer has a word to pad with."""
        return self.tokenizer.pad_token_id is not None

    def words(self, text: str, max_length: int, padding: bool) -> dict[str, Tensor]:
        """A text's `input_ids` and `attention_mask`, (1, L), at least one of which is true; cut to `max_length`."""
        shape = {"padding": "max_length" if padding else False, "truncation": True, "max_length": max_length}
        found = self.tokenizer(text, **shape)
        ids, mask = found["input_ids"], found["attention_mask"]
        if not any(mask):  # a tokenizer that neither begins nor ends a text makes nothing of ""
            ids = ids or [self._filler()]
            mask = [1] * len(ids)
        return {"input_ids": torch.tensor([ids]), "attention_mask": torch.tensor([mask])}

    def length(self, text: str) -> int:
        """The tokens of a text that is not cut."""
        return len(self.tokenizer(text, verbose=False)["input_ids"])

    def hidden(
        self, words: dict[str, Tensor], layer: int, final_norm: bool, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """The tokens of a layer and those of the last, (N, L, D) each, on `device`; in full precision of `compute`.

        Args:
            words: `input_ids` and `attention_mask`, (N, L).
            layer: -1: the network's output; -2: the hidden states before its last layer, and so on.
            final_norm: of an earlier layer: through the network's last norm.
        """
        # Not in inference mode, even where the caller is: training could not use tokens that are kept for later.
        with torch.inference_mode(False), torch.no_grad(), full_precision(device.type):
            network = self.network.to(device)
            mask = words["attention_mask"].to(device) if self.masked else None
            found = network(
                input_ids=words["input_ids"].to(device), attention_mask=mask, output_hidden_states=layer != -1
            )
            output: Tensor = found.last_hidden_state
            if layer == -1:
                return output, output
            tokens: Tensor = found.hidden_states[layer]
            if final_norm and (norm := _final_norm(network)) is not None:
                tokens = norm(tokens)
            return tokens, output

    def _filler(self) -> int:
        known = (self.tokenizer.eos_token_id, self.tokenizer.bos_token_id, self.tokenizer.pad_token_id)
        found = next((number for number in known if number is not None), None)
        if found is None:
            raise CheckpointError(f"{self.folder}: its tokenizer makes nothing of an empty text, and has no eos_token")
        return int(found)


@functools.cache
def opened(encoder: str, compute: torch.dtype = torch.float32) -> TextModel:
    """The one TextModel of a folder in this process."""
    return TextModel(encoder, compute)


@functools.cache
def description(encoder: str) -> Any:
    """The config of the text encoder in a folder; of a whole CLIP that of its text half.

    Raises:
        ConfigError: transformers is not installed.
        CheckpointError: there is none.
    """
    try:
        import transformers
    except ImportError as error:
        raise ConfigError(f"text encoders need the package {error.name}: pip install -e '.[text]'") from error
    folder = located(encoder)
    if not (Path(folder) / "config.json").is_file():
        raise CheckpointError(
            f"{folder}: no text encoder: expected a folder with config.json, its weights and its tokenizer. "
            f"Put the one there that this configuration means, or name another."
        )
    with reading(folder, _WHAT):
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        return config.get_text_config()


def located(encoder: str) -> str:
    """The folder that a configuration means: what is not a name in the catalog of weights is a folder itself.

    Raises:
        CheckpointError: the catalog knows it, and it is not there; says how to get it.
    """
    return str(cache.find(encoder).parent) if encoder in FILES else encoder


def check_sizes(who: str, encoder: str, channels: int, max_length: int, layer: int) -> None:
    """ConfigError unless the encoder in the folder has these sizes; reads its description alone."""
    config, folder = description(encoder), located(encoder)
    if config.hidden_size != channels:
        raise ConfigError(
            f"{who}: channels: the tokens of {folder} are {config.hidden_size} wide, found {channels}; "
            f"write {config.hidden_size}, also as the network's context_dim"
        )
    longest = config.to_dict().get("max_position_embeddings")  # T5 has no limit
    if longest is not None and max_length > longest:
        raise ConfigError(f"{who}: max_length: {folder} reads up to {longest} tokens, found {max_length}")
    if -layer > config.num_hidden_layers:
        raise ConfigError(f"{who}: layer: {folder} has {config.num_hidden_layers} layers, found {layer}")


@functools.cache
def projection(folder: str) -> Tensor:
    """The matrix (V, D) that follows CLIP's pooled output, float32.

    Raises:
        CheckpointError: there is none.
    """
    import transformers

    return read(transformers.CLIPTextModelWithProjection, folder, _WHAT).text_projection.weight.detach().clone()


def _final_norm(network: nn.Module) -> nn.Module | None:
    """The norm after the last layer; None: the layers of BERT and its kin end with their own."""
    names = ("final_layer_norm", "norm")  # of CLIP and T5; of Gemma and its kin
    outside = ((name.split("."), module) for name, module in network.named_modules())
    found = (module for parts, module in outside if parts[-1] in names and not any(map(str.isdigit, parts)))
    return next(found, None)


def _kind(config: Any) -> Any:
    """The class of transformers that encodes texts with such a model."""
    import transformers

    known = transformers.models.auto.modeling_auto.MODEL_FOR_TEXT_ENCODING_MAPPING
    return known.get(type(config), transformers.AutoModel)


def _tokenizer_folder(folder: Path) -> Path:
    """The folder itself, or that of a pipeline of diffusers: `tokenizer_2` beside `text_encoder_2`."""
    beside = folder.with_name(folder.name.replace("text_encoder", "tokenizer"))
    return beside if not (folder / "tokenizer_config.json").is_file() and beside.is_dir() else folder


def _require_tokenizer(folder: Path, files: Sequence[str]) -> None:
    """CheckpointError unless one of these is in the folder."""
    if not any(any(folder.glob(file)) for file in files):
        raise CheckpointError(
            f"{folder}: no tokenizer: expected {' or '.join(files)}. Put the one there that the text encoder was "
            f"trained with."
        )
