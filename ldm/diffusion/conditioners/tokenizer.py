"""Tokenizers: captions as numbers, by the rules of one file, which a checkpoint carries with it.

Two kinds of files are known: `tokenizer.json` of the package tokenizers, which holds all of its rules, and `vocab.txt`,
the words of an uncased BERT.
"""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.errors import ConfigError
from ldm.ranges import Count

if TYPE_CHECKING:
    import tokenizers

JSON, VOCABULARY = "tokenizer.json", "vocab.txt"
SPECIAL = ("<pad>", "<start>", "<end>")
"""Of a tokenizer that is trained here: what fills a text up, stands before it, and after it."""
SMALLEST = len(SPECIAL) + 256
"""Tokens that it has at least: those, and every byte."""
_BERT = {"pad": "[PAD]", "unknown": "[UNK]", "start": "[CLS]", "end": "[SEP]"}
_PADDING = (_BERT["pad"], SPECIAL[0])


class Tokenizer:
    """What is in a tokenizer's file.

    Args:
        content: of the file, byte by byte.
        max_length: tokens of a text, those at its ends included; what is longer is cut.
        where: the file, for messages.

    Attributes:
        file_name: `tokenizer.json` or `vocab.txt`.
        digest: sha256 of the content, hex, as `sha256sum` has it.
        size: rows that a table of its tokens has: one more than their largest number, which may leave gaps.
        padding: the token that fills a text up; None: it has none.

    Raises:
        ConfigError: the package is missing, or the content is no tokenizer.
    """

    def __init__(self, content: bytes, max_length: Count, where: str) -> None:
        self.content = content
        self.digest = hashlib.sha256(content).hexdigest()
        is_json = content.lstrip()[:1] == b"{"
        self.file_name = JSON if is_json else VOCABULARY
        try:
            made = _library().Tokenizer.from_str(content.decode()) if is_json else _bert(content.decode())
            own = (made.padding or {}).get("pad_id")
            made.no_padding()
            made.no_truncation()
            ends = made.num_special_tokens_to_add(is_pair=False)
        except ConfigError:
            raise
        except Exception as error:  # the package raises Exception itself
            text = " ".join(str(error).split())
            raise ConfigError(f"{where}: cannot be read as {JSON} or {VOCABULARY}, a tokenizer: {text}") from error
        if ends >= max_length:
            raise ConfigError(
                f"{where}: puts {ends} tokens around each text, which leaves nothing of it in max_length {max_length}"
            )
        made.enable_truncation(max_length)
        self._made = made
        self.size: int = max(made.get_vocab().values(), default=-1) + 1
        named = (made.token_to_id(name) for name in _PADDING)
        self.padding: int | None = own if own is not None else next((one for one in named if one is not None), None)

    def __deepcopy__(self, memo: Mapping[int, Any]) -> "Tokenizer":
        return self  # never changes

    def encode(self, text: str) -> tuple[list[int], int]:
        """The tokens of a text, and how many it would have had: more of them if it was cut.

        Halves of characters (lone surrogates), which are in no file of text, are read as U+FFFD.
        """
        whole = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        found = self._made.encode(whole)  # one by one: a batch would start threads, which loader processes cannot have
        ends = sum(found.special_tokens_mask)
        return found.ids, len(found.ids) + sum(len(rest.ids) - ends for rest in found.overflowing)


def read(path: Path, max_length: Count) -> Tokenizer | None:
    """The tokenizer of a file, or of a folder that holds `tokenizer.json` or `vocab.txt`; None: there is none.

    Raises:
        ConfigError: the file cannot be read.
    """
    places = (path / JSON, path / VOCABULARY, path)
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        return None
    try:
        return Tokenizer(found.read_bytes(), max_length, str(found))
    except OSError as error:
        raise ConfigError(f"{found}: cannot be read: {error.strerror}") from error


def trained(captions: Iterable[str], size: Count) -> bytes:
    """The content of a `tokenizer.json`, made of captions: pairs of bytes that occur together, in lower case.

    Byte-level (Radford et al. 2019, "GPT-2"): nothing is unknown to it, whatever the language. The same captions give
    the same bytes, in whatever order they come.

    Args:
        size: tokens at most, `SMALLEST` or more; fewer if the captions have no more to merge.

    Raises:
        ConfigError: a size below that.
    """
    if size < SMALLEST:
        raise ConfigError(f"--vocab: expected {SMALLEST} or more, every byte and {' '.join(SPECIAL)}; found {size}")
    library = _library()
    made = library.Tokenizer(library.models.BPE())
    made.normalizer = library.normalizers.Sequence([library.normalizers.NFC(), library.normalizers.Lowercase()])
    made.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=True)
    made.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[*SPECIAL],
        initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(captions, trainer)
    _, start, end = SPECIAL
    made.post_processor = library.processors.TemplateProcessing(
        single=f"{start} $A {end}", special_tokens=[(start, made.token_to_id(start)), (end, made.token_to_id(end))]
    )
    return (made.to_str(pretty=True) + "\n").encode()


def _bert(text: str) -> "tokenizers.Tokenizer":
    """Of the words of an uncased BERT, a line each."""
    library = _library()
    words = {word: number for number, word in enumerate(text.splitlines())}
    if missing := [word for word in _BERT.values() if word not in words]:
        raise ValueError(f"has no line {' nor '.join(missing)}")
    made = library.Tokenizer(library.models.WordPiece(words, unk_token=_BERT["unknown"], max_input_chars_per_word=100))
    made.normalizer = library.normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = library.pre_tokenizers.BertPreTokenizer()
    end, start = _BERT["end"], _BERT["start"]
    made.post_processor = library.processors.BertProcessing((end, words[end]), (start, words[start]))
    made.decoder = library.decoders.WordPiece()
    made.add_special_tokens([word for word in (*_BERT.values(), "[MASK]") if word in words])
    return made


def _library() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise ConfigError("a tokenizer needs the package tokenizers: pip install -e '.[text]'") from error
    return tokenizers
