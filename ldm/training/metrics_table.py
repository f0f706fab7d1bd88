"""`metrics.csv`: a row for each step that logged something, a column for each metric, in order of appearance."""

import csv
import io
from pathlib import Path

from ldm.files import write_text


class MetricsTable:
    """Writes a metrics file, each row as soon as it is known, so that it survives kill -9.

    On resume the file is continued: rows from the first step logged now on were written by a process that went further
    than its last checkpoint, and are dropped.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._columns: list[str] = []  # of the file; none: it is to be read first
        self._row: dict[str, str] = {}
        self._start = 0  # of the last row, in bytes

    def write(self, step: int | None, values: dict[str, str]) -> None:
        """Add `values` to the row of `step`; None: the row written last.

        Raises:
            OSError: the disk is full or gone; `values` are lost unless that row is written once more.
        """
        try:
            self._write(str(step) if step is not None else self._row.get("step", "0"), values)
        except OSError:
            self._columns = []
            raise

    def _write(self, number: str, values: dict[str, str]) -> None:
        if not self._columns:
            self._columns = ["step"]
            self._rewrite([row for row in read_metrics(self.path) if int(row["step"]) < int(number)])
        if self._row.get("step") != number:
            self._start = self.path.stat().st_size
            self._row = {"step": number}
        self._row |= values
        if new := [name for name in self._row if name not in self._columns]:
            rows = [row for row in read_metrics(self.path) if row["step"] != number]
            self._columns += new
            self._rewrite(rows)
        with self.path.open("r+b") as file:
            file.seek(self._start)
            file.write(self._lines([self._row]).encode())
            file.truncate()

    def _rewrite(self, rows: list[dict[str, str]]) -> None:
        """The whole file, atomically, with a column for all that `rows` hold."""
        self._columns += [
            name for name in dict.fromkeys(key for row in rows for key in row) if name not in self._columns
        ]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_text(self.path, ",".join(self._columns) + "\n" + self._lines(rows))
        self._start = self.path.stat().st_size

    def _lines(self, rows: list[dict[str, str]]) -> str:
        text = io.StringIO()
        csv.DictWriter(text, self._columns, lineterminator="\n").writerows(rows)
        return text.getvalue()


def read_metrics(path: Path) -> list[dict[str, str]]:
    """The rows of a metrics file, each with the values it has, as text; a last row cut short is left out."""
    if not path.exists():
        return []
    whole_lines = path.read_text().rpartition("\n")[0]
    return [
        {name: value for name, value in row.items() if name and value}
        for row in csv.DictReader(io.StringIO(whole_lines))
        if (row.get("step") or "").isdigit()
    ]
