"""Tokenizers of files: those of transformers to the number, any text, and the same file for the same captions."""

import copy
import hashlib
import random
import subprocess
import sys

import pytest

from ldm.diffusion.conditioners.text_transformer import TextTransformer
from ldm.diffusion.conditioners.tokenizer import SMALLEST, Tokenizer, read, trained
from ldm.errors import ConfigError
from tests.tiny_text import BERT_WORDS, save_vocabulary

pytest.importorskip("tokenizers")

CAPTIONS = ["red heart", "cat with tears of joy", "Katze mit Freudentränen", "قط أحمر", "猫の顔", "👩‍👩‍👧 family"] * 3
STRANGE = ["", "   ", "🐱", "قط", "x\u200f\u202ey", "a\ud83d", "a\ud83d\ude00", "\x00\n", "[MASK] <end>", "ß" * 5000]


@pytest.fixture
def vocabulary(tmp_path):
    return save_vocabulary(tmp_path / "vocab.txt")


def test_a_vocabulary_is_that_of_transformers(vocabulary):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.BertTokenizer(vocab=str(vocabulary))
    ours = read(vocabulary, 12)
    assert (ours.file_name, ours.size, ours.padding) == ("vocab.txt", len(BERT_WORDS), 0)
    for text in ("A red  Cat!", "", "cats [MASK] unknowable", "émile", "a cat " * 40):
        expected = theirs(text, truncation=True, max_length=12)["input_ids"]
        assert ours.encode(text)[0] == expected
    whole = theirs("a cat " * 40)["input_ids"]
    assert ours.encode("a cat " * 40)[1] == len(whole)


def test_a_file_of_the_package_is_read_without_its_own_lengths(tmp_path):
    from tokenizers import Tokenizer as Theirs

    made = Theirs.from_str(trained(CAPTIONS, 300).decode())
    plain = made.encode("red heart").ids
    made.enable_padding(pad_id=7, length=50)
    made.enable_truncation(3)
    made.save(str(tmp_path / "tokenizer.json"))
    ours = read(tmp_path, 20)
    assert ours.encode("red heart") == (plain, len(plain))
    assert ours.padding == 7
    assert ours.digest == hashlib.sha256((tmp_path / "tokenizer.json").read_bytes()).hexdigest()
    assert copy.deepcopy(ours) is ours


def test_the_same_captions_give_the_same_file_in_any_order_and_process(tmp_path):
    content = trained(CAPTIONS, 300)
    shuffled = random.Random(0).sample(CAPTIONS, len(CAPTIONS))
    assert trained(shuffled, 300) == content
    code = "import sys; from ldm.diffusion.conditioners.tokenizer import trained; " + (
        f"sys.stdout.buffer.write(trained({CAPTIONS!r}, 300))"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, timeout=100)
    assert other.stdout == content


def test_a_trained_one_knows_every_text_and_reads_no_case():
    ours = Tokenizer(trained(CAPTIONS, 300), 16, "here")
    assert ours.size == 300
    assert ours.encode("Red HEART") == ours.encode("red heart")
    start, end = ours.encode("")[0]
    for text in STRANGE:
        found, whole = ours.encode(text)
        assert found[0] == start
        assert found[-1] == end
        assert len(found) == min(whole, 16)
    assert ours.encode("a\ud83d\ude00") == ours.encode("a😀")
    assert ours.encode("\ud83d") == ours.encode("\ufffd")
    found, whole = ours.encode("heart " * 10_000)
    assert len(found) == 16
    assert whole >= 10_000
    assert Tokenizer(trained([], SMALLEST), 16, "here").encode("猫")[1] == 6  # a token a byte, with the space before


def test_what_is_no_tokenizer_is_refused(tmp_path, vocabulary):
    assert read(tmp_path / "none.json", 8) is None
    for name, content, message in (
        ("broken.json", b"{", "cannot be read as tokenizer.json or vocab.txt"),
        ("image.png", b"\x89PNG\xff", "cannot be read as tokenizer.json or vocab.txt"),
        ("words.txt", b"[PAD]\n[UNK]\na", r"has no line \[CLS\] nor \[SEP\]"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ConfigError, match=rf"{name}: .*{message}"):
            read(tmp_path / name, 8)
    with pytest.raises(ConfigError, match=r"puts 2 tokens around each text.*max_length 2"):
        read(vocabulary, 2)
    with pytest.raises(ConfigError, match=rf"--vocab: expected {SMALLEST} or more.*found 100"):
        trained(CAPTIONS, 100)


def test_without_the_package_the_extra_is_named(vocabulary, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ConfigError, match=r"needs the package tokenizers: pip install -e '\.\[text\]'"):
        read(vocabulary, 8)


def test_a_table_has_rows_for_the_numbers_that_no_token_has(tmp_path):
    from tokenizers import Tokenizer as Theirs
    from tokenizers import models, pre_tokenizers

    made = Theirs(models.WordLevel({"<pad>": 0, "red": 1, "cat": 900}, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.save(str(tmp_path / "tokenizer.json"))
    ours = read(tmp_path, 8)
    assert ours.size == 901
    assert ours.encode("red cat")[0] == [1, 900]
    said = "has 901 tokens, gaps in their numbers included, found 3; write 901"
    with pytest.raises(ConfigError, match=said):
        TextTransformer(tmp_path, channels=8, depth=1, vocab_size=3, max_length=8)


def test_a_vocabulary_may_name_a_word_twice(vocabulary):
    vocabulary.write_text(vocabulary.read_text() + "red\nlast\n")
    ours = read(vocabulary, 12)
    assert ours.size == max(ours.encode("last red")[0]) + 1 == len(BERT_WORDS) + 2
