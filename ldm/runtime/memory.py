"""Errors that say that memory is exhausted, of CPUs and GPUs alike."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ldm.errors import ResourceError


def exhausted(error: BaseException) -> bool:
    """Whether an error says that the device or the machine has too little memory."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


def explained(error: BaseException, advice: str) -> ResourceError:
    """Such an error as one that the user can fix: what failed, what is noted about it, and the advice."""
    text = str(error).strip()
    what = text.splitlines()[0] if text else type(error).__name__
    return ResourceError("\n".join([f"out of memory: {what}", *getattr(error, "__notes__", []), advice]))


@contextmanager
def advised(advice: str) -> Iterator[None]:
    """Within the block such an error is a ResourceError with that advice; one with a note, of a picture, is left."""
    try:
        yield
    except Exception as error:
        if not exhausted(error) or getattr(error, "__notes__", []):
            raise
        raise explained(error, advice) from error
