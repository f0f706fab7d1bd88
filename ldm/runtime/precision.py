"""The precision a run computes in: `lightning.trainer.precision: auto`, the default, resolved once at its start.

`auto` becomes bf16-mixed where the device computes bf16 natively, else 32-true: a processor without bf16 instructions
emulates it, 10 to 150 times slower. The run's configuration stores the result, so that a resumed run keeps it. Programs
that sample have the same words, and 32-true as the default, so that a seed keeps its picture.
"""

import os
import platform
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

import torch

from ldm.errors import ConfigError

AUTO = "auto"
_FLOAT16 = ("16-mixed", "16")
_NATIVE, _PLAIN = "bf16-mixed", "32-true"

TYPES = {_PLAIN: torch.float32, _NATIVE: torch.bfloat16}
"""What networks compute in that are used and not trained."""

_X86 = ("x86_64", "amd64", "x86", "i386", "i686")

LIMITS = ("DNNL_MAX_CPU_ISA", "ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY")
"""Environment variables by which oneDNN or torch itself uses fewer instructions than the processor has."""


class Answer(NamedTuple):
    """Whether a device computes bf16 natively, and the evidence."""

    native: bool
    reason: str


def settle(trainer: dict[str, Any], is_new: bool) -> list[str]:
    """Replace `auto` in the section `lightning.trainer`, and return notes for the user, one line each.

    Args:
        trainer: changed in place; a new run without a setting has `auto`.
        is_new: False for a resumed run: without a setting it ran in 32-true, the default of earlier versions.

    Raises:
        ConfigError: float16 is requested on a CPU.
    """
    asked = trainer.get("precision") or (AUTO if is_new else _PLAIN)
    kind = _device(trainer.get("accelerator", "auto"))
    trainer["precision"] = asked
    if asked == AUTO:
        answer = computes_bf16(kind)
        trainer["precision"] = _NATIVE if answer.native else _PLAIN
        return [f"precision: {trainer['precision']}, since {answer.reason} (lightning.trainer.precision: auto)"]
    allow = "" if is_new else " --allow-change lightning.trainer.precision"
    if kind == "cpu" and str(asked) in _FLOAT16:
        remedy = f"lightning.trainer.precision={AUTO if is_new else _NATIVE}{allow}"
        raise ConfigError(
            f"lightning.trainer.precision: {asked} is for GPUs, found a CPU, on which Lightning computes in {_NATIVE} "
            f"in its place. Write {remedy}"
        )
    if kind in ("cpu", "cuda") and str(asked).startswith("bf16") and not computes_bf16(kind).native:
        return [
            f"{_emulated('lightning.trainer.precision', asked, kind)}. Use lightning.trainer.precision={_PLAIN}{allow}"
        ]
    return []


def settled(asked: str, kind: str) -> tuple[str, list[str]]:
    """What `--precision` of a program that samples becomes, and notes for the user, one line each.

    Args:
        asked: "auto", "32-true" or "bf16-mixed".
        kind: of device, as in `computes_bf16`.

    Returns:
        One of the latter two, keys of `TYPES`.
    """
    if asked == _PLAIN:
        return asked, []
    answer = computes_bf16(kind)
    if asked == AUTO:
        found = _NATIVE if answer.native else _PLAIN
        return found, [f"precision: {found}, since {answer.reason} (--precision auto)"]
    if answer.native or kind not in ("cpu", "cuda"):
        return asked, []
    return asked, [f"{_emulated('--precision', asked, kind)}. Use --precision {_PLAIN}"]


def _emulated(setting: str, asked: Any, kind: str) -> str:
    warning = f"warning: {setting} is {asked}, which "
    if kind == "cuda":
        return f"{warning}{torch.cuda.get_device_name()} emulates, slower than float32"
    return f"{warning}this processor emulates: a matrix product takes {bf16_slowdown():.0f} times as long as in float32"


def computes_bf16(kind: str) -> Answer:
    """Whether a device of this kind ("cpu", "cuda", "mps") computes bf16 natively."""
    if kind == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return Answer(
            native, f"{torch.cuda.get_device_name()} computes bf16 {'natively' if native else 'by emulation'}"
        )
    if kind != "cpu":
        return Answer(False, f"bf16 has not been tried on a device of type {kind}")
    native = _cpu_says()
    if native is not None:
        return Answer(
            native,
            f"this processor {'computes bf16 natively' if native else 'has no bf16 instructions that torch uses'}",
        )
    factor = bf16_slowdown()
    return Answer(factor < 1, f"a matrix product in bf16 takes {factor:.2g} times as long as in float32")


def bf16_slowdown(size: int = 256, repeats: int = 5) -> float:
    """Time of a matrix product in bf16 relative to float32, on the CPU; takes a few milliseconds if bf16 is native.

    Measured on one thread with that thread's CPU clock, so that other work on the machine does not count.
    """
    wide = torch.ones(size, size)
    narrow = wide.bfloat16()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        seconds = [(_seconds(lambda: narrow @ narrow), _seconds(lambda: wide @ wide)) for _ in range(repeats + 1)][1:]
    finally:
        torch.set_num_threads(threads)
    return min(narrow for narrow, _ in seconds) / min(wide for _, wide in seconds)


def _seconds(work: Callable[[], Any]) -> float:
    begin = time.thread_time()
    work()
    return time.thread_time() - begin


def _cpu_says() -> bool | None:
    """What torch and oneDNN report about an x86 processor's bf16 instructions; None if that is uncertain."""
    if platform.machine().lower() not in _X86:
        return None  # the capability may be "DEFAULT" on other processors, too, and the checks below then return False
    # All but the first are private: another version of torch may lack them.
    with suppress(AttributeError, RuntimeError):
        if torch.backends.cpu.get_cpu_capability() not in ("DEFAULT", "AVX2", "AVX512"):
            return None
        has_instructions = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        if not (has_instructions and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
            return False
        return None if any(name in os.environ for name in LIMITS) else True
    return None


def _device(accelerator: Any) -> str:
    """The kind of device for the trainer's `accelerator`; `auto` never means Apple's GPU (training/trainer.py)."""
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return "cuda"
    if accelerator in ("gpu", "mps") and torch.backends.mps.is_available():
        return "mps"
    return "cpu"
