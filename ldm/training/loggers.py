"""Where metrics are logged: a CSV that survives kill -9 and resume, and wandb isolated so that training never waits."""

import atexit
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
from ldm.ranges import Positive
from ldm.runtime import imports
from ldm.training import lightning_internals
from ldm.training.metrics_table import MetricsTable

log = logging.getLogger(__name__)


class MetricsFile(Logger):
    """The run's `metrics.csv`, see ldm/training/metrics_table.py."""

    def __init__(self, path: Path | str) -> None:
        super().__init__()
        self._table = MetricsTable(Path(path))
        self._failed = False

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
        """Add `metrics` to the row of `step`; a full or missing disk is reported once, and never ends a run."""
        # The epoch is left out: an endless sampler has only one.
        values = {name: f"{float(value):.9g}" for name, value in metrics.items() if name != "epoch"}
        if not values:
            return
        try:
            self._table.write(step, values)
        except OSError as error:
            if not self._failed:
                log.warning("%s: cannot be written (%s); training goes on without it", self._table.path, error)
            self._failed = True


class FencedWandb(WandbLogger):
    """wandb in a separate thread: whatever happens to it, training neither fails nor waits.

    The run starts online if there is an account and the server answers, else in wandb's offline mode. Calls are
    queued; one that fails is counted, and the first is reported. The thread is no executor's: Python waits at its exit
    for every worker of one, forever if wandb hangs, and its queue has no limit.

    Args:
        save_dir: where wandb keeps its files; the run folder.
        project: the wandb project.
        name: of the run.
        id: of the run; the same one continues it after a resume.
        offline: do not connect.
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
        # With manual optimization Lightning logs a step's numbers at each of its micro-batches, at first with those of
        # the step before: only the last numbers of a step are sent, when the next one begins.
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

        A run that was stopped or has failed waits a quarter as long: its launcher kills it after half a minute.
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
        # Also if the above hung or failed: it first unregisters wandb's own exit hook, which would hang or fail, too.
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
            with imports.uncollected():  # a third of wandb's start
                self._thread.start()
                in_time = begun.wait(self._limit)
            if not in_time:
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
        """The thread: start wandb, then do what is queued, forever."""
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
        wandb.setup(wandb.Settings(**_quiet()))  # also for the output of login and teardown
        if not self._offline:
            try:
                if wandb.login(prompt=False):
                    _check_answers(wandb.setup().settings.base_url, self._limit / 4)
                    self._start("online")
                    return
            except Exception as error:  # a refused key, a server that is away or silent, ...
                log.warning("wandb: not online (%s: %s)", type(error).__name__, error)
                _quietly(wandb.teardown)
        self._start("offline")

    def _start(self, mode: str) -> None:
        import wandb

        # wandb's console capture is off: it hooks every print, and raises from it once its service has died.
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
    """End the loggers of a run that failed before its first step, so that its folder can be removed.

    Only wandb has a process of its own, which would keep writing there; others write when they are called.
    """
    for logger in loggers:
        if isinstance(logger, FencedWandb):
            logger.finalize("failed")
            logger.close()
        elif isinstance(logger, WandbLogger) and (run := lightning_internals.wandb_run(logger)) is not None:
            _quietly(partial(run.finish, exit_code=1))


def _quiet() -> dict[str, Any]:
    """Settings that silence wandb's twenty lines of output, unless WANDB_SILENT decides."""
    return {} if "WANDB_SILENT" in os.environ else {"silent": True}


def _check_answers(url: str, time_limit: float) -> None:
    """Raise OSError unless a server answers: wandb itself would go on trying for longer than its time limit."""
    with suppress(HTTPError):  # an error status is an answer, too
        urllib.request.urlopen(url, timeout=time_limit).close()


def _quietly(errand: Callable[[], Any]) -> None:
    try:
        errand()
    except Exception as error:
        log.debug("wandb: %s", error)
