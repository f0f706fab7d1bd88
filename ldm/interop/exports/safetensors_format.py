"""Weights as safetensors, with what is needed to build the model again, which `ldm convert` reads (own_format.py)."""

import copy
import json
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm import files
from ldm.interop.exports import own_format
from ldm.interop.exports.trained import Trained
from ldm.interop.exports.usage import Choices, Usage
from ldm.runtime.versions import versions
from ldm.sizes import as_resolution

_TEXT = """Make a run folder of this folder, which then samples, trains on and is measured like any other:

```bash
ldm convert FOLDER --name NAME{more}
ldm {command}
```

The weights are under the names of ldm's modules, which `config.json` lists with their parameters."""


def write(model: Trained, out: Path, choices: Choices) -> Usage:
    """One set of weights, in files of 5 GB at most, and `config.json`."""
    from huggingface_hub import save_torch_state_dict

    save_torch_state_dict(tensors(model), out)
    files.write_text(out / "config.json", json.dumps(description(model, choices), indent=2) + "\n")
    params = {} if model.diffusion is None else dict(model.params)
    more = "".join(f" {one.flag} DIR" for one in own_format.ELSEWHERE if any(one.among(params)))
    command = "evaluate -r 'logs/*_NAME'" if model.diffusion is None else "sample -r 'logs/*_NAME'"
    return Usage("ldm", _TEXT.format(command=command, more=more))


def tensors(model: Trained) -> dict[str, Tensor]:
    """Every weight by its part's name and its own: `network.conv_in.weight`, `autoencoder.encoder.conv_in.weight`."""
    parts = {name: one for name, one in model.modules.items() if name != "autoencoder" or model.holds_autoencoder}
    return {f"{part}.{key}": one for part, module in parts.items() for key, one in module.state_dict().items()}


def description(model: Trained, choices: Choices) -> dict[str, Any]:
    """config.json: everything but the weights; no paths of this machine."""
    codec, diffusion = model.codec, model.diffusion
    autoencoder = {
        "parts": codec.config if model.holds_autoencoder else {},
        "of others": {} if model.holds_autoencoder else codec.config,
        "resolution": None if codec.size is None else as_resolution(codec.size),
        "statistics": codec.statistics,
    }
    facts = {
        "_class_name": own_format.AUTOENCODER if diffusion is None else own_format.DIFFUSION,
        "format": own_format.FORMAT,
        "name": model.run.name,
        "license": model.license(choices),
        "step": model.record.get("step"),
        "images_seen": model.record.get("images_seen"),
        "weights": model.weights,
        "origin": model.record.get("origin"),
        "versions": {"training": model.record.get("versions"), "export": versions()},
        "autoencoder": autoencoder if codec.config else None,
    }
    if diffusion is None:
        return facts
    latents = diffusion.manifest.to_dict()
    latents["plan"]["autoencoder"] |= {"path": "", "config": {}}
    parts = {name: copy.deepcopy(model.params[name]) for name in ("network", "conditioner", "objective")}
    for one in own_format.ELSEWHERE:
        for params in one.among(parts):
            params["encoder"] = ""
    described = {"model": parts | {"label_dropout": model.params.get("label_dropout", 0.0)}, "latents": latents}
    return facts | described | {"randomness": model.config.get("randomness", {})}
