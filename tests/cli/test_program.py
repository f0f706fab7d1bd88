"""ldm.cli.program and ldm.runtime.slurm: how a program leaves, and when its SLURM job is put back into the queue."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ldm.cli import program

ROOT = Path(program.__file__).parents[2]


@pytest.fixture
def queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What was asked of a scontrol that is found first; the file does not exist before."""
    asked, scontrol = tmp_path / "asked", tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {asked}\nexit ${{SCONTROL_CODE:-0}}\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{scontrol.parent}:{os.environ['PATH']}")
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    return asked


def ends(work: str) -> tuple[int, str]:
    """The exit code and all output of a program whose main does `work`."""
    imports = "import os, signal, sys\nfrom ldm.cli import program\nfrom ldm.runtime import signals"
    code = f"{imports}\ndef main():\n {work}\nprogram.run(main)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=100)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("work", "code", "said"),
    [
        ("return 4", 4, ""),
        ("sys.exit(2)", 2, ""),
        ("raise KeyError('a bug')", 1, "KeyError: 'a bug'"),
        ("os.kill(os.getpid(), signal.SIGTERM); signals.stop_if_asked()", 143, "stopped by SIGTERM; nothing is lost"),
        ("os.kill(os.getpid(), signal.SIGINT); return 0", 0, ""),
    ],
)
def test_codes(work: str, code: int, said: str) -> None:
    found, printed = ends(work)
    assert found == code
    assert said in printed


STOPS = "os.kill(os.getpid(), signal.{}); signals.stop_if_asked()"


@pytest.mark.parametrize(
    ("job", "name"), [({"JOB_ID": "123"}, "123"), ({"JOB_ID": "9", "ARRAY_JOB_ID": "7", "ARRAY_TASK_ID": "2"}, "7_2")]
)
def test_slurms_warning_requeues_the_job(
    queue: Path, monkeypatch: pytest.MonkeyPatch, job: dict[str, str], name: str
) -> None:
    for key, value in job.items():
        monkeypatch.setenv(f"SLURM_{key}", value)
    code, printed = ends(STOPS.format("SIGUSR1"))
    assert code == 128 + signal.SIGUSR1
    assert queue.read_text() == f"requeue {name}\n"
    assert f"SLURM job {name} is requeued" in printed


def test_other_ranks_signals_and_places_do_not(queue: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ends(STOPS.format("SIGUSR1"))[0] == 128 + signal.SIGUSR1
    monkeypatch.setenv("SLURM_JOB_ID", "123")
    assert ends(STOPS.format("SIGTERM"))[0] == 128 + signal.SIGTERM
    monkeypatch.setenv("SLURM_PROCID", "1")
    monkeypatch.setenv("SLURM_NTASKS", "2")
    assert ends(STOPS.format("SIGUSR1"))[0] == 128 + signal.SIGUSR1
    assert not queue.exists()


def test_a_refusal_is_said(queue: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "123")
    monkeypatch.setenv("SCONTROL_CODE", "3")
    code, printed = ends(STOPS.format("SIGUSR1"))
    assert code == 128 + signal.SIGUSR1
    assert "123 was NOT requeued (scontrol ended with 3" in printed


@pytest.mark.parametrize(
    ("errno", "said"), [(20, "a file where a folder"), (17, "a file where a folder"), (21, "a folder where a file"),
                        (36, "too long"), (28, "No space"), (13, "Permission denied")]
)  # fmt: skip
def test_a_place_that_cannot_be_written_to_is_answered_in_one_line(capsys, errno, said):
    def work() -> None:
        raise OSError(errno, os.strerror(errno), "some/place")

    assert program.answer(work) == 6
    message = capsys.readouterr().err
    assert message.startswith("error: some/place: ")
    assert said in message


def test_exhausted_memory_is_answered_with_what_helps(capsys):
    assert program.answer(lambda: torch.empty(2**60).ndim, memory="Lower --batch-size.") == 6
    message = capsys.readouterr().err
    assert message.startswith("error: out of memory: ")
    assert message.endswith("\nLower --batch-size.\n")
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        program.answer(lambda: (torch.ones(2, 3) @ torch.ones(2, 3)).ndim)


def test_other_errors_of_the_system_keep_their_traceback():
    def work() -> None:
        raise OSError(5, "Input/output error", "some/place")

    with pytest.raises(OSError, match="Input/output"):
        program.answer(work)
