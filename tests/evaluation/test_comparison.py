"""Records side by side: no winner without equal protocols, and none within noise."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from ldm.errors import ConfigError, DataError
from ldm.evaluation.comparison import deciding, differences, draw, entries, report, sheet, unlike, verdict
from ldm.evaluation.record import Record
from ldm.evaluation.values import Value

PROTOCOL = {
    "kind": "samples",
    "images": 100,
    "guidance": 1.0,
    "average": "a",
    "reference": {"identity": "x", "name": "r"},
}


def record(value: float, step: int = 10, date: str = "2026", error: float = 0.5, **protocol: object) -> Record:
    training = {"checkpoint": f"step={step}.ckpt", "step": step, "images_seen": 1000 * step, "hours": step / 10}
    values = [Value("FID", value, error, 9, value - 1, "inception", settings={"images": 100})]
    subject = {"name": "x", "kind": "samples", "training": training}
    return Record(
        subject, PROTOCOL | protocol, values, sheets={"pictures": "a.png"}, versions={"torch": "2"}, date=date
    )


@pytest.fixture
def runs(tmp_path):
    """Two runs with the records of two steps each."""
    for name, values in {"a": (20, 10), "b": (20, 15)}.items():
        for step, value in zip((5, 10), values, strict=True):
            record(value, step).write(tmp_path / name / "evaluation" / f"{step}.json")
        Image.fromarray(np.zeros((8, 20, 3), np.uint8)).save(tmp_path / name / "evaluation" / "a.png")
    return [tmp_path / "a", tmp_path / "b"]


def row(text: str, metric: str) -> list[str]:
    (line,) = (line for line in text.splitlines() if line.startswith(f"| {metric} "))
    return [cell.strip() for cell in line.split("|")[1:-1]]


def test_the_better_run_is_named(runs):
    found = entries(runs)
    assert [entry.file.name for entry in found] == ["10.json", "10.json"]
    text = report(found)
    assert row(text, "FID") == ["FID", "10.00 ± 0.50", "15.00 ± 0.50", "A is better"]
    assert "The protocols are the same." in text


def test_no_winner_within_noise(runs):
    record(10.5).write(runs[1] / "evaluation" / "10.json")
    assert row(report(entries(runs)), "FID")[-1] == "within noise"


def test_no_winner_of_different_measurements(runs):
    for step in (5, 10):
        record(15, step, labels="random").write(runs[1] / "evaluation" / f"{step}.json")
    text = report(entries(runs))
    assert row(text, "FID")[-1] == "not comparable"
    assert row(text, "labels") == ["labels", "None", "random", "yes"]
    assert "No winner is named: the numbers were made with different labels." in text


def test_samples_made_in_two_ways_are_compared_and_that_is_said(runs):
    """Which guidance is the better one is a question as good as which model."""
    for step in (5, 10):
        record(15, step, guidance=2.0).write(runs[1] / "evaluation" / f"{step}.json")
    text = report(entries(runs))
    assert row(text, "FID")[-1] == "A is better"
    assert row(text, "guidance") == ["guidance", "1.0", "2.0", ""]
    assert "The samples were made differently (guidance): that may be why one is better." in text


def test_another_precision_of_samples_is_another_protocol(runs):
    record(15, precision="bf16-mixed").write(runs[1] / "evaluation" / "9.json")
    assert [entry.file.name for entry in entries(runs)] == ["10.json", "10.json"]
    for step in (5, 10):
        (runs[1] / "evaluation" / f"{step}.json").unlink()
    text = report(entries(runs))
    assert row(text, "precision") == ["precision", "None", "bf16-mixed", ""]
    assert "The samples were made differently (precision): that may be why one is better." in text


def test_what_belongs_to_the_model_is_shown_and_hinders_nothing(runs):
    record(15, average="b", reference={"identity": "x", "name": "moved"}).write(runs[1] / "evaluation" / "10.json")
    text = report(entries(runs))
    assert row(text, "average") == ["average", "a", "b", ""]
    assert row(text, "FID")[-1] == "A is better"


def test_a_record_of_the_same_protocol_is_preferred_to_a_newer_one(runs):
    record(1, step=20, images=50).write(runs[1] / "evaluation" / "20.json")
    assert [entry.file.name for entry in entries(runs)] == ["10.json", "10.json"]


def test_spaces_that_share_a_short_name_have_rows_of_their_own(tmp_path):
    for name, values in {"a": (10.0, 40.0), "b": (15.0, 30.0)}.items():
        pairs = zip(values, ("clip-b", "clip-l"), strict=True)
        own = [Value("FD-CLIP", value, 0.5, 9, features=features) for value, features in pairs]
        replace(record(1.0), values=own[:: 1 if name == "a" else -1]).write(tmp_path / f"{name}.json")
    text = report(entries([tmp_path / "a.json", tmp_path / "b.json"]))
    assert row(text, "FD-CLIP (clip-b)")[1:] == ["10.00 ± 0.50", "15.00 ± 0.50", "A is better"]
    assert row(text, "FD-CLIP (clip-l)")[1:] == ["40.00 ± 0.50", "30.00 ± 0.50", "B is better"]


def test_another_precision_is_shown_and_hinders_nothing(tmp_path):
    for name, precision in {"a": "float32", "b": "float32 (of samples tf32)"}.items():
        replace(record(1.0), machine={"precision": precision}).write(tmp_path / f"{name}.json")
    text = report(entries([tmp_path / "a.json", tmp_path / "b.json"]))
    assert row(text, "precision") == ["precision", "float32", "float32 (of samples tf32)", ""]
    assert "made differently" not in text


def test_files_as_well_as_runs_and_more_than_two(runs, tmp_path):
    record(30).write(tmp_path / "c.json")
    found = entries([*runs, tmp_path / "c.json"])
    assert row(report(found), "FID")[1:] == ["10.00 ± 0.50", "15.00 ± 0.50", "30.00 ± 0.50", "A is better"]


@pytest.mark.parametrize(
    ("values", "comparable", "said"),
    [
        ([Value("FID", 1.0, 0.1, 9), Value("FID", 2.0, 0.1, 9)], True, "a is better"),
        ([Value("P", 1.0, 0.1, 9, better="higher"), Value("P", 2.0, 0.1, 9, better="higher")], True, "b is better"),
        ([Value("FID", 1.0), Value("FID", 2.0)], True, "no error bars"),
        ([Value("FID", 1.0, 0.1, 9), Value("FID", 2.0, 0.1, 9)], False, "not comparable"),
        (
            [Value("KID", 1.0, 0.1, 9, settings={"n": 1}), Value("KID", 2.0, 0.1, 9, settings={"n": 2})],
            True,
            "not comparable",
        ),
        ([Value("std", 1.0, better=""), Value("std", 2.0, better="")], True, ""),
        ([Value("FID", 1.0, 0.1, 9), None], True, ""),
    ],
)
def test_verdicts(values, comparable, said):
    assert verdict(values, ["a", "b"], comparable) == said


def test_differences_are_named_by_dotted_key():
    one, other = {"a": {"b": 1, "c": 2}, "device": "cpu"}, {"a": {"b": 1, "c": 3}, "device": "cuda", "new": 4}
    assert differences([one, other]) == {"a.c": [2, 3], "device": ["cpu", "cuda"], "new": [None, 4]}
    assert [*deciding(one, other)] == ["a.c", "new"]


def test_a_curve_is_of_samples_made_in_one_way():
    """Of one run measured at two guidances there are two curves: neither has points of the other."""
    one, other = {"steps": 50, "labels": "random"}, {"steps": 20, "labels": "random"}
    assert [*unlike(one, other)] == ["steps"]
    assert not deciding(one, other)


def test_figure_and_sheet(runs, tmp_path):
    found = entries(runs)
    assert draw(found, tmp_path / "figure.png")
    assert sheet(found, tmp_path / "sheet.png")
    assert Image.open(tmp_path / "figure.png").size[0] > 500
    assert Image.open(tmp_path / "sheet.png").size == (2 * 28, 8)
    (runs[0] / "evaluation" / "a.png").unlink()
    assert not sheet(found, tmp_path / "sheet.png")


def test_what_cannot_be_compared(runs, tmp_path):
    with pytest.raises(ConfigError, match="two or more"):
        report(entries(runs[:1]))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="has no records to compare"):
        entries([*runs, tmp_path / "empty"])
