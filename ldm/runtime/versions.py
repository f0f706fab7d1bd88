"""The versions of what a process runs on, for everything that is stored."""

import importlib.metadata
import platform
import subprocess
from contextlib import suppress
from pathlib import Path

import torch

import ldm


def versions() -> dict[str, str]:
    """What this process runs on: python, torch, lightning, ldm, and ldm's git commit where there is one."""
    found = {"python": platform.python_version(), "torch": str(torch.__version__)}
    for name in ("pytorch-lightning", "ldm"):
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    root = Path(str(ldm.__file__)).parents[1]
    if (root / ".git").exists():
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        with suppress(OSError, subprocess.SubprocessError):
            found["commit"] = subprocess.check_output(command, text=True, timeout=10, stderr=subprocess.DEVNULL).strip()
    return found
