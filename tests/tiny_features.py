"""A data set in memory whose captions can change alone, and features of captions and of pictures."""

import hashlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ldm.diffusion.conditioners.features import Part
from ldm.errors import DataError

LONGEST, WIDTH = 6, 8


def words(item: int, captions: int = 0) -> list[str]:
    """The captions of an item: one to three, unless a number is given."""
    colors = ("red", "green", "a very dark blue", "")
    return [f"{colors[(item + n) % 4]} picture {item} {n}".strip() for n in range(captions or 1 + item % 3)]


class CaptionedPictures:
    """`number` RGB pictures of 20 x 24 noise in 3 classes, each with its captions.

    Args:
        broken: pictures that cannot be read.
        unreadable: items whose captions cannot be read.
        captions: of all items; None: those of `words`.
    """

    num_classes = 3

    def __init__(self, number=10, broken=(), unreadable=(), captions=None):
        self.number, self.broken, self.unreadable = number, broken, unreadable
        self.texts = [words(item) for item in range(number)] if captions is None else captions
        self.class_names = ["cat", "dog", "boat"]

    def __len__(self):
        return self.number

    def __getitem__(self, index):
        return {**self.without_captions(index), "caption": self.captions(index)}

    def without_captions(self, index):
        if index in self.broken:
            raise DataError(f"{self.path(index)}: cannot be read")
        noise = np.random.default_rng(index).integers(0, 256, (20 + index, 24, 3), dtype=np.uint8)
        return {"image": Image.fromarray(noise), "class_label": index % 3}

    def has_captions(self):
        return True

    def captions(self, index):
        if index in self.unreadable:
            raise DataError(f"memory/{index}.txt: cannot be read as a caption")
        return self.texts[index]

    def captions_fingerprint(self):
        return hashlib.sha256(repr(self.texts).encode()).hexdigest()

    def pictures_fingerprint(self):
        return f"{self.number} pictures"

    def fingerprint(self):
        return f"{self.number} {self.captions_fingerprint()}"

    def sizes(self):
        return np.array([(20 + index, 24) for index in range(self.number)])

    def columns(self):
        return {"score": np.arange(self.number, dtype=np.float32), "tag": np.ones((self.number, 3), np.float32)}

    def path(self, index):
        return f"memory/{index}.png"

    def prepare(self):
        pass


class TogetherPictures:
    """The same without the methods that read captions alone."""

    num_classes = 3
    class_names = ("cat", "dog", "boat")

    def __init__(self, *args, **params):
        self.whole = CaptionedPictures(*args, **params)
        self.class_names = list(self.class_names)

    def __len__(self):
        return len(self.whole)

    def __getitem__(self, index):
        return self.whole[index]

    def path(self, index):
        return self.whole.path(index)

    def fingerprint(self):
        return self.whole.fingerprint()

    def prepare(self):
        pass


class Words:
    """A feature of captions: a ragged row for each word, and their sum.

    Args:
        salt: of the words' vectors, as weights are.
        diary: a file into which it writes a line for each caption that it encodes.
        dtype: of the tokens.
    """

    reads = "caption"

    def __init__(self, salt: int = 0, diary: str | None = None, dtype: str = "float16") -> None:
        self.salt, self.diary, self.dtype = salt, diary, getattr(torch, dtype)
        self.in_memory = False

    @property
    def parts(self):
        return {"tokens": Part((LONGEST, WIDTH), self.dtype, ragged=True), "vector": Part((WIDTH,), torch.float32)}

    def describe(self):
        return {"weights": f"salt {self.salt}", "tokenizer": "words", "max_length": LONGEST}

    def encode(self, value, device):
        self.in_memory = True
        if self.diary is not None:
            with Path(self.diary).open("a") as file:
                file.write(f"{value}\n")
        found = [self._vector(word) for word in ["<s>", *value.split()][:LONGEST]]
        tokens = torch.stack(found)
        return {"tokens": tokens.to(self.dtype), "vector": tokens.sum(0)}

    def is_cut(self, value):
        return len(value.split()) > LONGEST - 1

    def release(self):
        self.in_memory = False

    def _vector(self, word):
        seed = int.from_bytes(hashlib.sha256(f"{self.salt} {word}".encode()).digest()[:4], "little")
        return torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed))


class Colors:
    """A feature of pictures: the mean of each channel."""

    reads = "image"

    def __init__(self):
        self.parts = {"vector": Part((3,), torch.float32)}

    def describe(self):
        return {"what": "mean"}

    def encode(self, value, device):
        return {"vector": torch.from_numpy(np.asarray(value, dtype=np.float32).mean((0, 1)) / 255)}

    def release(self):
        pass


class WordConditioner(torch.nn.Module):
    """Reads the feature `text`, from a batch's columns or from its captions."""

    keys = ("caption",)

    def __init__(self, feature):
        super().__init__()
        self.feature = feature

    def forward(self, batch):
        from ldm.diffusion.conditioners.base import Conditioning
        from ldm.diffusion.conditioners.features import columns

        device = batch["draws"].device if "draws" in batch else torch.device("cpu")
        found = columns(self.feature, "text", batch, device)
        return Conditioning(
            vector=found["text.vector"], tokens=found["text.tokens"].float(), token_mask=found["text.tokens_mask"]
        )

    def null(self, n):
        return self({"caption": [""] * n})
