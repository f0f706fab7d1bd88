"""Where metrics are logged: a CSV that survives kill -9 and resume, and wandb isolated so that training never waits."""

import atexit
import csv
import io
import logging
import os
import queue
import threading
import urllib.request
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

from pytorch_lightning.loggers import Logger, WandbLogger
from pytorch_lightning.loggers.logger import DummyExperiment
from pytorch_lightning.utilities import rank_zero_only

from ldm.errors import ResourceError
from ldm.files import write_text
from ldm.ranges import Positive
from ldm.training import lightning_internals

log = logging.getLogger(__name__)


class MetricsFile(Logger):
    """`metrics.csv`: a row for each step that logged something, a column for each metric, in order of appearance.

    A row is written as soon as it is known. On resume the file is continued: rows from the first step logged now on
    were written by a process that went further than its last checkpoint, and are dropped.

    Args:
        path: the file.
    """

    def __init__(self, path: Path | str) -> None:
        super().__init__()
        self._path = Path(path)
        self._columns = ["step"]
        self._row: dict[str, str] = {}
        self._start = 0  # of the last row, in bytes
        self._failures = 0

    @property
    def name(self) -> str:
        return "metrics"

    @property
    def version(self) -> str:
        return ""

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Nothing: the run folder has the configuration."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Add `metrics` to the row of `step`; a disk that is full or gone is reported once, and never ends a run."""
        number = str(step) if step is not None else self._row.get("step", "0")
        # The epoch is left out: an endless sampler has only one.
        values = {name: f"{float(value):.9g}" for name, value in metrics.items() if name != "epoch"}
        if not values:
            return
        try:
            self._write(number, values)
        except OSError as error:
            self._failures += 1
            if self._failures == 1:
                log.warning("%s: cannot be written (%s); training goes on without it", self._path, error)

    def _write(self, step: str, values: dict[str, str]) -> None:
        if not self._row:
            self._rewrite([row for row in read_metrics(self._path) if int(row["step"]) < int(step)])
        if self._row.get("step") != step:
            self._start = self._path.stat().st_size
            self._row = {"step": step}
        self._row |= values
        if new := [name for name in values if name not in self._columns]:
            rows = [row for row in read_metrics(self._path) if row["step"] != step]
            self._columns += new
            self._rewrite(rows)
            self._start = self._path.stat().st_size
        with self._path.open("r+b") as file:
            file.seek(self._start)
            file.write(self._lines([self._row]).encode())
            file.truncate()

    def _rewrite(self, rows: list[dict[str, str]]) -> None:
        """The whole file, atomically, with a column for all that `rows` hold."""
        self._columns += [
            name for name in dict.fromkeys(key for row in rows for key in row) if name not in self._columns
        ]
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_text(self._path, ",".join(self._columns) + "\n" + self._lines(rows))

    def _lines(self, rows: list[dict[str, str]]) -> str:
        text = io.StringIO()
        csv.DictWriter(text, self._columns, lineterminator="\n").writerows(rows)
        return text.getvalue()


def read_metrics(path: Path) -> list[dict[str, str]]:
    """The rows of a metrics file, each with the values it has, as text; a last row cut short is left out."""
    if not path.exists():
        return []
    whole_lines = path.read_text().rpartition("\n")[0]
    return [
        {name: value for name, value in row.items() if value}
        for row in csv.DictReader(io.StringIO(whole_lines))
        if (row.get("step") or "").isdigit()
    ]


class FencedWandb(WandbLogger):
    """wandb in a separate thread: whatever happens to it, training neither fails nor waits.

    The run starts online if there is an account and the server answers, else in wandb's offline mode. Calls are
    queued; one that fails is counted, and the first is reported.

    Args:
        save_dir: where wandb keeps its files; the run folder.
        project: the wandb project.
        name: of the run.
        id: of the run; the same one continues it after a resume.
        offline: do not try to go online.
        time_limit: seconds to wait for wandb, at start and at the end each.
    """

    def __init__(
        self,
        save_dir: Path | str,
        project: str = "ldm",
        name: str | None = None,
        id: str | None = None,
        offline: bool = False,
        time_limit: Positive = 30.0,
    ) -> None:
        super().__init__(name=name, save_dir=save_dir, project=project, id=id, offline=offline)
        self._limit = self._limit_at_end = time_limit
        self._errands: queue.Queue[Callable[[], None]] = queue.Queue(maxsize=1000)
        self._thread: threading.Thread | None = None
        self._exit_code = 0
        self._step: int | None = None
        self._row: dict[str, float] = {}
        self.lost = 0
        """How many calls had no effect."""

    @property
    def experiment(self) -> Any:
        """wandb's run, once it has started; calls on it are not fenced."""
        self._begin()
        return self._experiment or DummyExperiment()

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        # Where optimisation is manual Lightning hands a step's numbers over at each of its micro-batches, the first
        # times with those of a step before: only the last word on a step is sent, when the next one comes.
        if step != self._step:
            self._send_row()
        self._step = step
        self._row |= metrics

    def _send_row(self) -> None:
        if not self._row:
            return
        row = self._row | ({} if self._step is None else {"trainer/global_step": self._step})
        self._row = {}
        self._submit(lambda: self._run().log(row))

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        values = vars(params) if isinstance(params, Namespace) else dict(params)
        self._submit(lambda: self._run().config.update(values, allow_val_change=True))

    @rank_zero_only
    def log_image(self, key: str, images: list[Any], step: int | None = None, **kwargs: Any) -> None:
        """Pictures (paths, arrays or PIL images) under `key`."""

        def send() -> None:
            import wandb

            place = {} if step is None else {"trainer/global_step": step}
            self._run().log({key: [wandb.Image(image) for image in images], **place})

        self._submit(send)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Wait, up to the time limit, until everything logged so far is with wandb; the run stays open.

        A run that was stopped or has failed is in a hurry: its launcher waits half a minute, and it has saved before.
        """
        self._exit_code = 0 if status == "success" else 1
        self._limit_at_end = self._limit / (1 if status == "success" else 4)
        self._send_row()
        if self._thread is not None:
            sent = threading.Event()
            self._submit(sent.set)
            sent.wait(self._limit_at_end)

    def close(self) -> None:
        """End wandb's run, within the time limit; done by itself when the process exits."""
        self._send_row()
        if self._thread is None:
            return
        import wandb

        ended = threading.Event()

        def end() -> None:
            try:
                self._run().finish(exit_code=self._exit_code)
            finally:
                ended.set()

        self._submit(end)
        ended.wait(self._limit_at_end)
        # Also when the above hangs or failed: it begins by taking back wandb's own exit hook, which would do so too.
        teardown = threading.Thread(target=_quietly, args=(lambda: wandb.teardown(self._exit_code),), daemon=True)
        teardown.start()
        teardown.join(self._limit_at_end)
        self._thread = self._experiment = None
        if self.lost:
            log.warning("wandb: %d calls were lost; metrics.csv and images/ have everything", self.lost)

    @rank_zero_only
    def _begin(self) -> None:
        if self._thread is None:
            begun = threading.Event()
            self._thread = threading.Thread(target=self._work, args=(begun,), name="wandb", daemon=True)
            self._thread.start()
            if not begun.wait(self._limit):
                log.warning("wandb has not started within %.0f s; training goes on", self._limit)

    def _submit(self, errand: Callable[[], None]) -> None:
        self._begin()
        try:
            self._errands.put_nowait(errand)
        except queue.Full:
            self.lost += 1

    def _run(self) -> Any:
        if self._experiment is None:
            raise ResourceError("wandb has not started")
        return self._experiment

    def _work(self, begun: threading.Event) -> None:
        """The thread: start wandb, then do what is asked, for ever."""
        self._guarded(self._connect)
        begun.set()
        while True:
            self._guarded(self._errands.get())

    def _guarded(self, errand: Callable[[], None]) -> None:
        try:
            errand()
        except Exception as error:  # of any kind: what a third party's program may raise is not known
            self.lost += 1
            if self.lost == 1:
                log.warning("wandb: %s: %s; training goes on without it", type(error).__name__, error)

    def _connect(self) -> None:
        import wandb

        if (shown := str(self.save_dir).encode(errors="backslashreplace").decode()) != str(self.save_dir):
            raise ResourceError(f"it cannot write to {shown}, whose name is not UTF-8")
        wandb.setup(wandb.Settings(**_quiet()))  # also for what login and teardown have to say
        if not self._offline:
            try:
                if wandb.login(prompt=False):
                    _knock(wandb.setup().settings.base_url, self._limit / 4)
                    self._start("online")
                    return
            except Exception as error:  # a refused key, a server that is away or silent, ...
                log.warning("wandb: not online (%s: %s)", type(error).__name__, error)
                _quietly(wandb.teardown)
        self._start("offline")

    def _start(self, mode: str) -> None:
        import wandb

        # The console is left alone: wandb would hook every print, and raise from it once its service is gone.
        settings = wandb.Settings(init_timeout=self._limit / 2, console="off", **_quiet())
        run = wandb.init(**lightning_internals.wandb_arguments(self), mode=mode, settings=settings)  # type: ignore[arg-type]
        run.define_metric("trainer/global_step")
        run.define_metric("*", step_metric="trainer/global_step", step_sync=True)
        self._experiment = run
        atexit.register(self.close)
        if mode == "online":
            print(f"wandb: {run.url}")
        else:
            print(f"wandb: offline; to send this run: wandb sync {Path(run.dir).parent}")


@contextmanager
def ended_if_failed(loggers: Sequence[Logger]) -> Iterator[None]:
    """Where the block fails, `loggers` are ended."""
    try:
        yield
    except BaseException:
        end(loggers)
        raise


def end(loggers: Sequence[Logger]) -> None:
    """End the loggers of a run that has come to nothing, so that its folder can be removed.

    Only wandb has a process of its own, which would go on writing there; others write when they are called.
    """
    for logger in loggers:
        if isinstance(logger, FencedWandb):
            logger.finalize("failed")
            logger.close()
        elif isinstance(logger, WandbLogger) and (run := lightning_internals.wandb_run(logger)) is not None:
            _quietly(partial(run.finish, exit_code=1))


def _quiet() -> dict[str, Any]:
    """wandb's own console is twenty lines of bars and a table; ours has what matters of it. WANDB_SILENT overrules."""
    return {} if "WANDB_SILENT" in os.environ else {"silent": True}


def _knock(url: str, time_limit: float) -> None:
    """Raise OSError unless a server answers: wandb itself would go on trying for longer than its time limit."""
    with suppress(HTTPError):  # an answer, if not a kind one
        urllib.request.urlopen(url, timeout=time_limit).close()


def _quietly(errand: Callable[[], Any]) -> None:
    try:
        errand()
    except Exception as error:
        log.debug("wandb: %s", error)
