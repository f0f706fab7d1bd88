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


def test_parts_have_titles_and_speeds_of_their_own(clock, capsys):
    with shown("sampling") as show:
        show(0, 1)
        show(0, 4, "denoising")
        show(2, 4, "denoising")
        show(0, 2, "decoding")
        show(1, 2, "decoding")
        show(1, 1)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert lines == [
        "denoising: 0/4  0:00 elapsed, ? left",
        "decoding: 0/2  0:00 elapsed, ? left",
        "sampling: 1/1  2:00 elapsed, 0:00 left",
    ]


def test_silence(clock, capsys):
    assert [*tracked("abcdef", "drawing", silent=True)] == [*"abcdef"]
    assert capsys.readouterr().out == ""
