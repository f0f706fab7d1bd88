"""Decoder and denoiser as programs of torch.export, which torch alone loads."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm.interop.exports import programs
from ldm.interop.exports.trained import Trained
from ldm.interop.exports.usage import Choices, Usage

_TEXT = """```python
import torch

decode = torch.export.load("decoder.pt2").module()
images = decode(latents=latents)  # (N, C, height, width) in [-1, 1]
```

`programs.json` says what the inputs are, and what a sampler multiplies by in each step."""


def write(model: Trained, out: Path, choices: Choices) -> Usage:
    """`denoiser.pt2` and `decoder.pt2`, each compared with the model after it was loaded again."""
    described = {}
    for program in programs.programs(model):
        file = out / f"{program.name}.pt2"
        try:
            torch.export.save(program.traced, file)
        except RuntimeError as error:  # of torch's own writer, with a trace, such as of a full disk
            raise OSError(str(error).splitlines()[0]) from error
        loaded = torch.export.load(file).module()
        described[program.name] = program.described(file.name, partial(_run, loaded))
    programs.write_facts(model, described, out)
    return Usage("pytorch", _TEXT)


def _run(module: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    found: Tensor = module(**inputs)
    return found
