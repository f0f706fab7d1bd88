"""The adapter of a run (lora.py) as files: peft's own, and diffusers' where a pipeline of its own can load it."""

from pathlib import Path

from ldm.errors import ConfigError
from ldm.interop import lora, lora_files
from ldm.interop.trained import Diffusion, Trained
from ldm.interop.usage import Choices, Usage

_TEXT = """An adapter (LoRA) of the network with the weights `{base}`, which are not in this folder.

```bash
ldm sample -r BASE_RUN --lora FOLDER --lora-scale 0.7
```

In Python, `peft.PeftModel.from_pretrained(network, FOLDER)` puts it on the base's network, a module of ldm."""


def adapted(model: Trained) -> Diffusion:
    """Of a run that was trained with an adapter.

    Raises:
        ConfigError: it was not.
    """
    if model.diffusion is None or not lora.is_adapted(model.diffusion.denoiser["network"]):
        raise ConfigError(f"--to lora: {model.file}: has no adapter; name a run with model.params.adapter")
    return model.diffusion


def write(model: Trained, out: Path, choices: Choices) -> Usage:
    """`adapter_model.safetensors` and `adapter_config.json`."""
    network = adapted(model).denoiser["network"]
    base = str((model.record.get("init_from") or {}).get("base") or lora.base_hash(network))
    lora_files.save(network, out, base)
    return Usage("peft", _TEXT.format(base=base))
