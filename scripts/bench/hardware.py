"""What a table was measured on."""

import os
import platform
import time
from pathlib import Path
from typing import Any

import diffusers
import torch

from ldm.runtime.precision import LIMITS

MKL_LIMIT = "MKL_ENABLE_INSTRUCTIONS"
"""MKL's products heed this variable instead of the others."""

_KINDS = ("amx_bf16", "avx512_bf16", "avx512f", "avx2")
"""Of x86 processors, by their flags; the first that one has says how it computes."""


def machine(device: str) -> dict[str, Any]:
    """When, on what, with which libraries, by name."""
    cuda = device.startswith("cuda")
    about = _lines("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in about if line.startswith("model name")]
    return {
        "date": time.strftime("%Y-%m-%d"),
        "processor": torch.cuda.get_device_name(device) if cuda else names[0] if names else platform.processor(),
        "kind": "cuda" if cuda else kind(about),
        "limits": {} if cuda else {name: os.environ[name] for name in (*LIMITS, MKL_LIMIT) if name in os.environ},
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
    }


def kind(about: list[str]) -> str:
    """The widest instructions of a processor that a matrix product uses, from the lines of /proc/cpuinfo."""
    flags = next((line.split() for line in about if line.startswith("flags")), [])
    return next((one for one in _KINDS if one in flags), platform.machine())


def hardware(device: str) -> str:
    """The same in one line."""
    found = machine(device)
    limits = "".join(f", {name}={value}" for name, value in found["limits"].items())
    where = f"{found['processor']} ({found['kind']}{limits}), {found['threads']} threads"
    return f"{found['date']}, {where}, torch {found['torch']}, diffusers {found['diffusers']}"


def _lines(file: str) -> list[str]:
    return Path(file).read_text().splitlines() if Path(file).is_file() else []
