"""Decoder and denoiser as ONNX, which onnxruntime and others run."""

import contextlib
import io
import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.interop.exports import programs
from ldm.interop.exports.programs import Program
from ldm.interop.exports.trained import Trained
from ldm.interop.exports.usage import Choices, Usage, optional_packages

_INSIDE = 1_500_000_000
"""Bytes of weights that stay in the file itself, which can hold 2 GB; more go into a second one beside it."""
_TEXT = """```python
import onnxruntime

decoder = onnxruntime.InferenceSession("decoder.onnx")
images = decoder.run(None, {"latents": latents})[0]  # (N, C, height, width) in [-1, 1]
```

`programs.json` says what the inputs are, and what a sampler multiplies by in each step."""


def write(model: Trained, out: Path, choices: Choices) -> Usage:
    """`denoiser.onnx` and `decoder.onnx`, each compared with the model in onnxruntime."""
    with optional_packages("--to onnx", "onnx"):
        import onnxruntime
        import onnxscript  # noqa: F401  # torch's exporter needs it
    described = {}
    for program in programs.programs(model):
        file = out / f"{program.name}.onnx"
        _write(program, file)
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        described[program.name] = program.described(file.name, partial(_run, session))
    programs.write_facts(model, described, out)
    return Usage("onnx", _TEXT)


def _write(program: Program, file: Path) -> None:
    size = sum(one.numel() * one.element_size() for one in program.module.state_dict().values())
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of names of axes that are put together, such as 8 * height
        torch.onnx.export(
            program.traced,
            (),
            file,
            input_names=[*program.example],
            output_names=[program.output],
            dynamic_shapes={name: program.axes(name) for name in program.example},
            dynamo=True,
            external_data=size > _INSIDE,
            verbose=False,
        )


def _run(session: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    return torch.from_numpy(session.run(None, {name: one.numpy() for name, one in inputs.items()})[0])
