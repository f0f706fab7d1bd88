"""Captions of pictures in files: in tables of every kind, beside the pictures, several of one, and bad ones."""

import csv
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import main
from ldm.config.load import to_yaml
from ldm.data.dataset import Subset, columns
from ldm.data.sources.captions import CaptionTable, TextFiles
from ldm.data.sources.folder import ImageFolder
from ldm.errors import ConfigError, DataError
from tests.conftest import node

KINDS = ("jsonl", "csv", "tsv", "parquet")
ALIEN = [
    "\N{GRINNING FACE} a cat \N{WOMAN}\u200d\N{WOMAN}\u200d\N{GIRL}",
    "قطة على السجادة",
    "one\u2028line",
    'two\nlines, with "quotes"',
    "word " * 10_000 + "end",
    "\u0085x",
]


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in "abcdef":
        Image.new("RGB", (4, 4)).save(folder / f"{name}.png")
    return folder


def write(path: Path, rows: list[dict]) -> Path:
    """A table of rows with the same keys, in the format that its extension names."""
    kind = path.suffix
    if kind == ".jsonl":
        path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    elif kind == ".parquet":
        arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(arrow.Table.from_pylist(rows), path)
    else:
        with path.open("w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, list(rows[0]), delimiter="\t" if kind == ".tsv" else ",")
            table.writeheader()
            table.writerows(rows)
    return path


def rows_of(captions, key: str = "caption", name: str = "file_name") -> list[dict]:
    return [{name: f"{picture}.png", key: caption} for picture, caption in zip("abcdef", captions, strict=True)]


def said(pictures: Path, table: Path | CaptionTable) -> list:
    folder = ImageFolder(pictures, captions=table)
    return [folder[index]["caption"] for index in range(len(folder))]


@pytest.mark.parametrize("kind", KINDS)
def test_any_text_comes_back_as_it_was(pictures, tmp_path, kind):
    table = write(tmp_path / f"c.{kind}", rows_of(ALIEN))
    assert said(pictures, table) == ALIEN


@pytest.mark.parametrize("kind", KINDS)
def test_the_kind_of_table_does_not_matter(pictures, tmp_path, kind):
    first = ImageFolder(pictures, captions=write(tmp_path / "c.jsonl", rows_of(ALIEN)))
    same = ImageFolder(pictures, captions=write(tmp_path / f"d.{kind}", rows_of(ALIEN, "text", "path")))
    assert same.fingerprint() == first.fingerprint()
    assert same.captions_fingerprint() == first.captions_fingerprint()


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_several_captions_as_a_list(pictures, tmp_path, kind):
    lists = [["one", "two"], ["three"], ["", "five"], ["six"] * 3, ["7"], ["8", "9"]]
    assert said(pictures, write(tmp_path / f"c.{kind}", rows_of(lists))) == [
        one if len(one) > 1 else one[0] for one in lists
    ]


@pytest.mark.parametrize("kind", ["csv", "tsv", "parquet"])
def test_several_captions_in_several_rows(pictures, tmp_path, kind):
    table = write(tmp_path / f"c.{kind}", [*rows_of("123456"), *rows_of("abcdef")])
    assert said(pictures, table) == [[*"1a"], [*"2b"], [*"3c"], [*"4d"], [*"5e"], [*"6f"]]


@pytest.mark.parametrize("kind", KINDS)
def test_several_captions_in_several_columns_and_numbers(pictures, tmp_path, kind):
    short = enumerate(rows_of("abcdef", "short", "n"))
    rows = [{**row, "long": row["short"] * 2, "score": 0.5 * number} for number, row in short]
    table = CaptionTable(write(tmp_path / f"c.{kind}", rows[::-1]), "n", ["short", "long"], ["score"])
    folder = ImageFolder(pictures, captions=table)
    assert folder[1]["caption"] == ["b", "bb"]
    assert columns(folder)["score"].tolist() == [0, 0.5, 1, 1.5, 2, 2.5]
    assert columns(Subset(folder, [4, 1]))["score"].tolist() == [2, 0.5]
    assert columns(folder)["score"].dtype == np.float32
    without = ImageFolder(pictures, captions=CaptionTable(table.file, "n", ["short", "long"]))
    assert without.captions_fingerprint() == folder.captions_fingerprint()
    assert without.fingerprint() != folder.fingerprint()


def test_several_captions_change_the_fingerprints(pictures, tmp_path):
    found = set()
    for captions in (["a"] * 6, [["a"], *["a"] * 5], [["a", "b"], *["a"] * 5], [["b", "a"], *["a"] * 5]):
        folder = ImageFolder(pictures, captions=write(tmp_path / "c.jsonl", rows_of(captions)))
        found.add((folder.fingerprint(), folder.captions_fingerprint(), folder.pictures_fingerprint()))
    assert len(found) == len({one for _, one, _ in found}) == 3
    assert len({one for _, _, one in found}) == 1


def test_lines_of_a_text_file(pictures):
    for name in "abcdef":
        (pictures / f"{name}.txt").write_bytes(b"\xef\xbb\xbfone \r\n\r\n  two\n" if name != "b" else b"")
    assert ImageFolder(pictures)[0]["caption"] == "one \n\n  two", "a file is one caption unless lines are asked for"
    folder = ImageFolder(pictures, captions=TextFiles(lines=True))
    assert [folder[index]["caption"] for index in (0, 1)] == [["one", "two"], ""]
    assert folder.fingerprint() != ImageFolder(pictures).fingerprint()
    assert folder.captions_fingerprint() != ImageFolder(pictures).captions_fingerprint()
    (pictures / "c.txt").unlink()
    with pytest.raises(DataError, match=r"c\.png: has no caption \(c\.txt\)"):
        ImageFolder(pictures, captions=TextFiles())


@pytest.mark.parametrize("kind", KINDS)
def test_empty_captions_are_legal_and_counted(pictures, tmp_path, kind, caplog):
    table = write(tmp_path / f"c.{kind}", rows_of(["a", "", "c", "", "e", "f"]))
    assert said(pictures, table)[1] == ""
    assert caplog.messages == [f"{pictures}: 2 captions are empty (b.png)"]


def test_empty_text_files_are_counted(pictures, caplog):
    for name in "abcdef":
        (pictures / f"{name}.txt").write_text("" if name in "bd" else name)
    folder = ImageFolder(pictures)
    folder.prepare()
    folder.prepare()
    assert caplog.messages == [f"{pictures}: 2 captions are empty (b.txt)"]
    assert folder[1]["caption"] == ""


@pytest.mark.parametrize("kind", KINDS)
def test_captions_of_pictures_that_do_not_exist_are_counted(pictures, tmp_path, kind, caplog):
    more = [{"file_name": name, "caption": "x"} for name in ("gone.png", "../a.png", "/etc/passwd")]
    said(pictures, write(tmp_path / f"c.{kind}", [*rows_of("abcdef"), *more]))
    assert caplog.messages == [f"{pictures}: left out: captions of 3 images that do not exist (gone.png)"]


@pytest.mark.parametrize("kind", KINDS)
def test_names_are_brought_to_their_plain_form(pictures, tmp_path, kind):
    names = ["./a.png", "b.png", f"{pictures}/c.png", ".//d.png", "e.png", "f.png"]
    rows = [{"file_name": name, "caption": name[-5]} for name in names]
    assert said(pictures, write(tmp_path / f"c.{kind}", rows)) == [*"abcdef"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_column_is_named_with_those_that_exist_and_the_nearest(pictures, tmp_path, kind):
    table = write(tmp_path / f"c.{kind}", rows_of("abcdef", "captoin"))
    there = "but 'file_name', 'captoin'"
    with pytest.raises(DataError, match=f"no column 'caption' or 'text', {there}; did you mean 'captoin'"):
        ImageFolder(pictures, captions=table)
    with pytest.raises(DataError, match=rf"no column 'score', {there}; name the right one \(`columns`\)"):
        ImageFolder(pictures, captions=CaptionTable(table, captions="captoin", columns=["score"]))


@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_without_a_caption(pictures, tmp_path, kind):
    with pytest.raises(DataError, match=rf"f\.png: has no caption in .*c\.{kind}, like 1 of 6"):
        ImageFolder(pictures, captions=write(tmp_path / f"c.{kind}", rows_of("abcdef")[:5]))


@pytest.mark.parametrize("nothing", [None, []])
def test_a_row_without_a_caption(pictures, tmp_path, nothing):
    table = write(tmp_path / "c.jsonl", rows_of(["a", "b", nothing, "d", "e", "f"]))
    with pytest.raises(DataError, match=r"c\.jsonl:3: has no caption"):
        ImageFolder(pictures, captions=table)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        (b'{"file_name": "a.png", "caption": {"en": "a"}}', "expected a caption or a list of captions, found .*'en'"),
        (b'{"file_name": "a.png", "caption": ["a", true]}', "expected a caption or a list"),
        (b'{"file_name": "a.png", "caption": "\\ud800"}', "the caption is no text in Unicode"),
        (b'{"file_name": 3, "caption": "a"}', "expected the name of an image, found 3"),
        (b'["a.png", "a"]', r'expected \{"file_name": ..., "caption": ...\} in JSON, found'),
        (b'{"file_name": "a.png", "capt', r'expected \{"file_name": ..., "caption": ...\} in JSON, found'),
        (b"[" * 100_000, r'expected \{"file_name"'),
        (b'{"file_name": "a.png", "caption": "\xff"}', "is not UTF-8"),
    ],
)
def test_a_bad_line_of_json_is_named(pictures, tmp_path, line, complaint):
    good = [json.dumps(row).encode() for row in rows_of("abcdef")]
    (tmp_path / "c.jsonl").write_bytes(b"\n".join([good[0], b"", line, *good[1:]]))
    with pytest.raises(DataError, match=rf"c\.jsonl:3: {complaint}") as found:
        ImageFolder(pictures, captions=tmp_path / "c.jsonl")
    assert len(str(found.value)) < 400


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", r"has no column 'file_name' or 'path' or 'file', but none"),
        (b"file_name,caption\na.png,one, two\n", r"c\.csv:2: expected 2 values \(file_name, caption\), found 3"),
        (b'file_name,caption\na.png,"one\n', "cannot be read as a table"),
        (b"file_name,caption\na.png,caf\xe9\n", "is not UTF-8"),
        (b"\x80\x04\x95\0\0PK\x03\x04", "is not UTF-8"),
    ],
)
def test_a_bad_csv_is_named(pictures, tmp_path, content, complaint):
    (tmp_path / "c.csv").write_bytes(content)
    with pytest.raises(DataError, match=complaint):
        ImageFolder(pictures, captions=tmp_path / "c.csv")


@pytest.mark.parametrize("kind", KINDS)
def test_a_table_that_cannot_be_read(pictures, tmp_path, kind):
    with pytest.raises(DataError, match=rf"gone\.{kind}: cannot be read"):
        ImageFolder(pictures, captions=tmp_path / f"gone.{kind}")
    (tmp_path / f"folder.{kind}").mkdir()
    with pytest.raises(DataError, match=rf"folder\.{kind}: cannot be read"):
        ImageFolder(pictures, captions=tmp_path / f"folder.{kind}")


@pytest.mark.parametrize("kept", [0, 10, 0.5, 0.99])
def test_a_damaged_parquet(pictures, tmp_path, kept):
    path = write(tmp_path / "c.parquet", rows_of("abcdef"))
    content = path.read_bytes()
    path.write_bytes(content[: kept if isinstance(kept, int) else int(kept * len(content))])
    with pytest.raises(DataError, match=r"c\.parquet: cannot be read as parquet"):
        ImageFolder(pictures, captions=path)


def test_without_pyarrow(pictures, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=r"c\.parquet: needs the package pyarrow: pip install -e '\.\[sources\]'"):
        ImageFolder(pictures, captions=tmp_path / "c.parquet")


@pytest.mark.parametrize("value", ["high", "", None, "nan", [1, "x"], [], True])
def test_a_column_that_is_no_number(pictures, tmp_path, value):
    rows = [{**row, "score": 1.0} for row in rows_of("abcdef")]
    rows[2]["score"] = value
    with pytest.raises(DataError, match=r"c\.jsonl:3: score: expected a finite number"):
        ImageFolder(pictures, captions=CaptionTable(write(tmp_path / "c.jsonl", rows), columns=["score"]))


def test_columns_of_lists(pictures, tmp_path):
    rows = [{**row, "box": [1, 2.5, n]} for n, row in enumerate(rows_of("abcdef"))]
    table = CaptionTable(write(tmp_path / "c.jsonl", rows), columns=["box"])
    assert columns(ImageFolder(pictures, captions=table))["box"].shape == (6, 3)
    rows[3]["box"] = [1]
    write(table.file, rows)
    with pytest.raises(DataError, match=r"box: expected equally many numbers in each row"):
        ImageFolder(pictures, captions=table)


SOURCES = {
    "captions.CaptionTable": {"file": "t.csv", "image": "n", "captions": ["short"], "columns": ["score"]},
    "captions.TextFiles": {"lines": True},
    "table.ImageTable": {"file": "t.csv", "root": "pictures", "image": "n", "captions": "short", "classes": "kind"},
    "hugging_face.HuggingFaceImages": {"root": "hub", "image": "jpg", "captions": "short", "columns": ["score"]},
}


@pytest.mark.parametrize("name", SOURCES)
def test_each_is_named_in_a_configuration(name, autoencoder_tree, pictures, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = [{**row, "score": 1.5, "kind": "x"} for row in rows_of("abcdef", "short", "n")]
    write(tmp_path / "t.csv", rows)
    if name.startswith("hugging"):
        pytest.importorskip("datasets")
        (tmp_path / "hub").mkdir()
        found = [{**row, "jpg": (pictures / row["n"]).read_bytes()} for row in rows]
        write(tmp_path / "hub" / "train-0.parquet", found)
    for letter in "abcdef":
        (pictures / f"{letter}.txt").write_text(letter)
    source = node(f"ldm.data.sources.{name}", **SOURCES[name])
    if name.startswith("captions"):
        source = node("ldm.data.sources.folder.ImageFolder", root="pictures", captions=source)
    autoencoder_tree["data"]["params"] |= {"train": source, "num_validation": 2}
    (tmp_path / "c.yaml").write_text(to_yaml(autoencoder_tree))
    assert main.main(["--base", "c.yaml", "--dry-run"]) == 0, capsys.readouterr().err
    key = "data.params.train.params" + (".captions.params" if name.startswith("captions") else "")
    assert main.main(["--base", "c.yaml", "--dry-run", f"{key}.colums=3"]) == 2
    assert "colums" in capsys.readouterr().err
