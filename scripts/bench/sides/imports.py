"""Other people's code from the folder it lies in, unchanged, with stand-ins for packages that are not installed."""

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any


def import_first(folder: Path) -> None:
    """Let modules of the folder come before all others."""
    sys.path.insert(0, str(folder.resolve()))


def package(name: str, folder: Path) -> None:
    """Let a package be that of the folder, whatever else has its name: CompVis' is called ldm, too."""
    made = ModuleType(name)
    made.__path__ = [str((folder / name).resolve())]
    sys.modules[name] = made


def stand_in(name: str, **contents: Any) -> None:
    """A module with these contents in place of one that is not installed; nothing where it is.

    Its packages are made, too, unless they are there.
    """
    if name in sys.modules or _installed(name):
        return
    parent, _, last = name.rpartition(".")
    if parent:
        stand_in(parent)
    made = ModuleType(name)
    made.__path__ = []
    vars(made).update(contents)
    sys.modules[name] = made
    if parent:
        setattr(importlib.import_module(parent), last, made)


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):  # a package of it is missing, or is a stand-in
        return False
