"""A metrics file is read in one way, whatever state a killed process or a person has left it in."""

import subprocess
import sys
from pathlib import Path

import pytest

from ldm.cli import plot
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


def test_no_file_has_no_rows(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "metrics.csv") == []


def test_reading_needs_no_lightning() -> None:

    code = "import sys, ldm.training.metrics_table; sys.exit('pytorch_lightning' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
