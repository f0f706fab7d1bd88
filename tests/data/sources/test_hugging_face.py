"""Data sets of Hugging Face on disk: both layouts, what they say, what they refuse; never a network."""

import io
import os
import shutil
import socket
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import DataLoader

from ldm.data import fingerprint
from ldm.data.dataset import Subset, columns, sizes, texts
from ldm.data.sources.hugging_face import HuggingFaceImages
from ldm.errors import ConfigError, DataError
from tests.data.sources.test_captions import ALIEN

datasets = pytest.importorskip("datasets")
NAMES = ["10", "9", "two words"]


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """In a folder of its own, without a network and without progress bars."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(socket.socket, "connect", None)
    monkeypatch.setattr(socket, "getaddrinfo", None)
    datasets.disable_progress_bars()


def encoded(image: Image.Image, kind: str = "PNG", **options) -> dict:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return {"bytes": file.getvalue(), "path": None}


def made(rows: int = 6, **changes):
    """A data set of the library: pictures of different sizes, classes, two captions each, numbers."""
    found = {
        "image": [encoded(Image.new("RGB", (4, 4 + row), (40 * row, 0, 0))) for row in range(rows)],
        "label": [row % 3 for row in range(rows)],
        "caption": [[ALIEN[row % 6], f"row {row}"] for row in range(rows)],
        "score": [row / 2 for row in range(rows)],
    } | changes
    types = {
        "image": datasets.Image(),
        "label": datasets.ClassLabel(names=NAMES),
        "caption": datasets.List(datasets.Value("string")),
        "score": datasets.Value("float32"),
    }
    kept = {name: values for name, values in found.items() if values is not None}
    inferred = datasets.Dataset.from_dict({name: values for name, values in kept.items() if name not in types})
    features = datasets.Features({name: types.get(name) or inferred.features[name] for name in kept})
    return datasets.Dataset.from_dict(kept, features=features)


def saved(data, kind: str = "arrow", name: str = "data", **options):
    if kind == "arrow":
        data.save_to_disk(name, **options)
    else:
        os.makedirs(f"{name}/data", exist_ok=True)
        data.to_parquet(f"{name}/data/train-00000-of-00001.parquet", **options)
    return name


@pytest.mark.parametrize("kind", ["arrow", "parquet"])
def test_everything_of_a_row(kind):
    data = HuggingFaceImages(saved(made(), kind), columns=["score"])
    assert (len(data), data.num_classes, data.class_names) == (6, 3, NAMES)
    for row in range(6):
        item = data[row]
        assert (item["image"].size, item["image"].getpixel((0, 0))) == ((4, 4 + row), (40 * row, 0, 0))
        assert item["class_label"] == row % 3
        assert item["caption"] == list(data.captions(row)) == [ALIEN[row], f"row {row}"]
    assert data.sizes().tolist() == [[4 + row, 4] for row in range(6)]
    assert columns(data)["score"].tolist() == [0, 0.5, 1, 1.5, 2, 2.5]
    part = Subset(data, [4, 1])
    assert texts(part) is part
    assert sizes(part).tolist() == [[8, 4], [5, 4]]
    assert data.path(3) == "data[3]"


def test_the_fingerprint_is_of_the_content_alone(tmp_path):
    def of(data, name: str, kind: str = "arrow", **options) -> tuple[str, str, str]:
        found = HuggingFaceImages(saved(data, kind, name, **options))
        return found.fingerprint(), found.captions_fingerprint(), found.pictures_fingerprint()

    first = of(made(), "first")
    assert of(made(), "elsewhere", num_shards=3) == first
    assert of(made(), "stored", "parquet") == first
    assert of(made(12).select([*range(11, 5, -1), *range(6)]).select(range(6, 12)), "chosen") == first
    repainted = made().to_dict()["image"]
    repainted[2] = encoded(Image.new("RGB", (4, 6), (79, 0, 0)))
    others = [
        of(made(image=repainted), "repainted"),
        of(made(label=[0, 1, 2, 0, 1, 1]), "relabeled"),
        of(made(5), "shorter"),
        of(made().select([1, 0, 2, 3, 4, 5]), "mixed"),
    ]
    assert len({pictures for _, _, pictures in [first, *others]}) == 5
    assert [captions == first[1] for _, captions, _ in others] == [True, True, False, False]
    whole, captions, pictures = of(made(caption=[["x"]] * 6), "retold")
    assert pictures == first[2]
    assert whole != first[0]
    assert captions != first[1]


@pytest.mark.parametrize("kind", ["arrow", "parquet"])
def test_files_are_read_again_only_if_they_change(kind, monkeypatch):
    monkeypatch.setattr(fingerprint, "_SETTLED", -(10**9))
    saved(made(), kind)
    first = HuggingFaceImages("data")
    found = first.fingerprint(), first.sizes().tolist()
    with monkeypatch.context() as patch:
        patch.setattr(HuggingFaceImages, "_read_samples", None)
        patch.setattr(HuggingFaceImages, "_read_sizes", None)
        again = HuggingFaceImages("data")
        assert (again.fingerprint(), again.sizes().tolist()) == found
    shutil.rmtree("data")
    saved(made().select([1, 0, 2, 3, 4, 5]), kind)
    other = HuggingFaceImages("data")
    assert other.fingerprint() != found[0]
    assert other.sizes()[0].tolist() == [5, 4]


def test_two_columns_of_pictures_are_not_mistaken_for_one_another(monkeypatch):
    monkeypatch.setattr(fingerprint, "_SETTLED", -(10**9))
    data = made(edges=made().to_dict()["image"][::-1])
    saved(data.cast_column("edges", datasets.Image()))
    first, second = (HuggingFaceImages("data", image=column) for column in ("image", "edges"))
    assert first.sizes().tolist() == second.sizes().tolist()[::-1]
    assert first.pictures_fingerprint() != second.pictures_fingerprint()


def test_pictures_are_decoded_as_files_are():
    wide = Image.fromarray(np.full((4, 4), 4095, dtype=np.uint16))
    exif = Image.Exif()
    exif[0x0112] = 6
    pictures = [
        encoded(Image.new("RGBA", (4, 4), (1, 2, 3, 0))),
        encoded(wide),
        encoded(Image.new("RGB", (4, 8)), "JPEG", exif=exif),
        {"bytes": b"no picture", "path": "x.png"},
        encoded(Image.new("L", (300, 300))),
        {"bytes": b"", "path": None},
    ]
    data = HuggingFaceImages(saved(made(image=pictures)), value_range=[0, 4095], max_pixels=80_000)
    assert data[0]["image"].mode == "RGBA"
    assert data[1]["image"].getpixel((0, 0)) == 255
    assert data[2]["image"].size == (8, 4)
    for row, complaint in ((3, "cannot be read as an image"), (4, "300 x 300 pixels"), (5, "cannot be read")):
        with pytest.raises(DataError, match=rf"data\[{row}\]: {complaint}"):
            data[row]
    assert data.sizes().tolist() == [[4, 4], [4, 4], [4, 8], [0, 0], [0, 0], [0, 0]]
    assert data.decoding() == {"value_range": [0, 4095]}


def test_columns_of_other_names_and_types():
    pixels = [one["bytes"] for one in made().with_format("arrow")[:]["image"].to_pylist()]
    rows = {"jpg": pixels, "short": ["a"] * 6, "long": ["b"] * 6}
    rows |= {"kind": ["x", "y10", "y9"] * 2, "number": [7, 0, 1] * 2}
    saved(made(image=None, label=None, caption=None, score=None, **rows), "parquet")
    data = HuggingFaceImages("data", image="jpg", captions=["short", "long"], classes="kind")
    assert data[0]["caption"] == ["a", "b"]
    assert data.class_names == ["x", "y9", "y10"]
    assert data.class_labels().tolist() == [0, 2, 1] * 2
    assert data[5]["image"].size == (4, 9)
    numbers = HuggingFaceImages("data", image="jpg", captions="short", classes="number")
    assert (numbers.num_classes, numbers.class_names, numbers[0]["caption"]) == (8, None, "a")
    bare = HuggingFaceImages("data", image="jpg")
    assert set(bare[0]) == {"image"}
    assert (texts(bare), bare.num_classes) == (None, None)


def test_names_of_classes_may_be_numbers_of_others():
    data = made().cast_column("label", datasets.ClassLabel(names=["2", "0", "1"]))
    assert HuggingFaceImages(saved(data)).class_labels().tolist() == [0, 1, 2] * 2


def test_classes_and_captions_can_be_left(caplog):
    saved(made())
    assert set(HuggingFaceImages("data", captions=False, classes=False)[0]) == {"image"}
    assert not caplog.messages


def test_splits():
    datasets.DatasetDict({"train": made(), "test": made(3)}).save_to_disk("dict")
    assert len(HuggingFaceImages("dict", split="test")) == 3
    for split, said in ((None, "is missing"), ("valid", "is none of them")):
        with pytest.raises(DataError, match=rf"dict: has the splits test, train; `split` \({split!r}\) {said}"):
            HuggingFaceImages("dict", split=split)
    saved(made(), "parquet", "hub")
    made(2).to_parquet("hub/data/test-00000-of-00001.parquet")
    assert len(HuggingFaceImages("hub", split="test")) == 2
    with pytest.raises(DataError, match="hub: has the splits test, train"):
        HuggingFaceImages("hub")
    assert len(HuggingFaceImages("hub/data/test-00000-of-00001.parquet")) == 2


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_loader_workers_see_the_same(context):
    data = HuggingFaceImages(saved(made()))
    data[0]
    loader = DataLoader(data, batch_size=None, num_workers=2, multiprocessing_context=context)
    assert [item["image"].getpixel((0, 0))[0] for item in loader] == [40 * row for row in range(6)]


@pytest.mark.parametrize(
    ("change", "options", "complaint"),
    [
        ({}, {"captions": "captoin"}, "no column 'captoin', but 'image', .*did you mean 'caption'"),
        ({}, {"columns": ["scores"]}, r"no column 'scores', .*did you mean 'score'.*\(`columns`\)"),
        ({}, {"columns": ["caption"]}, r"data\[0\]: caption: expected a finite number"),
        ({}, {"image": "picture"}, "no column 'picture'"),
        ({"image": None, "score": [1.0]}, {}, r"has 0 columns of the type Image among .*\(`image`\)"),
        ({"caption": None}, {"captions": True}, "no column 'caption' or 'text'"),
        ({"caption": [["a"]] * 5 + [None]}, {}, r"data\[5\]: has no caption"),
        ({"caption": [["a"]] * 5 + [[]]}, {}, r"data\[5\]: has no caption"),
        ({"label": [0, 1, -1, 0, 1, 2]}, {}, r"data\[2\]: class -1; expected 0 to 2"),
        ({"label": [0, 1, None, 0, 1, 2]}, {}, r"data\[2\]: class None; expected 0 to 2"),
        ({"score": [0, 1, None, 0, 1, 2]}, {"columns": ["score"]}, r"data\[2\]: score: expected a finite number"),
        ({"image": [{"bytes": None, "path": __file__}] * 6}, {}, r"data\[0\]: holds no picture in 'image'"),
    ],
)
def test_what_is_missing_is_named(change, options, complaint, monkeypatch):
    rows = len(change.get("score") or range(6))
    data = made(rows, **change)
    monkeypatch.setattr(datasets.Image, "embed_storage", lambda self, storage, **options: storage)
    saved(data)
    with pytest.raises(DataError, match=complaint):
        HuggingFaceImages("data", **options)


def test_empty_captions_are_counted(caplog):
    data = HuggingFaceImages(saved(made(caption=[["", "a"], *[["b"]] * 4, [""]])))
    assert caplog.messages == ["data: 2 captions are empty (data[0])"]
    assert data[5]["caption"] == ""


def damaged(path: str, kept: float) -> None:
    with open(path, "rb+") as file:
        file.truncate(int(kept * os.path.getsize(path)))


@pytest.mark.parametrize("kept", [0, 0.3, 0.9])
@pytest.mark.parametrize("file", ["state.json", "dataset_info.json", "data-00000-of-00001.arrow"])
def test_damaged_files(file, kept):
    saved(made())
    damaged(f"data/{file}", kept)
    with pytest.raises(DataError, match="data: cannot be read as a data set") as found:
        HuggingFaceImages("data")
    assert len(str(found.value)) < 400


def test_parquet_files_of_the_hubs_own_conversions():
    """Numbers in a folder of the split's name."""
    for split, rows in (("train", 3), ("test", 2)):
        folder = Path("hub/default") / split
        folder.mkdir(parents=True)
        for part in range(2):
            made(rows).to_parquet(str(folder / f"{part:04}.parquet"))
    assert len(HuggingFaceImages("hub", split="train")) == 6
    assert len(HuggingFaceImages("hub/default/test")) == 4
    with pytest.raises(DataError, match="has the splits test, train"):
        HuggingFaceImages("hub")


@pytest.mark.parametrize("kept", [0, 0.3, 0.9])
def test_damaged_parquet(kept):
    saved(made(), "parquet")
    damaged("data/data/train-00000-of-00001.parquet", kept)
    with pytest.raises(DataError, match="data: cannot be read as a data set"):
        HuggingFaceImages("data")


def test_what_is_no_data_set(tmp_path):
    os.mkdir("nothing")
    for name, complaint in (("gone", "no such data set"), ("nothing", "neither state.json.* nor parquet files")):
        with pytest.raises(DataError, match=f"{name}: .*{complaint}"):
            HuggingFaceImages(name)
    saved(made().select([]))
    with pytest.raises(DataError, match="data: cannot be read as a data set"):
        HuggingFaceImages("data")
    saved(made().select([]), "parquet", "hub")
    with pytest.raises(DataError, match="hub: "):
        HuggingFaceImages("hub")


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"data: needs the package datasets: pip install -e '\.\[sources\]'"):
        HuggingFaceImages("data")
