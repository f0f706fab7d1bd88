"""ldm.runtime.signals: what is noted, who is told, and what ends at once."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from ldm.runtime import signals
from tests.points import in_a_child, wait_until

ROOT = Path(signals.__file__).parents[2]


@pytest.mark.parametrize("number", signals.STOPPING)
def test_the_first_request_is_noted(number: int) -> None:
    def listening() -> None:
        assert signals.listen()
        assert not signals.listen()
        signals.stop_if_asked()
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.received() == number
        signals.stop_if_asked()

    assert in_a_child(listening) == 128 + number


def test_what_is_ignored_stays_so_and_what_was_there_comes_back() -> None:
    def listening() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
        before = [signal.getsignal(number) for number in signals.STOPPING]
        signals.listen()
        os.kill(os.getpid(), signal.SIGHUP)
        assert signals.received() == 0
        signals.listen_no_more()
        assert [signal.getsignal(number) for number in signals.STOPPING] == before
        assert signal.set_wakeup_fd(-1) == -1
        signals.listen()
        os.kill(os.getpid(), signal.SIGUSR2)
        assert signals.received() == signal.SIGUSR2

    assert in_a_child(listening) == 0


def test_the_third_request_ends_at_once_but_a_doubled_signal_is_one(capfd: pytest.CaptureFixture) -> None:
    def stubborn() -> None:
        signals.listen()
        for pause in (0, 0, 0, 1.1, 1.1):
            time.sleep(pause)
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    assert in_a_child(stubborn) == 128 + signal.SIGTERM
    printed = capfd.readouterr().err
    assert re.findall("SIGTERM: stopping.*", printed)[1:] == ["SIGTERM: stopping at once; the last checkpoint stands"]


def test_the_third_request_ends_at_once_also_in_a_call_that_never_returns() -> None:
    """As in a collective whose other ranks are gone: Python's handlers do not run there."""
    program = (
        "import ctypes; from ldm.runtime import signals; signals.listen(); print(flush=True);"
        "libc = ctypes.CDLL(None)\nwhile True: libc.sleep(1000)"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=ROOT
    )
    assert child.stdout is not None
    child.stdout.readline()
    started = time.monotonic()
    for _ in range(3):
        child.send_signal(signal.SIGINT)
        time.sleep(1.1)
    assert child.wait(10) == 128 + signal.SIGINT
    assert time.monotonic() - started < 10


def test_a_forked_child_tells_its_parent_nothing() -> None:
    def listening() -> None:
        signals.listen()
        child = os.fork()
        if child == 0:
            for _ in range(3):
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(1.1)
            os._exit(signals.received())
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert signals.received() == 0

    assert in_a_child(listening) == 0


def test_a_rank_started_by_rank_0_passes_requests_on_and_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)

    def launching() -> None:
        signals.listen()
        parent = os.getpid()
        child = os.fork()
        if child == 0:
            os.environ.update(LDM_STARTER=str(parent), LOCAL_RANK="1")
            signals.listen()
            os.kill(os.getpid(), signal.SIGUSR1)
            signals.stop_if_asked()
            wait_until(lambda: False, 1)
            os._exit(0)
        assert wait_until(lambda: signals.received() == signal.SIGUSR1, 10)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0

    assert in_a_child(launching) == 0


def test_the_listening_thread_leaves() -> None:
    assert signals.listen()
    signals.listen_no_more()
    assert wait_until(lambda: "signals" not in {thread.name for thread in threading.enumerate()}, 5)
