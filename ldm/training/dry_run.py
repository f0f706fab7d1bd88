"""What a configuration would train, without training it: whether the data fits the model, parameters, shapes, FLOPs.

All of it happens on torch's meta device, which computes only shapes: the largest model takes a second and no memory.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ldm.config.load import build, to_yaml
from ldm.diffusion.conditioners.pictures import FeaturePicture
from ldm.diffusion.conditioners.text import FeatureText
from ldm.diffusion.module import LatentDiffusion
from ldm.errors import ConfigError, LdmError
from ldm.sizes import SizeError, as_size, nearest, spell

# Parameters of models that have to agree with a fact of the data, wherever they occur.
_TIED = {"in_channels": "channels", "out_channels": "channels", "num_classes": "num_classes"}
_CLASSES = ("num_classes", "map_classes", "box_classes")
_TIED |= {name: name for name in _CLASSES}


def meta_model(tree: Mapping[str, Any], trust: Sequence[str] = ()) -> Any:
    """The module of `tree["model"]`, in training mode, without values."""
    with torch.device("meta"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*copying from a non-meta parameter.*")
        return build(tree["model"], trust, key="model").train()


def check_fit(
    model: Any,
    tree: Mapping[str, Any],
    facts: Mapping[str, Any],
    batch: Mapping[str, Any],
    origin: Callable[[str], str],
) -> None:
    """Pass a batch without values through the model.

    Args:
        model: of `meta_model`.
        tree: the configuration with every reference filled in.
        facts: of the data module (`data.facts()`).
        batch: of the data, without values (`data.meta_batch()`).
        origin: dotted key -> where it was written.

    Raises:
        ConfigError: it does not pass, or labels are out of range; names the keys that disagree with the data.
    """
    if isinstance(model, LatentDiffusion):
        _require_features(model.denoiser["conditioner"], facts.get("features", {}))
    tied = [(key, value, fact) for key, value, fact in _tied(tree["model"], "model") if facts.get(fact) is not None]
    try:
        # Without values an index out of range goes unnoticed. (More classes than the data has do no harm.)
        if any(value < facts[fact] for _, value, fact in tied if fact in _CLASSES):
            raise ValueError("labels out of range")
        model.total_loss(batch)
    except (LdmError, RuntimeError, ValueError, IndexError, KeyError) as error:
        shapes = ", ".join(f"{name} {shape}" for name, shape, _ in _shapes(batch))
        lines = [f"model: a global batch of {shapes} does not pass through it: {str(error).splitlines()[0]}."]
        lines += [
            f"  {key} ({origin(key)}) is {value}, the data has {facts[fact]}: write ${{data:{fact}}}"
            for key, value, fact in tied
            if value != facts[fact]
        ]
        if isinstance(error, SizeError):
            lines += _fitting_sizes(error, facts, origin)
        raise ConfigError("\n".join(lines)) from error


def _require_features(conditioner: nn.Module, kept: Mapping[str, Any]) -> None:
    """ConfigError unless what a conditioner reads of the cache is what it makes itself, for samples and its null.

    Args:
        kept: what features of the cache say of themselves, by name.
    """
    for part in conditioner.modules():
        if not isinstance(part, FeatureText | FeaturePicture) or not kept:
            continue
        own, key = part.feature.describe(), f"data.params.features.{part.name}"
        if part.name not in kept:
            same = [name for name, one in kept.items() if one == own]
            if same:
                raise ConfigError(
                    f"model.params.conditioner: name: {part.name}: the cache keeps this feature as {same[0]}; write "
                    f"name: {same[0]}"
                )
        elif differing := [name for name, one in own.items() if kept[part.name].get(name) != one]:
            raise ConfigError(
                f"{key}: not the feature of model.params.conditioner, of which {differing[0]} is {own[differing[0]]}, "
                f"and here {kept[part.name].get(differing[0])}; write feature: ${{{key}}} there"
            )


def _fitting_sizes(error: SizeError, facts: Mapping[str, Any], origin: Callable[[str], str]) -> list[str]:
    """A line with the nearest pictures that the network can divide, where it is their size that is wrong."""
    key, factor = "data.params.resolution", error.factor * facts.get("down_factor", 1)
    size = as_size(facts.get("image_resolution", facts["resolution"]))
    where, fix = place(key, origin), nearest(size, factor)
    return [f"  {key} ({where}) is {spell(size)}, expected multiples of {factor}: use {fix}"] if fix else []


def place(key: str, origin: Callable[[str], str]) -> str:
    """Where a key was written, for messages."""
    try:
        return origin(key)
    except ConfigError:  # not written: a default
        return "by default"


def _tied(node: Any, key: str) -> Iterator[tuple[str, int, str]]:
    """(dotted key, value, fact) of every parameter that is named in _TIED."""
    if isinstance(node, Mapping):
        for name, value in node.items():
            if name in _TIED and isinstance(value, int):
                yield f"{key}.{name}", value, _TIED[name]
            yield from _tied(value, f"{key}.{name}")


def report(model: Any, tree: Mapping[str, Any], facts: Mapping[str, Any], *batches: Mapping[str, Any]) -> str:
    """The resolved configuration, then parameter counts, the batch's shapes and the FLOPs of one optimizer step.

    Args:
        model: of `meta_model`.
        tree: the configuration with every reference filled in.
        facts: of the data module (`data.facts()`).
        batches: of the data, without values, one of each shape.
    """
    lines = [to_yaml(dict(tree)), "parameters"]
    lines += [f"  {name:<34}{count / 1e6:>10.2f} M" for name, count in parameter_counts(model).items()]
    for batch in batches:
        # FLOPs are linear in the number of rows.
        flops = step_flops(model, batch) * batch["draws"].batch_size / len(batch["draws"])
        which = "first optimizer step" if len(batches) == 1 else "an optimizer step of this size"
        lines += ["", f"global batch, of {facts['num_items']} items"]
        lines += [f"  {name:<34}{shape!s:>20} {kind}" for name, shape, kind in _shapes(batch)]
        lines += ["", f"{which}: {flops / 1e9:,.1f} GFLOPs, forward and backward (a multiply-add counts as 2)"]
    return "\n".join(lines)


def step_flops(model: Any, batch: Mapping[str, Any]) -> int:
    """Floating point operations of `model.total_loss(batch)` and its backward pass."""
    with FlopCounterMode(display=False) as counter:
        model.total_loss(batch).backward()
    return int(counter.get_total_flops())


def parameter_counts(model: nn.Module, depth: int = 2) -> dict[str, int]:
    """{dotted name: parameters} of the module and what is in it, to `depth` levels; parts under 1% are left out."""
    total = _count(model)
    counts = {"total": total, "trained": sum(p.numel() for p in model.parameters() if p.requires_grad)}
    for name, module in model.named_modules():
        if name and name.count(".") < depth and _count(module) >= max(1, total / 100):
            counts[name] = _count(module)
    return counts


def _shapes(batch: Mapping[str, Any]) -> list[tuple[str, tuple[int, ...], str]]:
    """(name, shape of the global batch, type) of each tensor."""
    tensors = [(name, value) for name, value in batch.items() if isinstance(value, Tensor)]
    return [
        (name, (batch["draws"].batch_size, *value.shape[1:]), str(value.dtype).removeprefix("torch."))
        for name, value in tensors
    ]


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
