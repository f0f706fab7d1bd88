"""Errors that say that memory is exhausted are told from others, and become one message."""

import pytest
import torch

from ldm.errors import ResourceError
from ldm.runtime.memory import advised, exhausted, explained


def too_large() -> Exception:
    """What torch raises on a CPU."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    return caught.value


def test_which_errors_are_of_memory():
    assert exhausted(MemoryError())
    assert exhausted(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."))
    assert exhausted(too_large())
    assert not exhausted(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not exhausted(ValueError("memory"))


def test_what_failed_and_what_is_noted_is_said_before_the_advice():
    error = MemoryError("no room\nat all")
    error.add_note("The picture was a.png.")
    assert str(explained(error, "Take less.")) == "out of memory: no room\nThe picture was a.png.\nTake less."
    assert str(explained(MemoryError(), "Take less.")) == "out of memory: MemoryError\nTake less."


def test_advice_is_given_where_no_picture_is_named_and_other_errors_pass():
    with pytest.raises(ResourceError, match=r"(?s)out of memory: .*Take less"), advised("Take less."):
        raise too_large()
    noted = MemoryError()
    noted.add_note("The picture was a.png.")
    with pytest.raises(MemoryError), advised("Take less."):
        raise noted
    with pytest.raises(ValueError, match="other"), advised("Take less."):
        raise ValueError("other")
