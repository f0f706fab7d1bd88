"""A user's own package, as configurations may name one."""

import sys
import textwrap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def importable(folder: Path, files: Mapping[str, str]) -> Iterator[None]:
    """The block can import what `files` ({path below `folder`: indented source}) hold; afterwards nobody can."""
    for name, source in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(textwrap.dedent(source))
    sys.path.insert(0, str(folder))
    yield
    sys.path.remove(str(folder))
    for name in files:
        sys.modules.pop(name.removesuffix(".py").removesuffix("/__init__").replace("/", "."), None)
