"""Compare records of `ldm evaluate`, or the newest ones of runs, side by side.

    python scripts/evaluate.py compare logs/<run> logs/<other run>
    python scripts/evaluate.py compare a.json b.json c.json --out comparison

Prints a table that says whether each difference is more than noise, and what differs between the protocols.
There is a winner also of samples that were made differently, which is said, and none where they were measured so. Draws
comparison.png (the distance against images seen and hours) and comparison.pictures.png (the same seeds of each).
"""

from collections.abc import Sequence
from pathlib import Path

from ldm.cli import program
from ldm.cli.options import Parser, called, path


def main(argv: Sequence[str]) -> int:
    """Returns the exit code (ldm/errors.py)."""
    parser = Parser(
        prog=f"{called('evaluate.py', 'evaluate')} compare",
        description="Compare records, or runs.",
        allow_abbrev=False,
    )
    parser.add_argument("records", nargs="+", type=path, metavar="RUN_OR_RECORD", help="two or more")
    where = "where to draw, without an ending (default: comparison)"
    parser.add_argument("--out", type=path, default=Path("comparison"), metavar="NAME", help=where)

    def work() -> None:
        options = parser.parse_strictly(argv)
        from ldm.evaluation import comparison

        found = comparison.entries(options.records)
        print(comparison.report(found))
        options.out.parent.mkdir(parents=True, exist_ok=True)
        for draw, ending in ((comparison.draw, ".png"), (comparison.sheet, ".pictures.png")):
            file = options.out.with_name(options.out.name + ending)
            if draw(found, file):
                print(file)

    return program.answer(work)
