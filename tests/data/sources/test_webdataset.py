"""Pictures in tars: the same items as tarfile finds, addressed by number, and what is odd is named or counted."""

import io
import json
import logging
import os
import pickle
import random
import tarfile
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import DataLoader

from ldm.data.dataset import Channeled, Labeled, Sized, Subset, Tabular, Texts, has_captions
from ldm.data.sources import tar_index
from ldm.data.sources.webdataset import WebDataset
from ldm.errors import ConfigError, DataError, ResourceError
from tests.tars import png, write_tar


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def items(numbers, **texts) -> dict[str, bytes]:
    """`0001.png` and its text files, each made by a function of the number."""
    files = {}
    for number in numbers:
        files[f"{number:04}.png"] = png(number, height=4, width=5 + number % 3)
        files |= {f"{number:04}.{ending}": make(number).encode() for ending, make in texts.items()}
    return files


def captioned(numbers) -> dict[str, bytes]:
    return items(numbers, txt=lambda n: f"picture {n}\n", cls=lambda n: str(n % 3))


def test_items_are_those_that_tarfile_finds(here):
    for shard in range(3):
        write_tar(here / f"{shard:03}.tar", captioned(range(4 * shard, 4 * shard + 4)))
    dataset = WebDataset(f"{here}/{{000..002}}.tar")
    assert len(dataset) == 12
    assert dataset.num_classes == 3
    numbers = list(range(12))
    random.Random(0).shuffle(numbers)
    for number in numbers:
        item = dataset[number]
        with tarfile.open(here / f"{number // 4:03}.tar") as archive:
            expected = Image.open(archive.extractfile(f"{number:04}.png")).convert("RGB")
        assert np.array_equal(np.asarray(item["image"]), np.asarray(expected))
        assert item["caption"] == f"picture {number}"
        assert item["class_label"] == number % 3
        assert dataset.path(number) == f"{here}/{number // 4:03}.tar:{number:04}"
        assert dataset.sizes()[number].tolist() == [4, 5 + number % 3]
        assert dataset.captions(number) == [f"picture {number}"]


def test_it_is_what_a_data_set_may_be(here):
    write_tar(here / "a.tar", captioned(range(5)))
    dataset = WebDataset("a.tar")
    assert all(isinstance(dataset, protocol) for protocol in (Texts, Sized, Tabular, Labeled, Channeled))
    assert has_captions(dataset)
    assert dataset.columns() == {}
    assert Subset(dataset, [3])[0]["caption"] == "picture 3"
    assert dataset.class_labels().tolist() == [0, 1, 2, 0, 1]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_format_of_tar_is_read(here, form):
    folder = "" if form == tarfile.USTAR_FORMAT else "long" * 60 + "/"
    names = [f"./{folder}x", f"{folder}y/x", f"{folder}übung ☂"]
    files = {f"{name}.{ending}": png(1) if ending == "png" else b"text" for name in names for ending in ("png", "txt")}
    dataset = WebDataset(str(write_tar(here / "a.tar", files, form)))
    assert [dataset.path(row).partition(".tar:")[2] for row in range(3)] == [name.removeprefix("./") for name in names]
    assert [dataset[row]["caption"] for row in range(3)] == ["text"] * 3


def test_a_name_that_is_not_utf8_is_a_name(here):
    name = os.fsdecode(b"caf\xe9.png")
    dataset = WebDataset(str(write_tar(here / "a.tar", {name: png()}, tarfile.GNU_FORMAT)))
    assert dataset.path(0).endswith("caf\udce9")
    assert dataset[0]["image"].size == (6, 4)
    assert dataset.fingerprint()


def test_captions_classes_and_numbers_of_json(here):
    entries = [
        {"caption": ["a", " b "], "kind": "dog", "score": 5, "point": [1, 2]},
        {"caption": "c", "kind": "cat", "score": 0.5, "point": [3, 4.5]},
    ]
    files = items(range(2), json=lambda n: json.dumps(entries[n]))
    write_tar(here / "a.tar", files)
    dataset = WebDataset("a.tar", captions="caption", classes="kind", columns=["score", "point"])
    assert [dataset[row].get("caption") for row in range(2)] == [["a", "b"], "c"]
    assert dataset.class_names == ["cat", "dog"]
    assert dataset.class_labels().tolist() == [1, 0]
    assert dataset.columns()["score"].tolist() == [5, 0.5]
    assert dataset.columns()["point"].tolist() == [[1, 2], [3, 4.5]]
    assert dataset.columns()["point"].dtype == np.float32
    assert WebDataset("a.tar", classes="kind", class_names=["dog", "cat", "owl"]).class_labels().tolist() == [0, 1]


def test_what_lacks_something_is_counted_in_one_line(here, caplog):
    files = items(range(6), json=lambda n: json.dumps({"caption": f"c{n}", "score": n}))
    files |= {"0001.json": b"{", "0002.json": b'{"score": 1}', "0003.json": b'{"caption": "c", "score": "high"}'}
    del files["0004.png"], files["0005.json"]
    files |= {"notes.xml": b"<a/>", "._0000.png": b"of a Mac", "0000.seg.png": png()}
    write_tar(here / "a.tar", files)
    with caplog.at_level(logging.WARNING):
        dataset = WebDataset("a.tar", captions="caption", columns=["score"])
    assert len(dataset) == 1
    assert dataset[0]["caption"] == "c0"
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith(f"{here}/a.tar: left out: ")
    for part in [
        "1 items without a picture (0004)",
        "1 pictures without a .json (0005)",
        "1 pictures whose .json cannot be read (0001)",
        "1 pictures whose .json has no usable 'caption' (0002)",
        "1 pictures whose .json has no usable 'score' (0003)",
        "1 .xml",
        "1 .seg.png",
        "1 hidden",
    ]:
        assert part in message


def test_an_orientation_far_behind_the_pixels_of_a_png(here):
    """Beyond what the index reads of each picture."""
    exif, buffer = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    pixels = np.random.default_rng(0).integers(0, 256, (120, 160, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "png", exif=exif)
    content = buffer.getvalue()
    place = content.index(b"eXIf") - 4
    length = int.from_bytes(content[place : place + 4], "big") + 12
    chunk, rest = content[place : place + length], content[:place] + content[place + length :]
    late = rest[:-12] + chunk + rest[-12:]
    assert len(late) > 1 << 15
    write_tar(here / "0.tar", {"a.png": late, "b.png": png(0, 100, 120), "c.png": late[:40_000]})
    dataset = WebDataset(f"{here}/0.tar")
    assert dataset.sizes().tolist()[:2] == [[160, 120], [100, 120]]
    assert dataset[0]["image"].size == (120, 160)


def test_the_picture_of_an_item_is_chosen_by_its_ending(here):
    write_tar(here / "a.tar", {"1.png": png(1, 2, 2), "1.seg.png": png(2, 3, 3)})
    assert WebDataset("a.tar")[0]["image"].size == (2, 2)
    assert WebDataset("a.tar", image="seg.png")[0]["image"].size == (3, 3)


def test_captions_that_only_some_have(here, caplog):
    files = captioned(range(4))
    del files["0002.txt"]
    write_tar(here / "a.tar", files)
    with caplog.at_level(logging.WARNING):
        assert not WebDataset("a.tar").has_captions()
    assert "1 of 4 items have no .txt, so there are no captions" in caplog.text
    dataset = WebDataset("a.tar", captions=True)
    assert [dataset[row]["caption"] for row in range(3)] == ["picture 0", "picture 1", "picture 3"]
    assert "1 pictures without a caption (.txt) (0002)" in caplog.text
    assert "caption" not in WebDataset("a.tar", captions=False)[0]


@pytest.mark.parametrize("text", ["", " ", "🦄 ציפור", "word " * 10_000])
def test_captions_of_any_kind(here, text):
    write_tar(here / "a.tar", items(range(2), txt=lambda n: text))
    assert WebDataset("a.tar")[1]["caption"] == text.strip()


def test_a_caption_that_is_not_utf8_names_its_item(here):
    write_tar(here / "a.tar", {"1.png": png(), "1.txt": b"caf\xe9", "2.png": png(), "2.txt": b"good"})
    dataset = WebDataset("a.tar")
    with pytest.raises(DataError, match=r"a\.tar:1: its caption cannot be read .*utf-8"):
        dataset[0]
    assert dataset[1]["caption"] == "good"
    assert dataset.captions_fingerprint()


def test_all_texts_after_all_pictures_and_files_that_come_again(here, caplog):
    pictures, texts = items(range(3)), {f"{n:04}.txt": b"old" for n in range(3)}
    again = [("0001.txt", b"new"), ("0000.png", png(9, 7, 7))]
    write_tar(here / "a.tar", [*pictures.items(), *texts.items(), *again])
    with caplog.at_level(logging.WARNING):
        dataset = WebDataset("a.tar")
    assert [dataset[row]["caption"] for row in range(3)] == ["old", "new", "old"]
    assert dataset[0]["image"].size == (7, 7)
    assert "2 files come again further down" in caplog.text


def test_the_fingerprint_covers_contents_and_not_places(here):
    write_tar(here / "a.tar", captioned(range(4)))
    one = WebDataset("a.tar")
    write_tar(here / "b" / "0.tar", captioned(range(2)))
    write_tar(here / "b" / "1.tar", captioned(range(2, 4)))
    other = WebDataset("b/*.tar", index="other")
    assert one.fingerprint() == other.fingerprint()
    assert one.captions_fingerprint() == other.captions_fingerprint()
    assert WebDataset(["b/1.tar", "b/0.tar"]).fingerprint() != one.fingerprint()

    files = captioned(range(4))
    write_tar(here / "c.tar", {**files, "0001.txt": b"another"})
    captions = WebDataset("c.tar")
    assert captions.fingerprint() != one.fingerprint()
    assert captions.captions_fingerprint() != one.captions_fingerprint()
    assert captions.pictures_fingerprint() == one.pictures_fingerprint()

    write_tar(here / "d.tar", {**files, "0001.png": png(77, 4, 6)})
    pictures = WebDataset("d.tar")
    assert pictures.pictures_fingerprint() != one.pictures_fingerprint()
    assert pictures.captions_fingerprint() == one.captions_fingerprint()
    assert pictures.fingerprint().partition(":")[0] == one.fingerprint().partition(":")[0]  # names, sizes, labels


def test_an_index_is_used_again_and_made_anew_when_the_tar_changes(here, monkeypatch):
    tar = write_tar(here / "a.tar", captioned(range(4)))
    WebDataset("a.tar")
    built = []
    build = tar_index.build
    monkeypatch.setattr(tar_index, "build", lambda *args: (built.append(args[1].location), build(*args)))
    WebDataset("a.tar", captions=False)
    assert built == []
    write_tar(tar, captioned(range(5)))
    assert len(WebDataset("a.tar")) == 5
    (place,) = (here / "cache" / ".shards").glob("*.index")
    whole = place.read_bytes()
    for damaged in (b"", whole[:100], whole[:-1], whole.replace(whole[300:310], bytes(10))):
        place.write_bytes(damaged)
        assert len(WebDataset("a.tar")) == 5
    assert len(built) == 5


def test_an_interrupted_start_keeps_the_indexes_that_are_done(here, monkeypatch):
    for shard in range(3):
        write_tar(here / f"{shard}.tar", captioned(range(2)))
    build = tar_index.build
    built = []

    def stops(place, shard, *args):
        if len(built) == 2:
            raise KeyboardInterrupt
        built.append(shard.location)
        build(place, shard, *args)

    monkeypatch.setattr(tar_index, "build", stops)
    with pytest.raises(KeyboardInterrupt):
        WebDataset("*.tar")
    built.clear()
    assert len(WebDataset("*.tar")) == 6
    assert built == [f"{here}/2.tar"]


def opened(shards: str) -> int:
    return len(WebDataset(shards))


def test_several_processes_index_at_once(here):
    for shard in range(6):
        write_tar(here / f"{shard}.tar", captioned(range(50)))
    with ProcessPoolExecutor(3) as pool:
        assert list(pool.map(opened, [f"{here}/*.tar"] * 3)) == [300] * 3
    assert len(list((here / "cache" / ".shards").glob("*.index"))) == 6
    assert not list((here / "cache" / ".shards").glob("*.tmp.*"))


def test_loader_workers_read_what_the_main_process_reads(here):
    for shard in range(3):
        write_tar(here / f"{shard}.tar", captioned(range(10 * shard, 10 * shard + 10)))
    dataset = WebDataset("*.tar")
    expected = [np.asarray(dataset[row]["image"]).sum() for row in range(30)]
    loader = DataLoader(dataset, batch_size=5, num_workers=2, collate_fn=list, multiprocessing_context="fork")
    assert [np.asarray(item["image"]).sum() for batch in loader for item in batch] == expected
    sent = pickle.loads(pickle.dumps(dataset))  # as to a spawned worker
    assert [np.asarray(sent[row]["image"]).sum() for row in range(30)] == expected


def test_few_files_are_open_at_once(here):
    for shard in range(40):
        write_tar(here / f"{shard}.tar", captioned(range(2)))
    dataset = WebDataset("*.tar")
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    for row in range(len(dataset)):
        dataset[row]
    if before:
        assert len(os.listdir("/proc/self/fd")) - before <= 64
    assert len(pickle.dumps(dataset)) < 200_000


def test_a_broken_picture_breaks_its_item_alone(here):
    write_tar(here / "a.tar", {"1.png": png()[:30], "2.png": png(), "3.png": b""})
    dataset = WebDataset("a.tar")
    for row in (0, 2):
        with pytest.raises(DataError, match=rf"a\.tar:{row + 1}: cannot be read as an image"):
            dataset[row]
    assert dataset[1]["image"].size == (6, 4)
    assert dataset.sizes().tolist()[1] == [4, 6]
    assert dataset.sizes().tolist()[2] == [0, 0]


def test_a_tar_that_changes_while_it_is_in_use_stops_the_run(here):
    tar = write_tar(here / "a.tar", captioned(range(4)))
    dataset = WebDataset("a.tar")
    write_tar(here / "other", captioned(range(1, 5))).replace(tar)
    with pytest.raises(ResourceError, match=r"a\.tar: was changed or removed while it was in use"):
        dataset[1]
    tar.unlink()
    with pytest.raises(ResourceError, match=r"a\.tar: cannot be read: No such file"):
        WebDataset.__getitem__(pickle.loads(pickle.dumps(dataset)), 1)


def test_a_flipped_bit_breaks_its_item_alone(here):
    tar = write_tar(here / "a.tar", captioned(range(4)))
    dataset = WebDataset("a.tar")
    state = tar.stat()
    whole = bytearray(tar.read_bytes())
    whole[600] ^= 1  # in the first picture, which begins at 512
    tar.write_bytes(whole)
    os.utime(tar, ns=(state.st_atime_ns, state.st_mtime_ns))
    with pytest.raises(DataError, match=r"a\.tar:0000: its bytes are not those that were there"):
        dataset[0]
    assert dataset[1]["caption"] == "picture 1"


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"shards": []}, "names no file"),
        ({"shards": "{a.tar"}, r"\{a\.tar: no such shard"),
        ({"shards": "{3..1}.tar"}, r"expected a range such as \{000\.\.099\}"),
        ({"shards": "none/*.tar"}, r"none/\*\.tar: no such shard"),
        ({"shards": ["a.tar", "a.tar"]}, r"a\.tar: is named twice"),
        ({"shards": ["a.tar", "https://host/a.tar"]}, "mixes paths and URLs"),
        ({"shards": "https://host/a.tar"}, "need a `store`"),
        ({"shards": "."}, "expected a file, found a folder"),
        (
            {"shards": "a.tar", "image": "jpg"},
            r"0 items in 1 shards.*4 items without a picture.*expected pictures \(\.jpg\)",
        ),
        ({"shards": "a.tar", "classes": "kind"}, r"0 items.*4 pictures without a \.json"),
        ({"shards": "a.tar", "class_names": ["x"]}, r"a\.tar:0001: class 1; expected 0 to 0"),
        ({"shards": "a.tar", "value_range": [2, 1]}, "value_range"),
    ],
)
def test_what_cannot_be_is_one_message(here, params, message):
    write_tar(here / "a.tar", captioned(range(4)))
    with pytest.raises((ConfigError, DataError), match=message):
        WebDataset(**params)


def test_classes_that_are_not_among_the_names(here):
    write_tar(here / "a.tar", items(range(2), cls=lambda n: ("cat", "dog")[n]))
    assert WebDataset("a.tar").class_names == ["cat", "dog"]
    with pytest.raises(DataError, match="class 'dog' is not among `class_names`"):
        WebDataset("a.tar", class_names=["cat"])


def test_a_full_disk_under_the_index(here, monkeypatch):
    write_tar(here / "a.tar", captioned(range(4)))
    (here / "file").write_text("")
    with pytest.raises(ResourceError, match=r"file: cannot keep indexes of shards there"):
        WebDataset("a.tar", index="file")
