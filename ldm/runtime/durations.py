"""How long something has taken and will take, as a person reads it."""


def clock(seconds: float) -> str:
    """`0:07`, `12:05`, `3:00:00`: minutes and seconds, with hours where there are any."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def so_far(seconds: float, done: float, total: float) -> str:
    """`0:30 elapsed, 1:30 left`, if the rest goes as fast as what was `done` of `total` in so many seconds."""
    left = clock(seconds * (total - done) / done) if done > 0 else "?"
    return f"{clock(seconds)} elapsed, {left} left"
