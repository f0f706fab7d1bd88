"""What a library's error means to a user."""

import errno

import pytest
import torch
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from ldm import outcome
from ldm.errors import CheckpointError, ConfigError, DataError, ResourceError

FROM_A_WORKER = """Caught DataError in DataLoader worker process 0.
Original Traceback (most recent call last):
  File "x.py", line 1, in <module>
ldm.errors.DataError: a.png: broken
"""


@pytest.mark.parametrize(
    ("error", "kind", "said"),
    [
        (MisconfigurationException("no such strategy"), ConfigError, "no such strategy"),
        (torch.OutOfMemoryError("CUDA out of memory"), ResourceError, "micro_batch_size"),
        (MemoryError(), ResourceError, "micro_batch_size"),
        (OSError(errno.ENOSPC, "No space left on device", "/logs/a"), ResourceError, "/logs/a"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), ResourceError, "num_workers"),
        (RuntimeError("Error(s) in loading state_dict for X: ..."), CheckpointError, "another model"),
        (DataError(FROM_A_WORKER), DataError, "a.png: broken"),
    ],
)
def test_errors_that_a_user_can_mend(error, kind, said):
    known = outcome.explain(error)
    assert type(known) is kind
    assert said in str(known)
    assert "Traceback" not in str(known)
    with pytest.raises(kind, match=said.replace("/", ".")), outcome.explained():
        raise error


@pytest.mark.parametrize("error", [RuntimeError("shapes"), OSError(errno.ENOENT, "no such file"), KeyError("x")])
def test_bugs_stay_bugs(error):
    assert outcome.explain(error) is None
    with pytest.raises(type(error)), outcome.explained():
        raise error


def test_space_is_counted_for_three_files_of_weights_and_moments():
    model = torch.nn.Linear(10, 10, bias=False)
    assert outcome.space_needed(model) == 3 * 4 * (100 + 200)
    model.requires_grad_(False)
    assert outcome.space_needed(model) == 3 * 4 * 100
