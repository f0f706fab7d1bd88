"""Image files that a table names."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm.data.dataset import Subset, class_labels, columns, has_captions, sizes, texts
from ldm.data.held_out import hold_out
from ldm.data.sources.table import ImageTable
from ldm.errors import DataError
from tests.data.sources.test_captions import KINDS, write


@pytest.fixture
def rows(tmp_path):
    """12 pictures in folders that are no classes, and what a table says of them, in another order than theirs."""
    found = []
    for number in range(12):
        name = f"deep/{number % 5}/{number}.png"
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4 + number), (20 * number, 0, 0)).save(tmp_path / name)
        kind = ("dog", "cat 10", "cat 9")[number % 3]
        found.append({"file_name": name, "caption": f"number {number}", "kind": kind, "score": number / 2})
    return found[::-1]


@pytest.mark.parametrize("kind", KINDS)
def test_everything_comes_from_the_table(rows, tmp_path, kind):
    data = ImageTable(write(tmp_path / f"t.{kind}", rows), classes="kind", columns=["score"])
    assert len(data) == data.sizes().shape[0] == 12
    assert data.class_names == ["cat 9", "cat 10", "dog"]
    for index, row in enumerate(rows):
        item = data[index]
        assert item["image"].size == (4, 15 - index)
        assert data.class_names[item["class_label"]] == row["kind"]
        assert item["caption"] == row["caption"]
    assert columns(data)["score"].tolist() == [row["score"] for row in rows]
    assert sizes(data)[:, 0].tolist() == [*range(15, 3, -1)]
    part, rest = hold_out(data, 4)
    assert texts(part) is part
    assert sorted([*class_labels(part), *class_labels(rest)]) == sorted(data.class_labels())


@pytest.mark.parametrize("kind", KINDS)
def test_the_fingerprint_is_of_what_is_said_and_not_of_where(rows, tmp_path, kind):
    def of(table: Path, **options) -> str:
        return ImageTable(table, root=tmp_path, classes="kind", **options).fingerprint()

    first = of(write(tmp_path / f"a.{kind}", rows))
    (tmp_path / "moved").mkdir()
    absolute = [{**row, "file_name": str(tmp_path / row["file_name"])} for row in rows]
    assert of(write(tmp_path / "moved" / "b.jsonl", absolute)) == first
    others = [rows[::-1], [{**rows[0], "kind": "dog"}, *rows[1:]], [{**rows[0], "caption": "x"}, *rows[1:]], rows[1:]]
    found = {of(write(tmp_path / f"{number}.{kind}", other)) for number, other in enumerate(others)}
    assert len({*found, first, of(tmp_path / f"a.{kind}", columns=["score"])}) == 6
    Image.new("RGB", (4, 4), "blue").save(tmp_path / rows[-1]["file_name"])
    assert of(tmp_path / f"a.{kind}") != first


def test_captions_and_classes_may_be_left(rows, tmp_path):
    table = write(tmp_path / "t.jsonl", [{"file_name": row["file_name"]} for row in rows])
    for data in (ImageTable(table), ImageTable(write(tmp_path / "u.csv", rows), captions=False)):
        assert set(data[0]) == {"image"}
        assert not has_captions(data)
        assert data.num_classes is None
        assert texts(Subset(data, [1])) is None
    for captions in (True, "story"):
        with pytest.raises(DataError, match="has no column"):
            ImageTable(table, captions=captions)


@pytest.mark.parametrize("kind", KINDS)
def test_classes_that_are_numbers_are_labels(rows, tmp_path, kind):
    table = write(tmp_path / f"t.{kind}", [{**row, "kind": (3, 0, 11)[n % 3]} for n, row in enumerate(rows)])
    data = ImageTable(table, classes="kind")
    assert (data.num_classes, data.class_names) == (12, None)
    assert data.class_labels().tolist() == [3, 0, 11] * 4
    named = ImageTable(table, classes="kind", class_names=["11", "3", "0"])
    assert named.class_labels().tolist() == [1, 2, 0] * 4
    with pytest.raises(DataError, match=rf"t\.{kind}.*: class 11; expected 0 to 3"):
        ImageTable(table, classes="kind", class_names=["a", "b", "c", "d"])


@pytest.mark.parametrize("wrong", [None, "", True, 1.5, ["a"], -1])
def test_a_class_that_is_none(rows, tmp_path, wrong):
    rows[2]["kind"] = wrong
    if wrong == -1:
        rows = [{**row, "kind": -1 if row is rows[2] else 1} for row in rows]
    with pytest.raises(DataError, match=r"t\.jsonl:3: "):
        ImageTable(write(tmp_path / "t.jsonl", rows), classes="kind")


def test_a_class_that_is_not_named(rows, tmp_path):
    with pytest.raises(DataError, match=r"t\.jsonl:2: class 'cat 10' is not among `class_names` \(dog, cat 9\)"):
        ImageTable(write(tmp_path / "t.jsonl", rows), classes="kind", class_names=["dog", "cat 9"])


@pytest.mark.parametrize("name", ["../secret.png", "/etc/secret.png", "a/../../secret.png", ".."])
def test_files_outside_of_the_root_are_refused(rows, tmp_path, name):
    rows[3]["file_name"] = name
    with pytest.raises(DataError, match=r"t\.jsonl:4: .* is outside of .*set `root`"):
        ImageTable(write(tmp_path / "t.jsonl", rows))


def test_files_that_do_not_exist(rows, tmp_path, caplog):
    rows[3]["file_name"] = "gone.png"
    data = ImageTable(write(tmp_path / "t.jsonl", rows))
    assert caplog.messages == [f"{tmp_path}: 1 images of {tmp_path}/t.jsonl do not exist (gone.png)"]
    assert len(data) == 12
    assert data.sizes()[3].tolist() == [0, 0]
    with pytest.raises(DataError, match=r"gone\.png"):
        data[3]
    with pytest.raises(DataError, match=r"none of the 12 files that it names exists, such as .*; set `root`"):
        ImageTable(tmp_path / "t.jsonl", root=tmp_path / "deep")


def test_repeated_names(rows, tmp_path, caplog):
    again = [{**rows[0], "caption": "again"}]
    lines = ImageTable(write(tmp_path / "t.jsonl", [*rows, *again]))
    assert (len(lines), lines[0]["caption"]) == (12, "again")
    assert "left out: 1 lines of images that have another one further down (deep/1/11.png)" in caplog.text
    assert ImageTable(write(tmp_path / "t.csv", [*rows, *again]))[0]["caption"] == ["number 11", "again"]


def test_a_table_without_rows(tmp_path):
    (tmp_path / "t.csv").write_text("file_name\n")
    (tmp_path / "t.jsonl").write_text("\n")
    for name in ("t.csv", "t.jsonl"):
        with pytest.raises(DataError, match="holds 0 rows"):
            ImageTable(tmp_path / name)


def test_names_that_only_look_like_numbers(rows, tmp_path):
    """Some are: then all are names, in natural order."""
    table = write(tmp_path / "t.csv", [{**row, "kind": ("10", "9", "x")[n % 3]} for n, row in enumerate(rows)])
    assert ImageTable(table, classes="kind").class_names == ["9", "10", "x"]
    assert np.array_equal(ImageTable(table, classes="kind").class_labels(), [1, 0, 2] * 4)
    assert json.dumps(ImageTable(table)[0]["caption"])
