"""The adapter of a run (lora.py) as files: peft's own, and diffusers' where a pipeline of its own can load it."""

from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor, nn

from ldm.diffusion.networks.unet import UNet
from ldm.errors import ConfigError
from ldm.interop import lora, lora_files
from ldm.interop.diffusers_models.unet_table import table_of
from ldm.interop.exports.trained import Diffusion, Trained
from ldm.interop.exports.usage import Choices, Usage
from ldm.interop.tables import LINEAR_AS_CONV2D, SAME, Entry

_TEXT = """An adapter (LoRA) of the network with the weights `{base}`, which are not in this folder.

```bash
ldm sample -r BASE_RUN --lora FOLDER --lora-scale 0.7
```

{pipeline}In Python, `peft.PeftModel.from_pretrained(network, FOLDER)` puts it on the base's network."""

_PIPELINE = """On a pipeline of diffusers that was made of the base (`ldm export BASE_RUN --to diffusers`):

```python
pipeline.unet.load_lora_adapter(FOLDER, prefix="unet", weight_name="pytorch_lora_weights.safetensors")
```

"""
_DIFFUSERS = "pytorch_lora_weights.safetensors"


def adapted(model: Trained) -> Diffusion:
    """Of a run that was trained with an adapter.

    Raises:
        ConfigError: it was not.
    """
    if model.diffusion is None or not lora.is_adapted(model.diffusion.denoiser["network"]):
        raise ConfigError(f"--to lora: {model.file}: has no adapter; name a run with model.params.adapter")
    return model.diffusion


def write(model: Trained, out: Path, choices: Choices) -> Usage:
    """peft's two files and, where diffusers can load it, its own beside them."""
    network = adapted(model).denoiser["network"]
    base = str((model.record.get("init_from") or {}).get("base") or lora.base_hash(network))
    lora_files.save(network, out, base)
    theirs = for_diffusers(network)
    if theirs:
        save_file(theirs, out / _DIFFUSERS, {"format": "pt"})
    return Usage("peft", _TEXT.format(base=base, pipeline=_PIPELINE if theirs else ""))


def for_diffusers(network: nn.Module) -> dict[str, Tensor]:
    """The adapter under the names of a UNet2DConditionModel, the only network of ours whose like loads adapters there.

    alpha / rank is multiplied into B, so that their default, 1, is right.

    Returns:
        {}: diffusers has no place for it.
    """
    if not isinstance(network, UNet) or network.context_dim is None:
        return {}
    layers = lora.layers(network)
    entries = {entry.ours: entry for entry in table_of(network)}
    found: dict[str, Tensor] = {}
    for name, layer in layers.items():
        entry = entries.get(f"{name}.weight")
        if entry is None or entry.change not in (SAME, LINEAR_AS_CONV2D):
            return {}
        weights = {letter: getattr(layer, f"lora_{letter}")[lora.ADAPTER].weight.detach() for letter in "AB"}
        weights["B"] = weights["B"] * layer.scaling[lora.ADAPTER]
        found |= {_theirs(entry, letter): entry.change.theirs(one)[0].contiguous() for letter, one in weights.items()}
    return found


def _theirs(entry: Entry, letter: str) -> str:
    return f"unet.{entry.theirs[0].removesuffix('.weight')}.lora_{letter}.weight"
