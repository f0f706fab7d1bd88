"""The metrics file survives kill -9 and resume; nothing that happens to wandb reaches training."""

import csv
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest

from ldm.config.load import to_yaml
from ldm.training.loggers import FencedWandb, MetricsFile
from ldm.training.metrics_table import read_metrics
from tests.points import wait_until


def table(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_one_row_a_step_and_columns_as_they_come(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.csv"
    file = MetricsFile(path)
    file.log_metrics({"train/loss": 0.5, "epoch": 0}, step=49)
    file.log_metrics({"train/loss": 0.25}, step=99)
    file.log_metrics({"val/loss": 1 / 3}, step=99)
    file.log_metrics({"train/loss": float("nan")}, step=149)
    assert table(path) == [
        {"step": "49", "train/loss": "0.5", "val/loss": ""},
        {"step": "99", "train/loss": "0.25", "val/loss": "0.333333333"},
        {"step": "149", "train/loss": "nan", "val/loss": ""},
    ]
    assert os.listdir(path.parent) == ["metrics.csv"]


def test_a_row_that_becomes_shorter_leaves_no_rest(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.csv")
    file.log_metrics({"a": 0.123456789}, step=1)
    file.log_metrics({"a": 2}, step=1)
    assert (tmp_path / "metrics.csv").read_text() == "step,a\n1,2\n"


def test_a_resumed_run_drops_what_it_will_write_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    first = MetricsFile(path)
    for step in range(9, 60, 10):
        first.log_metrics({"train/loss": step}, step=step)
    with path.open("a") as file:
        file.write("69,4")  # a power cut in the middle of a row
    second = MetricsFile(path)
    second.log_metrics({"val/loss": 1.0}, step=29)
    second.log_metrics({"train/loss": 39}, step=39)
    expected = [("9", "9", ""), ("19", "19", ""), ("29", "", "1"), ("39", "39", "")]
    assert [(row["step"], row["train/loss"], row["val/loss"]) for row in table(path)] == expected


def test_a_resumed_run_that_logs_nothing_leaves_the_file(tmp_path: Path) -> None:
    MetricsFile(tmp_path / "metrics.csv").log_metrics({"a": 1}, step=1)
    MetricsFile(tmp_path / "metrics.csv").log_metrics({"epoch": 0}, step=0)
    assert read_metrics(tmp_path / "metrics.csv") == [{"step": "1", "a": "1"}]


def test_kill_9_leaves_a_readable_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    for killed in range(10):
        path.unlink(missing_ok=True)
        child = os.fork()
        if child == 0:
            try:
                file = MetricsFile(path)
                for step in range(100_000):
                    file.log_metrics({"a": step, f"b{step // 50}": 2}, step=step)
            finally:
                os._exit(1)
        # Killed at some moment after it has begun to write, however busy the machine is.
        assert wait_until(lambda: len(read_metrics(path)) > 10, seconds=60)
        time.sleep(0.01 * killed)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        rows = read_metrics(path)
        assert [int(row["step"]) for row in rows] == list(range(len(rows)))
        assert len(rows) > 10


def test_a_disk_that_fails_is_reported_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = MetricsFile(tmp_path / "a file" / "metrics.csv")
    (tmp_path / "a file").write_text("not a folder")
    with caplog.at_level(logging.WARNING):
        for step in range(3):
            file.log_metrics({"a": 1}, step=step)
    assert len(caplog.records) == 1
    assert "training goes on" in caplog.text


_RUN = """
import os, signal, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from ldm.config.load import to_yaml
from ldm.training.loggers import FencedWandb
folder, fault = Path(sys.argv[2]), sys.argv[3]
logger = FencedWandb(folder, project="test", time_limit=float(sys.argv[4]))
started = time.monotonic()
logger.log_hyperparams({"lr": 0.1})
logger.log_metrics({"loss": 1.0}, step=0)
logger.finalize("success")
start = time.monotonic() - started
if fault != "none":
    while logger._experiment is None:  # a busy machine
        time.sleep(0.1)
    lines = [line.split() for line in os.popen("ps -ww -eo pid,args") if "wandb-core" in line]
    cores = [int(line[0]) for line in lines if str(os.getpid()) in line[1:]]
    os.kill(cores[0], getattr(signal, fault))
    Path(sys.argv[5]).write_text(str(cores[0]))
    time.sleep(0.2)
started = time.monotonic()
for step in range(1, 500):
    logger.log_metrics({"loss": 1.0 / step}, step=step)
logger.log_image("samples", [], step=step)
print("trained: start", round(start), "loop", round(time.monotonic() - started), flush=True)
"""


def run_with_wandb(
    folder: Path, fault: str = "none", limit: float = 30, **environment: str
) -> tuple[subprocess.CompletedProcess, float]:
    """A process that logs to wandb while `fault` happens to it, and how long it took."""
    root = str(Path(__file__).parents[2])
    keep = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    env = keep | {"HOME": str(folder), "WANDB_CACHE_DIR": str(folder / "cache")} | environment
    core = folder / "core.pid"
    command = [sys.executable, "-c", _RUN, root, str(folder), fault, str(limit), str(core)]
    out, err = folder / "out.txt", folder / "err.txt"
    started = time.monotonic()
    # Files, not pipes: a stopped service outlives the process and would hold a pipe open.
    with out.open("w") as stdout, err.open("w") as stderr:
        code = subprocess.run(command, env=env, stdout=stdout, stderr=stderr, timeout=400).returncode
    took = time.monotonic() - started
    if core.exists():
        with suppress(ProcessLookupError):
            os.kill(int(core.read_text()), signal.SIGKILL)
    return subprocess.CompletedProcess(command, code, out.read_text(), err.read_text()), took


@pytest.mark.slow
def test_without_an_account_wandb_is_offline_and_says_how_to_sync(tmp_path: Path) -> None:
    done, _ = run_with_wandb(tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"wandb sync {tmp_path / 'wandb' / 'offline-run'}" in done.stdout
    assert "trained: " in done.stdout
    assert list((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    assert "Traceback" not in done.stderr
    assert "lost" not in done.stderr


@pytest.mark.slow
def test_a_run_says_one_line_of_wandb_and_what_a_newcomer_reads(tmp_path: Path, autoencoder_tree: dict) -> None:
    """All that a run in a log file prints, both streams: wandb's own console is twenty lines at the end of each run."""
    del autoencoder_tree["lightning"]["logger"]
    (tmp_path / "config.yaml").write_text(to_yaml(autoencoder_tree))
    keep = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    environment = keep | {"HOME": str(tmp_path), "WANDB_MODE": "offline", "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, str(Path(__file__).parents[2] / "main.py"), "--base", "config.yaml"]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout
    lines = done.stdout.splitlines()
    (place,) = re.findall(r"^wandb: offline; to send this run: wandb sync (\S+)$", done.stdout, re.MULTILINE)
    assert list((tmp_path / place).glob("run-*.wandb"))
    assert len([line for line in lines if "wandb" in line.lower()]) == 1
    assert len([line for line in lines if re.match(r"step (4|8|12): val/psnr \S+  val/ssim .* left$", line)]) == 3
    assert any(re.match(r"step 12/12: l1 \S+  loss \S+  \S+ images/s  \S+ elapsed, 0:00 left", line) for line in lines)
    assert len(lines) <= 8, done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["SIGKILL", "SIGSTOP"])
def test_a_dead_or_hanging_service_is_survived(tmp_path: Path, fault: str) -> None:
    done, _ = run_with_wandb(tmp_path, fault, limit=10)
    assert done.returncode == 0, done.stderr
    assert "loop 0" in done.stdout or "loop 1" in done.stdout
    assert "Traceback" not in done.stderr
    if fault == "SIGKILL":
        assert "training goes on without it" in done.stderr


@pytest.mark.slow
def test_an_unreachable_server_means_offline(tmp_path: Path) -> None:
    account = {"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9"}
    done, _ = run_with_wandb(tmp_path, limit=20, **account)
    assert done.returncode == 0, done.stderr
    assert "trained: " in done.stdout
    assert "wandb sync" in done.stdout


def test_the_last_word_on_a_step_is_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a step of three micro-batches; and with the run's end, of the last one."""
    logger = FencedWandb(tmp_path)
    monkeypatch.setattr(logger, "_connect", lambda: None)
    sent: list[dict[str, float]] = []
    logger._experiment = SimpleNamespace(log=sent.append)
    for values in ({"loss": 9.0}, {"loss": 3.0}, {"loss": 1.0, "norm": 2.0}):
        logger.log_metrics(values, step=50)
    logger.log_metrics({"loss": 4.0}, step=100)
    logger.log_metrics({"val": 5.0}, step=100)
    logger.finalize("success")
    logger.finalize("success")
    first, second = {"loss": 1.0, "norm": 2.0}, {"loss": 4.0, "val": 5.0}
    assert sent == [first | {"trainer/global_step": 50}, second | {"trainer/global_step": 100}]


def test_calls_beyond_the_queue_are_counted_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logger = FencedWandb(tmp_path, time_limit=0.2)
    monkeypatch.setattr(logger, "_connect", lambda: time.sleep(3600))
    started = time.monotonic()
    for step in range(1500):
        logger.log_metrics({"a": 1.0}, step=step)
    logger.finalize("success")
    assert time.monotonic() - started < 60  # of the hour that it would take to wait for wandb
    assert logger.lost == 501  # a thousand are kept for later; the last one asked whether all were sent


def test_a_run_that_was_stopped_waits_for_wandb_but_a_quarter_as_long(tmp_path, monkeypatch):
    logger = FencedWandb(tmp_path, time_limit=2.0)
    monkeypatch.setattr(logger, "_connect", lambda: None)
    hung = threading.Event()
    logger._submit(lambda: hung.wait(20) and None)
    waited = {}
    for status, least in (("failed", 0.4), ("success", 1.9)):
        begin = time.monotonic()
        logger.finalize(status)
        waited[status] = time.monotonic() - begin
        assert waited[status] > least
    assert waited["failed"] < waited["success"]
    hung.set()
