"""What a configuration would train, without training it: parameters, shapes and FLOPs, on torch's meta device.

The meta device computes shapes alone, so that the largest model costs no memory and a second or two.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ldm.config import build, to_yaml
from ldm.randomness import Draws

# Batch normalisation refuses a single value a channel, so one image is not enough; FLOPs are linear in the number.
_ROWS = 2


def report(tree: Mapping[str, Any], facts: Mapping[str, Any], trust: Sequence[str] = ()) -> str:
    """The resolved configuration, then parameter counts, the batch's shapes and the FLOPs of one optimizer step.

    Args:
        tree: the configuration with every reference filled in.
        facts: what the data said of itself.
    """
    with torch.device("meta"):
        model = build(tree["model"], trust, key="model")
    batch = meta_batch(facts)
    flops = step_flops(model, batch) * facts["batch_size"] / _ROWS
    lines = [to_yaml(dict(tree)), "parameters"]
    lines += [f"  {name:<34}{count / 1e6:>10.2f} M" for name, count in parameter_counts(model).items()]
    lines += ["", f"batch (global, {facts['batch_size']} of {facts['num_items']} items)"]
    for name, value in batch.items():
        if isinstance(value, Tensor):
            shape = (facts["batch_size"], *value.shape[1:])
            lines.append(f"  {name:<34}{shape!s:>14} {str(value.dtype).removeprefix('torch.')}")
    lines += ["", f"first optimizer step: {flops / 1e9:,.1f} GFLOPs, forward and backward (a multiply-add counts 2)"]
    return "\n".join(lines)


def meta_batch(facts: Mapping[str, Any]) -> dict[str, Any]:
    """A batch of the data that states `facts`, without values."""
    # Only latents know how much smaller than the images they are.
    key = "latent" if "down_factor" in facts else "image"
    shape = (_ROWS, facts["channels"], facts["resolution"], facts["resolution"])
    batch: dict[str, Any] = {key: torch.empty(shape, device="meta")}
    if facts.get("num_classes") is not None:
        batch["class_label"] = torch.zeros(_ROWS, dtype=torch.int64, device="meta")
    batch["draws"] = Draws(0, range(_ROWS), facts["batch_size"], "meta")
    return batch


def step_flops(model: Any, batch: Mapping[str, Any]) -> int:
    """Floating point operations of `model.total_loss(batch)` and its backward pass."""
    model.train()
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


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
