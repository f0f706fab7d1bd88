"""Saving in a thread, one state at a time; which checkpoints are kept; what killed saves have left behind."""

import logging
import re
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path
from typing import Any

from ldm.checkpoints import sealed_file, shards, store
from ldm.checkpoints.snapshot import HostMemory
from ldm.errors import PeerError, ResourceError
from ldm.runtime import distributed

TRIES = 3
"""How many saves in a row may fail for lack of space before the run ends."""

_BEST = f"best{store.SUFFIX}"
# `step=0` is a converted model (ldm/interop/runs.py), which no run has saved.
_OURS = re.compile(rf"(step=(?!0\.)\d+|stopped|finite){re.escape(store.SUFFIX)}")

log = logging.getLogger(__name__)


class Writer:
    """Saves one state at a time, in a thread.

    If asynchronous, a save copies the state to the host and returns; the next one waits for it. The first save of a run
    is read back as soon as it is written, so that a checkpoint that cannot be loaded is noticed at once, not at resume.

    With several ranks a failed save raises nothing here, since the others would wait forever: see `failure`.

    Attributes:
        asynchronous: a save returns before it is on disk, and needs a second copy of the state.
        tries: how many saves in a row may fail for lack of space or of another rank's shard before that is a failure.
        published: called in the thread after each save.
        failure: why saving has failed for good; None otherwise.
    """

    def __init__(self) -> None:
        self.asynchronous = False
        self.tries = TRIES
        self.published: Callable[[], None] = lambda: None
        self.failure: Exception | None = None
        self._failed = 0  # saves in a row
        self._proven = False
        self._memory = HostMemory()
        self._under_way: Future[None] | None = None
        self._needs_peers = False

    def save(self, state: dict[str, Any], path: Path) -> None:
        """Save `state`, as `store.save` takes it, at `path`."""
        self.wait()
        self._needs_peers = "shard" in state
        copy = self._memory.copy(state) if self.asynchronous else state
        # A thread for each save, which ends with it: what it computes leaves OpenMP threads behind for as long as it
        # lives, and with more of them than cores none waits actively any more; training then takes twice as long.
        thread = ThreadPoolExecutor(1, "checkpoint")
        self._under_way = thread.submit(self._write, copy, path)
        thread.shutdown(wait=False)
        if not self.asynchronous:
            self.wait()
            if self.failure is not None and distributed.world_size() == 1:
                raise self.failure

    def wait(self) -> BaseException | None:
        """Until nothing is being written; returns the error of the last save, if it failed."""
        return None if self._under_way is None else self._under_way.exception()

    def abandon(self, seconds: float = 5.0) -> None:
        """The other ranks are lost: wait at most `seconds` for a save that needs their shards; it is not published."""
        if self._needs_peers and self._under_way is not None:
            wait([self._under_way], seconds)
            self._under_way = None

    def close(self) -> None:
        """Wait for the last save, and free the memory."""
        self.wait()
        self._memory.release()

    def _write(self, state: dict[str, Any], path: Path) -> None:
        """The thread's work."""
        try:
            store.save(path, state)
            if distributed.is_main():
                if not self._proven:
                    store.verify(path)
                    self._proven = True
                self.published()
        except Exception as error:
            self._failed += 1
            if self._failed >= self.tries or not isinstance(error, ResourceError | PeerError):
                self.failure = error
            else:
                log.warning(
                    "NOT SAVED (%d of %d in a row): %s\nTraining goes on, and tries again at the next interval.",
                    *(self._failed, self.tries, error),
                )
            raise
        self._failed = 0


def file_of(folder: Path, step: int) -> Path:
    """The checkpoint of `step` in a folder of checkpoints."""
    return folder / f"step={step:08d}{store.SUFFIX}"


def tidy(folder: Path, keep: int, keep_every: int | None, scores: Mapping[int, float], keep_best: int) -> None:
    """Link the best checkpoint, and remove those that are not kept; only files that a run names so are touched.

    Args:
        keep: how many of the latest are kept, by the step inside of them.
        keep_every: steps that are multiples of it are kept; None: there are none.
        scores: {step: score}, lower is better.
        keep_best: how many of the best are kept.
    """
    files = {file: sealed_file.step(file) for file in folder.glob(f"*{store.SUFFIX}") if _is_ours(file)}
    scored = [file for file, step in files.items() if file == file_of(folder, step) and step in scores]
    best = sorted(scored, key=lambda file: (scores[files[file]], files[file]))[:keep_best]
    if best:
        _link(folder / _BEST, best[0].name)
    kept = {*sorted(files, key=lambda file: (files[file], file.name))[-keep:], *best}
    for file, step in files.items():
        if file not in kept and not (keep_every and file == file_of(folder, step) and step % keep_every == 0):
            store.remove(file)


def set_aside_later(folder: Path, step: int, names: str = "*") -> list[Path]:
    """Rename the checkpoints of steps after `step` to `.superseded`, since the run is about to diverge from them.

    Args:
        names: which checkpoints, as a glob without the suffix.
    """
    aside = []
    for file in sorted(folder.glob(f"{names}{store.SUFFIX}")):
        if sealed_file.step(file) <= step:
            continue
        if file.is_symlink():
            file.unlink()
            continue
        aside.append(file.rename(file.with_name(f"{file.name}.superseded")))
    return aside


def sweep(folder: Path) -> list[Path]:
    """Remove leftovers of killed saves: temporary files, shards that no checkpoint names; returns them.

    A running save of a single file holds a lock on it. Shards have none: call this only if no other process saves.
    """
    folder = Path(folder)
    swept = [file for file in sorted(folder.glob(f"*{store.SUFFIX}.tmp.*")) if sealed_file.abandoned(file)]
    for left in sorted(folder.glob(f"*{store.SUFFIX}.*{shards.SUFFIX}")):
        owner = f"{left.name.partition(store.SUFFIX)[0]}{store.SUFFIX}"
        # A checkpoint that was set aside keeps its shards, too; so does an unreadable one, in case it is repaired.
        files = [file for file in folder.glob(f"{owner}*") if file.is_file()]
        if not any(store.shards_of(file) == left or sealed_file.fault(file) for file in files):
            shutil.rmtree(left, ignore_errors=True)
            swept.append(left)
    return swept


def _is_ours(file: Path) -> bool:
    return _OURS.fullmatch(file.name) is not None and not file.is_symlink()


def _link(link: Path, target: str) -> None:
    """Make `link` a symbolic link to its neighbor `target`; at any moment it points at the old one or the new one."""
    temporary = link.with_name(f".{link.name}.new")
    with suppress(FileNotFoundError):
        temporary.unlink()
    temporary.symlink_to(target)
    temporary.replace(link)
