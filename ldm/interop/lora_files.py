"""Adapters in files, as peft writes and loads them: adapter_model.safetensors and adapter_config.json.

In adapter_model.safetensors a layer's A and B are `base_model.model.<layer>.lora_A.weight` and `...lora_B.weight`. Its
header says which base an adapter of ours is for; of those of others nobody knows.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ldm.errors import CheckpointError, ConfigError
from ldm.interop import lora
from ldm.interop.lora import LoRA
from ldm.interop.tables import listed
from ldm.weights.digest import weight_hash

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PREFIX = "base_model.model."
_BASE = "ldm.base"
"""In the header: the hash of the network that it was trained on (`lora.base_hash`)."""
# What changes more than A and B of a layer; absent in files of older versions of peft.
_PLAIN = {"peft_type": "LORA", "bias": "none", "use_dora": False, "lora_bias": False, "fan_in_fan_out": False}
_EMPTY = ("rank_pattern", "alpha_pattern", "modules_to_save", "layer_replication", "target_parameters")


@dataclass(frozen=True)
class Adapter:
    """An adapter that was read.

    Attributes:
        folder: where from.
        tensors: A and B under our names: `<layer>.lora_A.default.weight`.
        rank, scale: of every layer's update, scale * B A.
        base: hash of the network it was trained on; None: not known.
    """

    folder: Path
    tensors: Mapping[str, Tensor]
    rank: int
    scale: float
    base: str | None

    def record(self) -> dict[str, Any]:
        """For a checkpoint's facts, in plain values."""
        return {"folder": str(self.folder), "weights": weight_hash(self.tensors), "base": self.base}


def read(folder: Path) -> Adapter:
    """An adapter in peft's layout.

    Raises:
        CheckpointError: a file is missing or damaged, or holds something other than finite A and B of layers.
        ConfigError: the adapter does more than our layers can.
    """
    folder = Path(folder).expanduser()
    config = _config(folder / CONFIG)
    file = folder / WEIGHTS
    try:
        with safe_open(file, "pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  # no mapping
            base = (opened.metadata() or {}).get(_BASE)
    except FileNotFoundError as error:
        raise CheckpointError(f"{file}: no such file; expected a folder as peft saves it") from error
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file}: cannot be read: {error}; get it again") from error
    named = {}
    for name, tensor in tensors.items():
        layer, end = name.removeprefix(_PREFIX).rsplit(".lora_", 1) if ".lora_" in name else (name, "")
        if end not in ("A.weight", "B.weight") or not tensor.is_floating_point() or not tensor.isfinite().all():
            raise CheckpointError(f"{file}: {name}: expected <layer>.lora_A.weight or lora_B.weight, finite numbers")
        named[f"{layer}.lora_{end[0]}.{lora.ADAPTER}.weight"] = tensor.float()
    rank = config["r"]
    root = math.sqrt(rank) if config.get("use_rslora") else rank
    return Adapter(folder, named, rank, config["lora_alpha"] / root, base)


def _config(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}; name a folder as peft saves it") from error
    except ValueError as error:
        raise CheckpointError(f"{file}: not a JSON file: {error}") from error
    for key, kind in {"r": int, "lora_alpha": int | float}.items():
        value = config.get(key) if isinstance(config, dict) else None
        if not isinstance(value, kind) or isinstance(value, bool) or not value > 0:
            raise CheckpointError(f"{file}: {key}: expected a number above 0, found {value!r}")
    odd = [f"{key}={config[key]!r}" for key, value in _PLAIN.items() if config.get(key, value) != value]
    odd += [f"{key}={config[key]!r}" for key in _EMPTY if config.get(key)]
    if odd:
        raise ConfigError(f"{file}: {', '.join(odd)}: only plain LoRA of one rank for all layers can be loaded")
    return config


def check(network: nn.Module, adapter: Adapter, base: str | None = None) -> None:
    """Compare an adapter with that of a network, which may be without values.

    Args:
        base: hash of the network below its adapter, where it is known already; None: not compared.

    Raises:
        ConfigError: another base, other layers, another rank or scale.
    """
    if adapter.base is not None and base is not None and adapter.base != base:
        raise ConfigError(
            f"{adapter.folder}: an adapter of another base: it was trained on weights {adapter.base[:16]}..., this "
            f"network's are {base[:16]}.... Name the run that it was trained on"
        )
    own = {name: one for name, one in network.state_dict().items() if lora.is_adapters(name)}
    lines = listed("not in the file", [name for name in own if name not in adapter.tensors])
    lines += listed("in no place of this network", [name for name in adapter.tensors if name not in own])
    both = own.keys() & adapter.tensors.keys()
    shapes = {name: ([*own[name].shape], [*adapter.tensors[name].shape]) for name in sorted(both)}
    lines += listed(
        "of another shape", [f"{name}: expected {a}, found {b}" for name, (a, b) in shapes.items() if a != b]
    )
    scales = {layer.scaling[lora.ADAPTER] for layer in lora.layers(network).values()}
    if not lines and not all(math.isclose(scale, adapter.scale) for scale in scales):
        lines.append(f"  alpha / rank: expected {scales.pop():g}, found {adapter.scale:g}")
    if lines:
        alpha = adapter.scale * adapter.rank
        raise ConfigError(
            f"{adapter.folder}: does not fit the network's adapter (this one has rank {adapter.rank}, alpha {alpha:g}):"
            "\n" + "\n".join(lines)
        )


def load(network: nn.Module, adapter: Adapter) -> None:
    """Put an adapter into a network that has one of the same layers; ConfigError as in `check`."""
    check(network, adapter, None if adapter.base is None else lora.base_hash(network))
    network.load_state_dict({**network.state_dict(), **adapter.tensors})


def attach(denoiser: nn.ModuleDict, adapter: Adapter) -> None:
    """Put an adapter on a denoiser that has none; ConfigError as in `check`, or if it has one already."""
    network = denoiser["network"]
    if lora.is_adapted(network):
        raise ConfigError(f"{adapter.folder}: the model has an adapter already; export it --to merged first")
    device = next(network.parameters()).device
    targets = [*dict.fromkeys(name.partition(".lora_")[0] for name in adapter.tensors)]
    LoRA(adapter.rank, adapter.scale * adapter.rank, targets=targets)(denoiser)
    load(network, adapter)
    denoiser.to(device).requires_grad_(False).eval()


def save(network: nn.Module, folder: Path, base: str) -> None:
    """Write the adapter of a network as peft does.

    Args:
        base: hash of the network that it was trained on.
    """
    config = lora.config_of(network)
    config.inference_mode = True
    config.save_pretrained(str(folder))
    save_file(dict(named(network)), folder / WEIGHTS, {"format": "pt", _BASE: base})


def named(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """A and B of every layer under peft's names, on the CPU."""
    for name, tensor in network.state_dict().items():
        if lora.is_adapters(name):
            theirs = name.replace(f".{lora.ADAPTER}.", ".")
            yield f"{_PREFIX}{theirs}", tensor.detach().cpu().contiguous().to(torch.float32)
