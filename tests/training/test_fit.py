"""What a library's error means to a user, and how a run says that it ended, whoever is left to say so."""

import errno
import os
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import DDPStrategy
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from ldm.checkpoints import store
from ldm.errors import CheckpointError, ConfigError, DataError, LdmError, PeerError, ResourceError
from ldm.run_folder import RunFolder, RunState
from ldm.runtime import signals
from ldm.training import fit
from ldm.training.callbacks.checkpoints import Checkpoints
from ldm.training.callbacks.stop import StopOnSignal
from tests.points import Automatic, PointData, a_trainer, ranks_at, wait_until

FROM_A_WORKER = """Caught DataError in DataLoader worker process 0.
Original Traceback (most recent call last):
  File "x.py", line 1, in <module>
ldm.errors.DataError: a.png: broken
"""


NO_MEMORY = "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to"


@pytest.mark.parametrize(
    ("error", "kind", "said"),
    [
        (MisconfigurationException("no such strategy"), ConfigError, "no such strategy"),
        (torch.OutOfMemoryError("CUDA out of memory"), ResourceError, "micro_batch_size"),
        (MemoryError(), ResourceError, "micro_batch_size"),
        (OSError(errno.ENOSPC, "No space left on device", "/logs/a"), ResourceError, "/logs/a"),
        (RuntimeError(NO_MEMORY), ResourceError, "micro_batch_size"),
        (RuntimeError("Early stopping conditioned on metric `x` which is"), ConfigError, "lightning.callbacks: Early"),
        (ModuleNotFoundError("X cannot log as `psutil` is not installed."), ConfigError, "pip install psutil"),
        (ModuleNotFoundError("No module named 'abacus'", name="abacus"), ConfigError, "pip install abacus"),
        (ImportError("requires PyTorch 9.4 or higher"), ConfigError, "lightning: ImportError: requires PyTorch 9.4"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), ResourceError, "num_workers"),
        (RuntimeError("Error(s) in loading state_dict for X: ..."), CheckpointError, "another model"),
        (DataError(FROM_A_WORKER), DataError, "a.png: broken"),
        (RuntimeError("[pair.cc:538] Connection closed by peer [127.0.0.1]:1"), PeerError, "rank 0 of 1 on"),
        (RuntimeError("Timed out waiting 20000ms for recv operation to complete"), PeerError, "timeout"),
    ],
)
def test_errors_that_a_user_can_mend(error, kind, said):
    known = fit.explain(error)
    assert type(known) is kind
    assert said in str(known)
    assert "Traceback" not in str(known)
    with pytest.raises(kind, match=said.replace("/", ".")), fit.explained():
        raise error


def in_a_worker(error: type[Exception], *notes: str) -> Exception:
    """What a loader makes of a worker's error: the same kind, with the traceback for a text."""

    class Fails(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 1

        def __getitem__(self, index: int) -> None:
            found = error()
            for note in notes:
                found.add_note(note)
            raise found

    with pytest.raises(error) as caught:
        next(iter(torch.utils.data.DataLoader(Fails(), num_workers=1)))
    return caught.value


@pytest.mark.parametrize("worker", [True, False])
@pytest.mark.parametrize("note", ["The picture was thin picture.png, 40000 x 1 pixels.", "The picture was huge.png."])
def test_a_picture_that_takes_all_memory_is_named(worker, note):
    error: Exception = MemoryError()
    error.add_note(note)
    known = str(fit.explain(in_a_worker(MemoryError, note) if worker else error))
    assert note in known.splitlines()
    assert "max_pixels" in known
    assert "MemoryError" in known
    assert "micro_batch_size" not in known
    assert "Traceback" not in known


def test_memory_that_a_worker_lacks():
    known = str(fit.explain(in_a_worker(MemoryError)))
    assert "num_workers" in known
    assert "Traceback" not in known


def test_a_bug_in_a_worker_stays_one():
    assert fit.explain(in_a_worker(RuntimeError)) is None


@pytest.mark.parametrize("error", [RuntimeError("shapes"), OSError(errno.ENOENT, "no such file"), KeyError("x")])
def test_bugs_stay_bugs(error):
    assert fit.explain(error) is None
    with pytest.raises(type(error)), fit.explained():
        raise error


def test_space_is_counted_for_three_files_of_weights_and_moments():
    model = torch.nn.Linear(10, 10, bias=False)
    assert fit.space_needed(model) == 3 * 4 * (100 + 200)
    model.requires_grad_(False)
    assert fit.space_needed(model) == 3 * 4 * 100


# ---------------------------------------------------------------------- ranks that are lost

TIMEOUT = 8.0


def a_run(
    folder: RunFolder, on_batch: Callable[[int], Callable[[Any], Any]], *callbacks: pl.Callback
) -> Callable[[int], None]:
    """Two ranks that train for ever, as main.py would; rank r calls on_batch(r) with the numbers of each batch."""
    folder.make()

    def train(rank: int) -> None:
        signals.listen()
        own_ones = [StopOnSignal(folder.checkpoints), *callbacks, Checkpoints(every=20)]
        strategy = DDPStrategy(timeout=timedelta(seconds=TIMEOUT))
        options: dict[str, Any] = {"devices": 2, "strategy": strategy, "enable_checkpointing": True}
        trainer = a_trainer(folder.path, 1_000_000, own_ones, **options)
        # Only the first rank knows the folder of a new run.
        own = folder if rank == 0 else RunFolder(folder.path.parent)
        try:
            with fit.explained():
                model = Automatic(on_batch=on_batch(rank))
                state = fit.run(trainer, model, PointData(4, seed=1), own, None, is_new=True)
        except LdmError as error:
            (folder.path / f"said.{rank}").write_text(str(error))
            os._exit(error.exit_code)  # as ranks.leave does
        os._exit(state.exit_code or 0)

    return train


def nothing(rank: int) -> Callable[[Any], Any]:
    return lambda numbers: None


def saved_once(folder: RunFolder) -> bool:
    return any(folder.checkpoints.glob("*.ckpt"))


def assert_last_checkpoint_stands(folder: RunFolder) -> RunState:
    state = folder.read_state()
    assert state is not None
    assert state.resume_from is not None
    assert store.load(folder.path / state.resume_from)["global_step"] % 20 == 0
    return state


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("lost", [0, 1])
def test_a_lost_rank_ends_the_others_who_say_so(tmp_path: Path, number: int, lost: int) -> None:
    folder = RunFolder(tmp_path / "run")
    with ranks_at(a_run(folder, nothing)) as ranks:
        assert wait_until(lambda: saved_once(folder), 100)
        ranks.send(number, lost)
        limit = 10 if number == signal.SIGKILL else TIMEOUT + 10
        assert wait_until(lambda: ranks.ended(1 - lost), limit)
    assert ranks.codes[1 - lost] == 7
    state = assert_last_checkpoint_stands(folder)
    assert (state.status, state.exit_code) == ("failed", 7)
    assert f"rank {1 - lost} of 2 on {os.uname().nodename}: another rank died" in state.reason
    said = (folder.path / f"said.{1 - lost}").read_text()
    assert f"did not answer within {TIMEOUT:g} s" in said
    assert "lightning.strategy.params.timeout" in said
    assert not (tmp_path / "run_state.json").exists()


@pytest.mark.parametrize("guilty", [0, 1])
def test_the_rank_that_fails_says_why(tmp_path: Path, guilty: int) -> None:
    folder = RunFolder(tmp_path / "run")

    def on_batch(rank: int) -> Callable[[Any], Any]:
        def fail(numbers: Any) -> None:
            if rank == guilty and numbers[0] > 200:
                raise torch.OutOfMemoryError("CUDA out of memory")

        return fail

    with ranks_at(a_run(folder, on_batch)) as ranks:
        assert wait_until(ranks.ended, 100)
    assert ranks.codes == {guilty: 6, 1 - guilty: 7}
    state = assert_last_checkpoint_stands(folder)
    assert (state.status, state.exit_code) == ("failed", 6)
    assert "out of memory" in state.reason


def test_a_new_run_does_not_look_for_checkpoints_beside_its_folder(tmp_path: Path) -> None:
    """Where the ranks that do not know the folder would."""
    store.save(tmp_path / "checkpoints" / "mine.ckpt", {"global_step": 1})
    folder = RunFolder(tmp_path / "run")
    with ranks_at(a_run(folder, nothing)) as ranks:
        assert wait_until(lambda: saved_once(folder), 40)
        ranks.send(signal.SIGTERM)
        assert wait_until(ranks.ended, 40)
    assert ranks.codes == {0: 143, 1: 143}


@pytest.mark.parametrize("begun", [True, False])
def test_a_rank_that_is_asked_to_stop_and_loses_the_others(tmp_path: Path, begun: bool) -> None:
    """Before the first step they were asked too, and went first; later torchrun asks because a rank was lost."""
    folder = RunFolder(tmp_path / "run")

    def train(rank: int) -> None:
        class Slow(pl.Callback):
            def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
                (tmp_path / f"started.{rank}").touch()
                time.sleep(0.0 if begun else 3.0)

        a_run(folder, nothing, Slow())(rank)

    with ranks_at(train) as ranks:
        begins = [tmp_path / f"started.{rank}" for rank in range(2)]
        assert wait_until(lambda: saved_once(folder) if begun else all(path.exists() for path in begins), 100)
        ranks.send(signal.SIGSTOP, 1)
        ranks.send(signal.SIGTERM, 0)
        assert wait_until(lambda: ranks.ended(0), TIMEOUT + 10)
    assert ranks.codes[0] == (7 if begun else 128 + signal.SIGTERM)
    state = folder.read_state()
    assert state is not None
    assert (state.status, state.exit_code) == (("failed", 7) if begun else ("stopped", 143))
