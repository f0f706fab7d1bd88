"""The device that a program computes on."""

import os

import torch

from ldm.errors import ConfigError


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
