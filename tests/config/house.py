"""A user's own package, `house`, that needs no torch, and a configuration made of its classes."""

from pathlib import Path

from ldm.config.load import Config
from ldm.config.load import load as load_files

TRUST = ("house",)
PARTS = """
    from __future__ import annotations

    import os
    from collections.abc import Callable, Sequence
    from pathlib import Path
    from typing import TYPE_CHECKING, Literal, Protocol

    if TYPE_CHECKING:
        from elsewhere import Unknown

    system = os.system
    made = []

    class Shape(Protocol):
        def area(self) -> float: ...

    class Part:
        def __init__(self, size: int = 1, scale: float = 1.0, unknown: Unknown | None = None) -> None:
            self.size, self.scale = size, scale
            made.append(self)

    class Bolt(Part):
        pass

    class Nut:
        pass

    class Network:
        def __init__(
            self, channels: int, part: Part, parts: Sequence[Part] = (), mode: Literal["fast", "exact"] = "fast",
            path: Path | None = None, pair: tuple[int, int] = (1, 1), text: str = "", on: bool = False,
            table: dict[str, float] | None = None, make: Callable[..., Part] | None = None,
            shape: Shape | None = None, later: int = None,
            rates: tuple[float, ...] = (), *, last: list[str] | None = None,
        ) -> None:
            self.given = {name: value for name, value in locals().items() if name != "self"}
            made.append(self)

    class Data:
        def __init__(self, batch_size: int, num_workers: int = 0, root: str | Path = "") -> None:
            self.batch_size = batch_size

    class Anything:
        def __init__(self, **options: object) -> None:
            self.options = options

    class Fragile:
        def __init__(self, value: int) -> None:
            raise ValueError("value must be prime")

    class Raises:
        def __init__(self, error: str, text: str) -> None:
            import builtins

            raise getattr(builtins, error)(text)

    class NeedsPackage:
        def __init__(self) -> None:
            import surely_not_installed.inner

    class Refuses:
        def __init__(self) -> None:
            from ldm.errors import ConfigError

            raise ConfigError("a class refused")

    def double(step: int, factor: float = 2.0) -> float:
        return step * factor
"""
BASE = """\
name: house
seed: 23
model:
  target: house.parts.Network
  params:
    channels: 8
    part:
      target: house.parts.Bolt
      params: {size: 3}
data:
  target: house.parts.Data
  params:
    batch_size: 16
lightning:
  trainer:
    max_steps: 10
"""


def write(folder: Path, text: str, name: str = "base.yaml") -> Path:
    (folder / name).write_text(text)
    return folder / name


def load(folder: Path, text: str = BASE, *overrides: str) -> Config:
    return load_files([write(folder, text)], overrides, TRUST)


def model(*lines: str) -> tuple[str, str]:
    """An edit: these parameters for the network, from line 7 of BASE on."""
    return "    part:\n", "".join(f"    {line}\n" for line in lines) + "    part:\n"
