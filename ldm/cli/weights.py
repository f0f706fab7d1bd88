"""List the trained weights of others that ldm can use, or bring those that packages carry.

python scripts/weights.py                          # what there is, where it lies, how to get what is missing
python scripts/weights.py --fetch                  # all that packages carry (make weights)
python scripts/weights.py --fetch lpips-alexnet
"""

from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.cli import program
from ldm.cli.options import Parser, called
from ldm.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from ldm.weights.catalog import WeightFile
    from ldm.weights.fetch import Carried


def table() -> str:
    """Every file: its name, size, license and use; where it lies, or how to get it."""
    from ldm.weights.catalog import FILES

    width = max(map(len, FILES))
    lines = []
    for name, entry in FILES.items():
        there, text = state(entry)
        size = f"{entry.size / 1e6:,.0f} MB"
        lines.append(f"{name:<{width}}  {there:<8}{size:>9}  {entry.use}; {entry.license}")
        lines += [f"{'':<{width}}  {line}" for line in text]
    return "\n".join(lines)


def state(entry: "WeightFile") -> tuple[str, list[str]]:
    """Whether a file is there, in a word, and lines that say where, or what to do."""
    from ldm.weights import cache

    try:
        return "there", [str(cache.find(entry.name))]
    except CheckpointError as error:
        if any(path.is_file() for path in cache.places(entry)):
            return "broken", str(error).splitlines()
    command = entry.source.command(entry.name, cache.folder() / entry.file)
    return "missing", [f"from {entry.source}: sha256 {entry.sha256 or 'not known'}", command]


def carried(names: Sequence[str]) -> "list[Carried]":
    """The named files, each with the package that carries it; none named: all that packages carry.

    Raises:
        ConfigError: there is no file of that name, or no package carries it.
    """
    from ldm.weights import cache
    from ldm.weights.catalog import FILES
    from ldm.weights.sources import Package

    found = [(entry, entry.source) for entry in FILES.values() if isinstance(entry.source, Package)]
    fetchable = [entry.name for entry, _ in found]
    for name in names:
        if name not in FILES:
            near = get_close_matches(name, FILES, n=1)
            hint = f"did you mean {near[0]}?" if near else f"expected some of {', '.join(fetchable)}."
            raise ConfigError(f"--fetch {name}: no file is called that: {hint}")
        if name not in fetchable:
            entry = FILES[name]
            command = entry.source.command(name, cache.folder() / entry.file)
            raise ConfigError(
                f"--fetch {name}: no package carries it (packages carry {', '.join(fetchable)}); get it from "
                f"{entry.source}: {command}"
            )
    return [(entry, package) for entry, package in found if not names or entry.name in names]


def fetch(names: Sequence[str]) -> None:
    """Bring what is missing, and say where each file is."""
    from ldm.weights import cache
    from ldm.weights import fetch as fetching

    missing = []
    for entry, package in carried(names):
        try:
            print(f"{entry.name}: {cache.find(entry.name)}")
        except CheckpointError:  # none, or one that is damaged
            missing.append((entry, package))
    for (entry, _), place in zip(missing, fetching.fetch(missing), strict=True):
        print(f"{entry.name}: {place} ({_size(place)}; {entry.license})", flush=True)


def _size(path: Path) -> str:
    return f"{path.stat().st_size / 1e6:.1f} MB"


def main(argv: Sequence[str]) -> int:
    """Returns the exit code (ldm/errors.py)."""
    parser = Parser(
        prog=called("weights.py", "weights"),
        description="List the trained weights of others that ldm can use, or bring those that packages carry.",
        allow_abbrev=False,
    )
    parser.add_argument("--fetch", nargs="*", metavar="NAME", help="bring these, or all that packages carry, by pip")

    def work() -> None:
        options = parser.parse_strictly(argv)
        if options.fetch is None:
            print(table())
        else:
            fetch(options.fetch)

    return program.answer(work)
