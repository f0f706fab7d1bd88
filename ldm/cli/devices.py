"""The device that a program computes on, and in which precision."""

import os
import sys
from typing import Any, NamedTuple

import torch

from ldm.errors import ConfigError
from ldm.runtime import distributed, precision


class Precision(NamedTuple):
    """What --precision means on a device: "32-true" or "bf16-mixed"."""

    name: str

    @classmethod
    def of(cls, options: Any, device: str) -> "Precision":
        """As the command line says; prints what the user should know of it."""
        name, notes = precision.settled(options.precision, torch.device(device).type)
        if distributed.is_main():
            for note in notes:
                print(note, file=sys.stderr)
        return cls(name)

    @property
    def compute(self) -> torch.dtype:
        """The type that networks compute in."""
        return precision.TYPES[self.name]

    @property
    def settings(self) -> dict[str, str]:
        """What records say of it: nothing of float32, as records from before there was a choice."""
        return {} if self.compute == torch.float32 else {"precision": self.name}


def usable(name: str | None) -> str:
    """The device of that name; None: this process's GPU where there is one, else the CPU.

    Raises:
        ConfigError: there is no such device here.
    """
    if name is None:
        return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError) as error:  # the latter of a torch that was built without it
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"--device {name}: cannot be computed on here ({reason.rstrip('.')}). Leave it out, or name cpu, cuda or "
            f"cuda:NUMBER; there are {torch.cuda.device_count()} GPUs."
        ) from error
    return name
