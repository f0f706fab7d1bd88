"""A run folder of its own with the adapter (lora.py) added to the weights: it is sampled and trained like any other."""

from pathlib import Path
from typing import Any

from torch import Tensor

from ldm.interop import lora, runs
from ldm.interop.exports import lora_format
from ldm.interop.exports.trained import Trained
from ldm.interop.exports.usage import Choices, Usage
from ldm.interop.models import Origin
from ldm.interop.sources import Source
from ldm.run_folder import RunFolder

_TEXT = """This folder is a run of ldm:

```bash
ldm sample -r FOLDER
```"""
_NOTE = "the adapter of {file}, step {step}, weights: {weights}, was added to its base"


def write(model: Trained, out: Path, choices: Choices) -> Usage:
    """The run's configuration without the adapter; its average and last weights are both those that were chosen."""
    diffusion = lora_format.adapted(model)
    lora.merge(diffusion.denoiser["network"])
    config = {**model.config, "model": {**model.config["model"], "params": dict(model.params)}}
    config["model"]["params"].pop("adapter")
    config.pop("init_from", None)
    weights: dict[str, Any] = {}
    for part in ("denoiser", "ema.average"):
        weights |= _named(part, diffusion.denoiser.state_dict())
    weights |= _named("objective", diffusion.objective.state_dict())
    weights["ema._extra_state"] = {"images_seen": 0}
    note = _NOTE.format(file=model.file.name, step=model.record["step"], weights=model.weights)
    origin = Origin("ldm export --to merged", model.license(choices), notes=[note])
    facts = {"kind": "diffusion", "latents": diffusion.manifest.to_dict()}
    source = Source(path=model.file, tensors={}, rest={}, config={}, sha256={})
    runs.fill(RunFolder(out), runs.untrained(config, facts, weights, origin, source))
    return Usage("ldm", _TEXT)


def _named(part: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{part}.{name}": one for name, one in weights.items()}
