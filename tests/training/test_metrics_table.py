"""A metrics file is read in one way, whatever state a killed process or a person has left it in."""

import errno
import subprocess
import sys
from pathlib import Path

import pytest

from ldm.cli import plot
from ldm.training import metrics_table
from ldm.training.metrics_table import MetricsTable, read_metrics


def test_what_was_written_is_read(tmp_path: Path) -> None:
    table = MetricsTable(tmp_path / "metrics.csv")
    table.write(1, {"a": "0.5"})
    table.write(None, {"b": "2"})
    table.write(3, {"a": "nan"})
    assert read_metrics(table.path) == [{"step": "1", "a": "0.5", "b": "2"}, {"step": "3", "a": "nan"}]


@pytest.mark.parametrize("rest", ["2,0.", "2,0.25,7,8\n"])
def test_rows_that_are_cut_short_or_too_long(tmp_path: Path, rest: str) -> None:
    file = tmp_path / "metrics.csv"
    file.write_text(f"step,a\n1,0.5\n,3\n{rest}")
    rows = read_metrics(file)
    assert rows[0] == {"step": "1", "a": "0.5"}
    assert rows[1:] == ([{"step": "2", "a": "0.25"}] if rest.endswith("\n") else [])
    assert plot.read_curves(tmp_path)["a"][0] == [int(row["step"]) for row in rows]


@pytest.mark.parametrize("at", ["header", "row"])
@pytest.mark.parametrize("step", [2, None, 3])
def test_what_follows_a_full_disk_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str, step: int | None
) -> None:
    table = MetricsTable(tmp_path / "metrics.csv")
    table.write(1, {"a": "1"})
    table.write(2, {"a": "2"})

    def full(*_: object, **__: object) -> None:
        with table.path.open("a") as file:
            file.write("2," if at == "row" else "")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(*((metrics_table, "write_text") if at == "header" else (MetricsTable, "_lines")), full)
        with pytest.raises(OSError, match="No space"):
            table.write(2, {"b": "2"} if at == "header" else {"a": "2"})
    table.write(step, {"b": "3"})
    table.write(4, {"c": "4"})
    rest = ["2,2,3,", "4,,,4"] if step != 3 else ["2,2,,", "3,,3,", "4,,,4"]
    assert table.path.read_text().splitlines() == ["step,a,b,c", "1,1,,", *rest]


def test_no_file_has_no_rows(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "metrics.csv") == []


def test_reading_needs_no_lightning() -> None:

    code = "import sys, ldm.training.metrics_table; sys.exit('pytorch_lightning' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
