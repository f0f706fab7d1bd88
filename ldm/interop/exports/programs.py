"""Networks as programs that run without our code: what torch.export traces, and what a caller has to know of them.

`denoiser` is the network alone; `programs.json` says for each step of a sampler what to multiply its input and output
by, which is all that an objective is to it. `conditions.npz` holds the conditioner's answers. `decoder` maps latents as
the encoder makes them, not standardized, to pictures.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from ldm import files
from ldm.diffusion.conditioners.base import Conditioner, Conditioning
from ldm.diffusion.objectives import Network, Objective
from ldm.errors import ConfigError, NumericError
from ldm.interop.exports.trained import Diffusion, Trained

STEPS = 50
"""Of the table of a sampler's steps."""
_ROWS = 2  # of the example that is traced: of one, torch takes the number for a constant
_AXES = {0: "batch", 2: "height", 3: "width"}
_SLOTS = ("vector", "tokens", "spatial", "token_mask")

Run = Callable[[Mapping[str, Tensor]], Tensor]
"""Inputs by name -> output."""


class _Denoising(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network: Network = network

    def forward(
        self,
        x: Tensor,
        noise_level: Tensor,
        vector: Tensor | None = None,
        tokens: Tensor | None = None,
        spatial: Tensor | None = None,
        token_mask: Tensor | None = None,
    ) -> Tensor:
        return self.network(x, noise_level, Conditioning(vector, tokens, spatial, token_mask)).float()


class _Decoding(nn.Module):
    def __init__(self, codec: nn.Module) -> None:
        super().__init__()
        self.codec = codec

    def forward(self, latents: Tensor) -> Tensor:
        return self.codec.decode(latents)  # type: ignore[operator]  # a module's attribute


@dataclass(frozen=True)
class Program:
    """A network and an example of its inputs.

    Attributes:
        name: of its file.
        module: takes the inputs by name.
        example: inputs of the right shape, float32; masks bool.
        ranges: what each input holds, in words.
        output: the output's name.
    """

    name: str
    module: nn.Module
    example: Mapping[str, Tensor]
    ranges: Mapping[str, str]
    output: str

    @cached_property
    def _traced(self) -> tuple[ExportedProgram, str]:
        problem = ""
        for axes in ((0, 2, 3), (0,)):
            shapes = {name: dict.fromkeys(_axes(one, axes), Dim.DYNAMIC) for name, one in self.example.items()}
            try:
                return (
                    torch.export.export(self.module, (), dict(self.example), dynamic_shapes=shapes, strict=False),
                    problem,
                )
            except Exception as error:  # torch.export raises whatever its tracer, or the network, does
                problem = problem or (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"the {self.name} cannot be traced by torch.export: {problem}")

    @property
    def traced(self) -> ExportedProgram:
        """Batch, and where that can be traced height and width, may change; ConfigError if nothing can be traced."""
        return self._traced[0]

    @property
    def fixed(self) -> str:
        """Why height and width are those of training; empty: they may change."""
        return self._traced[1]

    def axes(self, name: str) -> dict[int, str]:
        """The axes of an input that may change, by number."""
        return {axis: _AXES[axis] for axis in _axes(self.example[name], (0,) if self.fixed else (0, 2, 3))}

    def difference(self, run: Run) -> float:
        """How far another run of the program is from the module, in units of the largest value, on three rows.

        Raises:
            NumericError: further than float32 explains.
        """
        inputs = {name: torch.cat([one, one[:1]]) for name, one in self.example.items()}
        with torch.no_grad():
            expected = self.module(**inputs)
        found = run(inputs)
        apart = float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-6))
        if not apart < 1e-3:
            raise NumericError(
                f"the {self.name} as a program differs from the model by {apart:.1e} of its largest value"
            )
        return apart

    def described(self, file: str, run: Run) -> dict[str, Any]:
        """For programs.json."""
        inputs = {}
        for name, one in self.example.items():
            shape = [self.axes(name).get(axis, size) for axis, size in enumerate(one.shape)]
            inputs[name] = {"shape": shape, "dtype": str(one.dtype).removeprefix("torch."), "holds": self.ranges[name]}
        found = {
            "file": file,
            "inputs": inputs,
            "output": self.output,
            "difference from torch": self.difference(run),
        }
        return found | ({"height and width are fixed": self.fixed} if self.fixed else {})


def programs(model: Trained) -> list[Program]:
    """The decoder, unless the latents are the pictures themselves, and of stage 2 the denoiser."""
    made = [_denoiser(model.diffusion)] if model.diffusion is not None else []
    return [*made, _decoder(model)] if model.codec.config else made


def write_facts(model: Trained, described: Mapping[str, Any], out: Path) -> None:
    """Write `programs.json`, and of stage 2 `conditions.npz`.

    Args:
        described: `Program.described` of each, by name.
    """
    facts: dict[str, Any] = {"format": 1, **described}
    if model.diffusion is not None:
        table, rows = conditions(model.diffusion)
        manifest, objective = model.diffusion.manifest, model.diffusion.objective
        facts["latents"] = {"shape": [*manifest.plan.shape], "mean": manifest.mean, "std": manifest.std}
        facts["objective"] = {
            "class": f"{type(objective).__module__}.{type(objective).__qualname__}",
            "x": "alpha * data + sigma * noise",
            "output": "of the denoiser from c_in * x and noise_level",
            "data": "c_skip * x + c_out * output",
            "steps": steps(objective),
        }
        if table:
            facts["conditions"] = {"file": "conditions.npz", "rows": rows}
            np.savez(out / "conditions.npz", **table)
    files.write_text(out / "programs.json", json.dumps(facts, indent=1) + "\n")


def steps(objective: Objective, number: int = STEPS) -> list[dict[str, float]]:
    """For each time of the objective's own schedule what a sampler multiplies by; the last one is the data.

    A prediction of x0 is a sum of multiples of x and of the network's output.
    """
    times = objective.timesteps(number)
    alpha, sigma = objective.alpha(times), objective.sigma(times)
    one, zero = torch.ones(()), torch.zeros(())
    rows = []
    for t, a, s in zip(times, alpha, sigma, strict=True):
        row = {"t": t, "alpha": a, "sigma": s}
        if t > 0:
            path, x0 = objective.path, objective.prediction.x0
            row |= {"c_in": path.c_in(t), "noise_level": path.c_noise(t)}
            row |= {"c_skip": x0(zero, one, a, s), "c_out": x0(one, zero, a, s)}
        rows.append({name: float(value) for name, value in row.items()})
    return rows


def conditions(diffusion: Diffusion) -> tuple[dict[str, Any], list[str]]:
    """The conditioner's slots, (rows, ...) each, and what the rows stand for: the classes, and none of them."""
    conditioner = diffusion.denoiser["conditioner"]
    assert isinstance(conditioner, Conditioner)
    filled, rows = conditioner.null(1), ["none"]
    plan = diffusion.manifest.plan
    if tuple(conditioner.keys) == ("class_label",) and plan.num_classes:
        names = plan.class_names or [str(label) for label in range(plan.num_classes)]
        filled = conditioner({"class_label": torch.arange(plan.num_classes)}).cat(filled)
        rows = [*names, "none"]
    return {name: one.detach().numpy() for name, one in _slots(filled).items()}, rows


def _denoiser(diffusion: Diffusion) -> Program:
    path, shape = diffusion.objective.path, diffusion.manifest.plan.shape
    conditioner = diffusion.denoiser["conditioner"]
    assert isinstance(conditioner, Conditioner)
    slots = {name: one.detach().clone() for name, one in _slots(conditioner.null(_ROWS)).items()}
    times = diffusion.objective.timesteps(min(STEPS, 10))[:_ROWS]
    levels = [row["noise_level"] for row in steps(diffusion.objective) if "noise_level" in row]
    random = torch.Generator().manual_seed(0)
    example = {"x": torch.randn(_ROWS, *shape, generator=random), "noise_level": path.c_noise(times)} | slots
    ranges = {
        "x": "c_in times a standardized latent with noise",
        "noise_level": f"{min(levels):g} to {max(levels):g}, from little noise to all of it",
        **dict.fromkeys(slots, "rows of conditions.npz"),
    }
    return Program("denoiser", _Denoising(diffusion.denoiser["network"]), example, ranges, "output")


def _decoder(model: Trained) -> Program:
    channels = model.codec.latent_channels
    sides = model.codec.size or (8 * model.codec.down_factor,) * 2
    shape = model.diffusion.manifest.plan.shape if model.diffusion else model.codec.latent_shape(sides)
    assert shape[0] == channels
    example = torch.randn(_ROWS, *shape, generator=torch.Generator().manual_seed(0))
    ranges = {"latents": "as the encoder makes them: a standardized latent times std plus mean"}
    return Program("decoder", _Decoding(model.codec), {"latents": example}, ranges, "images")


def _slots(filled: Conditioning) -> dict[str, Tensor]:
    found = {name: getattr(filled, name) for name in _SLOTS}
    return {name: one for name, one in found.items() if one is not None}


def _axes(example: Tensor, axes: Sequence[int]) -> list[int]:
    """Those of the axes that it has and that may change: of pictures height and width, of all else the batch."""
    return [axis for axis in axes if axis == 0 or example.ndim == 4]
