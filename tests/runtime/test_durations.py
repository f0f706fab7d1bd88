"""ldm.runtime.durations: times as a person reads them."""

import pytest

from ldm.runtime.durations import clock, so_far


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (7.4, "0:07"), (59.6, "1:00"), (725, "12:05"), (10800, "3:00:00")]
)
def test_minutes_and_seconds(seconds, text):
    assert clock(seconds) == text


def test_the_rest_goes_as_fast_as_the_beginning():
    assert so_far(30, done=250, total=1000) == "0:30 elapsed, 1:30 left"
    assert so_far(30, done=1000, total=1000) == "0:30 elapsed, 0:00 left"
    assert so_far(3, done=0, total=1000) == "0:03 elapsed, ? left"
