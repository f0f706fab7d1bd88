"""What a table was measured on."""

import platform
import time
from pathlib import Path

import diffusers
import torch


def hardware(device: str) -> str:
    """One line: when, on what, with which libraries."""
    if device.startswith("cuda"):
        machine = torch.cuda.get_device_name(device)
    else:
        names = [line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
        machine = f"{names[0] if names else platform.processor()}, {torch.get_num_threads()} threads"
    return f"{time.strftime('%Y-%m-%d')}, {machine}, torch {torch.__version__}, diffusers {diffusers.__version__}"


def _lines(file: str) -> list[str]:
    return Path(file).read_text().splitlines() if Path(file).is_file() else []
