"""Weights as safetensors, with what is needed to build the model again, which `ldm convert` reads."""

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm import files
from ldm.interop.trained import Trained
from ldm.interop.usage import Choices, Usage, optional_packages
from ldm.runtime.versions import versions


def write(model: Trained, out: Path, choices: Choices) -> Usage:
    """One set of weights, in files of 5 GB at most, and `config.json`."""
    with optional_packages("--to safetensors"):
        from huggingface_hub import save_torch_state_dict
    save_torch_state_dict(tensors(model), out)
    files.write_text(out / "config.json", json.dumps(description(model), indent=2) + "\n")
    return Usage("ldm", "")


def tensors(model: Trained) -> dict[str, Tensor]:
    """Every weight by its part's name and its own: `network.conv_in.weight`, `autoencoder.encoder.conv_in.weight`."""
    return {f"{part}.{key}": one for part, module in model.modules.items() for key, one in module.state_dict().items()}


def description(model: Trained) -> dict[str, Any]:
    return {"versions": versions()}
