"""The run folder: what one training run writes to disk, who may write to it, and its state.

    logs/<time>_<name><postfix>/
        checkpoints/           step=00001000.ckpt ... (ldm/checkpoints/store.py)
        configs/config.yaml    what ran, every reference filled in; a resumed run reads this
        configs/source.yaml    the same before references were filled in: what the user wrote
        configs/facts.json     the data's own description (number of images, classes, ...)
        images/{train,val}/    picture grids
        metrics.csv            every logged number
        origin.json            only of a converted model: where its weights come from
        init_from.json         only of a run that started from weights: which, and what became of them
        run_state.json         status, step, reason, resume_from: for scripts that start runs
        lock                   who is writing here

Runs are ordered by the time in their name, never by the file system's clock.
"""

import fcntl
import json
import os
import re
import shutil
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from ldm import files
from ldm.errors import CheckpointError, ConfigError, LockError
from ldm.files import expanded

TIME_FORMAT = "%Y-%m-%dT%H-%M-%S"
# A folder's name has at most 255 bytes, the time and its underscore take 20.
_LONGEST_NAME = 235
_FOLDER_NAME = re.compile(r"^(?P<time>\d{4}-?\d{2}-?\d{2}[^_]*)_(?P<name>.+)$")
_OUR_TIME = re.compile(r"\d{4}-?\d{2}-?\d{2}T\d{2}-?\d{2}-?\d{2}")


@dataclass(frozen=True)
class RunState:
    """The state of a run, as stored in `run_state.json`.

    Attributes:
        status: "running", "finished" (reached max_steps), "stopped" (by a signal, after a save) or "failed".
        step: optimizer steps done.
        reason: one line for the user.
        exit_code: the process's exit code; None while it runs.
        resume_from: the checkpoint to resume from, relative to the folder; None before the first one.
    """

    status: Literal["running", "finished", "stopped", "failed"]
    step: int = 0
    reason: str = ""
    exit_code: int | None = None
    resume_from: str | None = None


@dataclass(frozen=True)
class RunFolder:
    """The paths of one run; only `create` creates anything."""

    path: Path

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def config_file(self) -> Path:
        return self.path / "configs" / "config.yaml"

    @property
    def source_file(self) -> Path:
        return self.path / "configs" / "source.yaml"

    @property
    def facts_file(self) -> Path:
        return self.path / "configs" / "facts.json"

    @property
    def origin_file(self) -> Path:
        return self.path / "origin.json"

    @property
    def init_from_file(self) -> Path:
        return self.path / "init_from.json"

    @property
    def images(self) -> Path:
        return self.path / "images"

    @property
    def metrics_file(self) -> Path:
        return self.path / "metrics.csv"

    @property
    def state_file(self) -> Path:
        return self.path / "run_state.json"

    @property
    def name(self) -> str:
        """The folder's name without its time."""
        match = _FOLDER_NAME.match(self.path.name)
        return match["name"] if match else self.path.name

    @property
    def time(self) -> str:
        """The digits of the time in the folder's name; empty if it has none."""
        match = _FOLDER_NAME.match(self.path.name)
        return re.sub(r"\D", "", match["time"]) if match else ""

    def exists(self) -> bool:
        """True when this is a folder some run has written its configuration to."""
        return self.config_file.is_file()

    def has_results(self) -> bool:
        """Whether the folder holds anything besides the run's identity and state."""
        written = {self.config_file, self.source_file, self.facts_file, self.init_from_file, self.state_file}
        known = {*written, self.path / "lock"}
        return any(not path.is_dir() and path not in known for path in self.path.rglob("*"))

    def make(self) -> None:
        """Create the missing parts of the folder."""
        for folder in (self.checkpoints, self.config_file.parent, self.images / "train", self.images / "val"):
            folder.mkdir(parents=True, exist_ok=True)

    def read_state(self) -> RunState | None:
        """The last state written, or None if none can be read."""
        with suppress(OSError, ValueError, TypeError):
            record = json.loads(self.state_file.read_text())
            return RunState(**{name: record[name] for name in RunState.__dataclass_fields__ if name in record})
        return None

    def write_state(self, state: RunState) -> None:
        """Replace `run_state.json`: a reader sees the old one or the new one, whole."""
        record = asdict(state) | _whoami()
        files.write_text(self.state_file, json.dumps(record, indent=2) + "\n")

    @contextmanager
    def owned(self) -> Iterator[None]:
        """Within the block only this process may write to the folder; partial files of a killed process are removed.

        The lock is a record lock: the kernel drops it when this process dies, however it dies, and forked loader
        workers that outlive it do not hold it. (Closing any other handle on the file would drop it too, so nothing
        else in this process may open it.)

        Raises:
            LockError: another living process holds it; the message names it.
        """
        with (self.path / "lock").open("a+") as handle:
            try:
                fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                handle.seek(0)
                raise LockError(_taken(self.path, handle.read())) from None
            handle.truncate(0)
            handle.write(json.dumps(_whoami()) + "\n")
            handle.flush()
            self._sweep()
            yield

    def _sweep(self) -> None:
        """Remove leftovers of killed writers of small files; checkpoints have their own sweep."""
        for folder in (self.path, self.config_file.parent):
            for leftover in folder.glob("*.tmp.*"):
                leftover.unlink(missing_ok=True)


def create(logdir: Path, name: str, postfix: str = "") -> RunFolder:
    """A new run folder `logdir/<now>_<name><postfix>`; waits a second when that one is taken.

    Raises:
        ConfigError: no folder can have that name.
    """
    check_name(f"{name}{postfix}")
    while True:
        folder = RunFolder(logdir / f"{time.strftime(TIME_FORMAT)}_{name}{postfix}")
        try:
            folder.path.mkdir(parents=True)
        except FileExistsError:
            time.sleep(0.2)
            continue
        folder.make()
        return folder


@contextmanager
def removed_if_unused(folder: RunFolder, used: Callable[[], bool]) -> Iterator[None]:
    """However the block ends, a new run without results leaves no folder behind.

    Args:
        folder: made by this process, so that all in it is of this start: also what loggers and profilers write.
        used: called at the end: whether the run has results.
    """
    try:
        yield
    finally:
        if not used():
            shutil.rmtree(folder.path, ignore_errors=True)


def newest(logdir: Path, name: str, postfix: str = "") -> RunFolder | None:
    """The latest run called exactly `<name><postfix>` under `logdir`, by the time in its name.

    A folder that was renamed, such as a backup `<time>-old_<name>`, is not one.
    """
    named = f"_{name}{postfix}"
    return _latest(run for run in _runs(logdir) if _OUR_TIME.fullmatch(run.path.name.removesuffix(named)))


def newest_run(pattern: str) -> str:
    """The latest of the run folders that match a glob such as `logs/*_emoji`, by the time in its name.

    A start that was killed before it had written its configuration has left no run.

    Raises:
        ConfigError: there is none.
    """
    path = Path(expanded(pattern))
    base = Path(path.anchor) if path.is_absolute() else Path()
    found = [RunFolder(folder) for folder in (base.glob(str(path.relative_to(base))) if pattern.strip() else ())]
    # A folder without configurations was made by hand, of a checkpoint.
    run = _latest(folder for folder in found if folder.exists() or not folder.config_file.parent.is_dir())
    if run is None:
        name = path.name.lstrip("*_") or "that name"
        raise ConfigError(
            f"no run folder <time>_<name> matches '{pattern}' (looked in {base.absolute()}); train '{name}' first: "
            f"python main.py --base <the configuration named {name}>, or write the path of a run here"
        )
    return str(run.path)


def named(run: str) -> Path:
    """The run folder or checkpoint that a command line names; of a glob the newest run, by `newest_run`."""
    return Path(newest_run(run)) if "*" in run else Path(expanded(run))


def resolve(text: str, logdir: Path) -> tuple[RunFolder | None, Path | None]:
    """What `-r TEXT` means: (run folder or None, checkpoint file or None).

    A folder gives (folder, None): its newest checkpoint is for the caller to choose. A checkpoint inside a run
    gives (folder, file); one that lies elsewhere (None, file): it starts a new run.

    Raises:
        CheckpointError: there is no such thing; the message lists the runs there are.
    """
    path = Path(text)
    if path.is_file():
        folder = RunFolder(path.absolute().parent.parent)
        return (folder, path) if folder.exists() else (None, path)
    folder = RunFolder(path.parent if path.name == "checkpoints" else path)
    if folder.exists():
        return folder, None
    problem = "has no configs/config.yaml" if path.is_dir() else "does not exist"
    known = [str(run.path) for run in sorted(_runs(logdir), key=lambda run: run.path.name)[-5:]]
    raise CheckpointError(
        f"--resume {text}: expected a run folder, a checkpoint or `auto`, but it {problem}.\n"
        + (f"The latest runs are: {', '.join(known)}." if known else f"There are no runs in {logdir}.")
    )


def check_name(name: str) -> None:
    """Raises ConfigError when a run, with its postfix, cannot be called `name`: its folder would not be found again.

    Names come from flags, configurations, file names and other people's checkpoints: one with a slash would lead out
    of the log folder.
    """
    advice = "Choose another one with --name, or with `name:` in the configuration."
    if not re.fullmatch(r"[\w,=+-]([\w.,=+-]*[\w,=+-])?", name):
        allowed = "letters, digits, any of , = + - _ and, but for both ends, dots"
        raise ConfigError(f"{name!r} cannot be the name of a run: expected {allowed}. {advice}")
    if (length := len(os.fsencode(name))) > _LONGEST_NAME:
        shown = f"{name[:40]}..."
        raise ConfigError(f"{shown!r} cannot be the name of a run: {length} bytes, at most {_LONGEST_NAME}. {advice}")


def _runs(logdir: Path) -> list[RunFolder]:
    folders = [RunFolder(path) for path in logdir.iterdir()] if logdir.is_dir() else []
    return [folder for folder in folders if folder.time and folder.exists()]


def _latest(folders: Iterable[RunFolder]) -> RunFolder | None:
    """By the time in the name, never by the file system's clock: copying or touching a folder changes nothing."""
    found = [folder for folder in folders if folder.time and folder.path.is_dir()]
    return max(found, key=lambda folder: (folder.time, folder.path.name), default=None)


def _whoami() -> dict[str, str | int]:
    return {"host": socket.gethostname(), "pid": os.getpid(), "time": time.strftime(TIME_FORMAT)}


def _taken(folder: Path, record: str) -> str:
    owner = "another process"
    with suppress(ValueError, KeyError, TypeError):
        who = json.loads(record)
        owner = f"process {who['pid']} on {who['host']}, since {who['time']},"
    return f"{folder}: {owner} is writing to this run.\nStop it first, or start a new run (leave out --resume)."
