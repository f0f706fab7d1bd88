"""A log file hears now and then of something long; a terminal has a bar."""

import pytest

from ldm.runtime import progress
from ldm.runtime.progress import shown, tracked


@pytest.fixture
def clock(monkeypatch):
    """Every look at the clock is 20 seconds after the one before."""
    times = iter(range(0, 10_000, 20))
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(times)))


def test_a_log_has_a_line_now_and_then(clock, capsys):
    assert [*tracked("abcdef", "drawing")] == [*"abcdef"]
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("drawing: ")]
    assert lines == [
        "drawing: 1/6  0:40 elapsed, 3:20 left",
        "drawing: 3/6  1:20 elapsed, 1:20 left",
        "drawing: 5/6  2:00 elapsed, 0:24 left",
    ]


def test_what_was_there_before_does_not_count_as_fast(clock, capsys):
    with shown("encoding") as show:
        show(500, 600)
        show(550, 600)
    assert "encoding: 550/600  0:40 elapsed, 0:40 left" in capsys.readouterr().out


def test_silence(clock, capsys):
    assert [*tracked("abcdef", "drawing", silent=True)] == [*"abcdef"]
    assert capsys.readouterr().out == ""
