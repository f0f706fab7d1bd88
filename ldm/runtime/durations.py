"""Elapsed and remaining time in human-readable form."""


def clock(seconds: float) -> str:
    """`0:07`, `12:05`, `3:00:00`: minutes and seconds, with hours where there are any."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def so_far(seconds: float, done: float, total: float) -> str:
    """`0:30 elapsed, 1:30 left`, if the rest proceeds as fast as the `done` of `total` in `seconds`."""
    left = clock(seconds * (total - done) / done) if done > 0 else "?"
    return f"{clock(seconds)} elapsed, {left} left"
