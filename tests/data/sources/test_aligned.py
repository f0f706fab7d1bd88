"""What lies on the pictures of a folder or table, from files of the same name in other folders."""

import json

import numpy as np
import pytest
from PIL import Image

from ldm.config import check
from ldm.config.load import build
from ldm.config.tree import from_plain
from ldm.data.dataset import Subset, aligned_keys, box_classes, map_classes, texts, without_captions
from ldm.data.decoding import read_indices
from ldm.data.sources.folder import ImageFolder
from ldm.data.sources.maps import MapFiles, class_names
from ldm.data.sources.masks import MaskFiles
from ldm.data.sources.pairs import PairFiles
from ldm.data.sources.table import ImageTable
from ldm.errors import ConfigError, DataError
from ldm.sizes import same_proportions
from tests.pngs import gray_png

NAMES = ("a/1", "a/2", "b/1")


@pytest.fixture
def folders(tmp_path):
    """Three pictures of 6 x 4 in two classes with captions; their maps, masks and second pictures."""
    for number, name in enumerate(NAMES):
        for kind in ("pictures", "maps", "masks", "pairs"):
            (tmp_path / kind / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (6, 4), (number, 0, 0)).save(tmp_path / f"pictures/{name}.jpg")
        (tmp_path / f"pictures/{name}.txt").write_text(f"picture {number}")
        Image.fromarray(numbers(number)).save(tmp_path / f"maps/{name}.png")
        mask = np.zeros((4, 6), np.uint8)
        mask[number, :3] = 255
        Image.fromarray(mask).save(tmp_path / f"masks/{name}.png")
        Image.new("L", (12, 8), number).save(tmp_path / f"pairs/{name}.webp", lossless=True)
    return tmp_path


def numbers(shift: int = 0) -> np.ndarray:
    return ((np.arange(24).reshape(4, 6) + shift) % 3).astype(np.uint8)


def folder(root, **aligned) -> ImageFolder:
    return ImageFolder(root / "pictures", aligned=aligned)


def test_a_picture_comes_with_all_that_lies_on_it(folders):
    data = folder(
        folders,
        pair=PairFiles(folders / "pairs"),
        mask=MaskFiles(folders / "masks"),
        map=MapFiles(folders / "maps", ["sky", "sea", "land"]),
    )
    assert aligned_keys(data) == ["map", "mask", "pair"]
    assert map_classes(data) == ["sky", "sea", "land"]
    assert box_classes(data) is None
    for index in range(3):
        item = Subset(data, [index])[0]
        assert item["caption"] == f"picture {index}"
        assert item["class_label"] == index // 2
        assert item["map"].dtype == item["mask"].dtype == np.uint8
        assert item["map"].tolist() == numbers(index).tolist()
        assert np.argwhere(item["mask"] == 255).tolist() == [[index, column] for column in range(3)]
        assert item["pair"].size == (12, 8)
        assert "map" in without_captions(data, index)
    assert texts(data) is data


def test_a_table_has_them_too(folders):
    (folders / "list.csv").write_text("file_name,caption\nb/1.jpg,one\n")
    masks = MaskFiles(folders / "masks")
    data = ImageTable(folders / "list.csv", folders / "pictures", aligned={"mask": masks})
    assert np.argwhere(data[0]["mask"])[0].tolist() == [2, 0]


def test_palettes_and_gray_values_are_numbers(tmp_path):
    expected = numbers()
    for bits in (1, 2, 4, 8):
        palette = Image.fromarray(expected % min(2**bits, 3)).convert("P")
        palette.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
        palette.putdata((expected % min(2**bits, 3)).ravel().tolist())
        palette.save(tmp_path / "palette.png", bits=bits)
        assert (read_indices(tmp_path / "palette.png") == expected % min(2**bits, 3)).all()
        (tmp_path / "gray.png").write_bytes(gray_png(expected % min(2**bits, 3), bits))
        assert (read_indices(tmp_path / "gray.png") == expected % min(2**bits, 3)).all(), bits
    wide = expected.astype(np.uint16) * 30_000
    Image.fromarray(wide).save(tmp_path / "wide.png")
    assert (read_indices(tmp_path / "wide.png") == wide).all()


def test_a_number_may_be_reduced_or_mean_no_class(folders):
    reduced = folder(folders, map=MapFiles(folders / "maps", ["sea", "land"], reduce=1))[0]["map"]
    assert reduced.dtype == np.uint8
    assert reduced.tolist() == np.where(numbers() == 0, 255, numbers().astype(int) - 1).tolist()
    left_out = folder(folders, map=MapFiles(folders / "maps", ["sky", "sea"], unlabeled=[2]))[0]["map"]
    assert left_out.tolist() == np.where(numbers() == 2, 255, numbers()).tolist()


def test_many_classes_are_16_bits(folders):
    many = np.full((4, 6), 299, np.uint16)
    many[0] = [0, 255, 256, 65535, 1, 2]
    for name in NAMES:
        Image.fromarray(many).save(folders / f"maps/{name}.png")
    found = folder(folders, map=MapFiles(folders / "maps", [f"class {n}" for n in range(300)]))[0]["map"]
    assert found.dtype == np.int16
    assert found[0].tolist() == [0, 255, 256, -1, 1, 2]
    assert found[1, 0] == 299


def test_names_of_classes_from_a_file(tmp_path):
    (tmp_path / "names.txt").write_text("sky\n deep sea \n\n")
    (tmp_path / "names.json").write_text(json.dumps(["sky", "deep sea"]))
    assert class_names(tmp_path / "names.txt") == class_names(str(tmp_path / "names.json")) == ["sky", "deep sea"]
    for content, message in (("[1]", "expected a list of names"), ("[", "cannot be read"), ("{}", "expected a list")):
        (tmp_path / "names.json").write_text(content)
        with pytest.raises(DataError, match=rf"names\.json: {message}"):
            class_names(tmp_path / "names.json")
    for name, content in (("gap.json", '["sky", "", "car"]'), ("gap.txt", "sky\n\ncar\n")):
        (tmp_path / name).write_text(content)
        with pytest.raises(DataError, match="the name of class 1 is empty"):
            class_names(tmp_path / name)
    with pytest.raises(DataError, match=r"absent\.txt: cannot be read"):
        class_names(tmp_path / "absent.txt")
    with pytest.raises(ConfigError, match=r"aligned\.map: classes: expected 1 to 32767 names of classes, found 0"):
        MapFiles(tmp_path, [])


def test_an_unknown_class_in_a_map(folders):
    data = folder(folders, map=MapFiles(folders / "maps", ["sky", "sea"]))
    with pytest.raises(
        DataError, match=r"maps/a/1\.png: 8 pixels .* row 0, column 2, has the number 2; expected 0 to 1"
    ):
        data[0]


def test_colors_are_no_classes(folders):
    Image.new("RGB", (6, 4)).save(folders / "maps/a/1.png")
    data = folder(folders, map=MapFiles(folders / "maps", ["sky"]))
    with pytest.raises(DataError, match=r"maps/a/1\.png: expected a PNG of numbers, .* found mode 'RGB'"):
        data[0]


@pytest.mark.parametrize("kind", ["map", "mask"])
def test_another_size_than_that_of_the_picture(folders, kind):
    source = {"map": MapFiles(folders / "maps", ["a", "b", "c"]), "mask": MaskFiles(folders / "masks")}[kind]
    Image.new("L", (4, 6), 1).save(folders / f"{kind}s/a/2.png")
    data = folder(folders, **{kind: source})
    data[0]
    with pytest.raises(DataError, match=rf"{kind}s/a/2\.png: a {kind} of 4 x 6 pixels; expected 6 x 4"):
        data[1]


def test_a_mask_without_a_hole(folders):
    Image.new("1", (6, 4), 0).save(folders / "masks/a/1.png")
    with pytest.raises(DataError, match=r"masks/a/1\.png: .* black all over, .* `invert: true`"):
        folder(folders, mask=MaskFiles(folders / "masks"))[0]
    inverted = folder(folders, mask=MaskFiles(folders / "masks", invert=True))
    assert (inverted[0]["mask"] == 255).all()
    assert (inverted[1]["mask"][1] == [0, 0, 0, 255, 255, 255]).all()


def test_a_second_picture_of_other_proportions(folders):
    Image.new("RGB", (8, 8)).save(folders / "pairs/a/1.webp")
    with pytest.raises(DataError, match=r"pairs/a/1\.webp: 8 x 8 pixels; expected the proportions .* of 6 x 4"):
        folder(folders, pair=PairFiles(folders / "pairs"))[0]


def test_proportions_allow_for_rounding():
    for height, width in ((480, 641), (333, 500), (37, 91)):
        for scale in (0.125, 0.3, 0.5, 1.7, 4):
            other = round(height * scale), round(width * scale)
            assert same_proportions((height, width), other)
            assert same_proportions(other, (height, width))
    assert not same_proportions((480, 640), (640, 480))
    assert not same_proportions((256, 256), (128, 132))


def test_a_file_that_is_missing(folders):
    (folders / "maps/a/2.png").unlink()
    with pytest.raises(DataError, match=r"maps/a/2\.png: is missing, the map of .*pictures/a/2\.jpg; 1 of 3"):
        folder(folders, map=MapFiles(folders / "maps", ["a"]))
    with pytest.raises(DataError, match="nowhere: no such folder of masks"):
        folder(folders, mask=MaskFiles(folders / "nowhere"))
    Image.new("L", (12, 8)).save(folders / "pairs/a/2.png")
    with pytest.raises(DataError, match=r"pairs/a/2\.png: a/2\.webp has the same name"):
        folder(folders, pair=PairFiles(folders / "pairs"))


def test_a_key_that_is_none(folders):
    with pytest.raises(ConfigError, match=r"aligned\.maps: expected one of the keys map, mask, boxes, pair"):
        folder(folders, maps=MaskFiles(folders / "masks"))
    with pytest.raises(ConfigError, match=r"aligned\.map: .* found MaskFiles; write it as aligned\.mask"):
        folder(folders, map=MaskFiles(folders / "masks"))


def test_the_fingerprint_covers_them_and_not_where_they_are(folders):
    def of(**options) -> str:
        return folder(folders, map=MapFiles(folders / "maps", **{"classes": ["a", "b", "c"], **options})).fingerprint()

    first = of()
    assert ImageFolder(folders / "pictures").fingerprint() == folder(folders).fingerprint() != first
    assert len({first, of(classes=["x", "b", "c"]), of(reduce=1), of(unlabeled=[])}) == 4
    (folders / "maps").rename(folders / "moved")
    moved = folder(folders, map=MapFiles(folders / "moved", ["a", "b", "c"]))
    assert moved.fingerprint() == first
    assert moved.captions_fingerprint() == ImageFolder(folders / "pictures").captions_fingerprint()
    Image.fromarray(numbers(1)).save(folders / "moved/a/1.png")
    other = folder(folders, map=MapFiles(folders / "moved", ["a", "b", "c"]))
    assert other.fingerprint() != first
    assert other.pictures_fingerprint() != moved.pictures_fingerprint()


def test_they_come_from_a_configuration(folders):
    def source(name: str, **params) -> dict:
        return {"target": f"ldm.data.sources.{name}", "params": {key: str(value) for key, value in params.items()}}

    (folders / "names.txt").write_text("sky\nsea\nland\n")
    aligned = {
        "map": source("maps.MapFiles", root=folders / "maps", classes=folders / "names.txt"),
        "mask": source("masks.MaskFiles", root=folders / "masks"),
        "pair": source("pairs.PairFiles", root=folders / "pairs"),
    }
    train = source("folder.ImageFolder", root=folders / "pictures")
    train["params"]["aligned"] = aligned
    module = {"target": "ldm.data.datamodule.ImageDataModule", "params": {"train": train}}
    tree = {"data": {**module, "params": {**module["params"], "batch_size": 1, "resolution": 4, "seed": 0}}}
    problems = check.parameters(from_plain(tree, "test"), check.full_look_up([]))
    assert problems == []
    assert aligned_keys(build(train)) == ["map", "mask", "pair"]
    aligned["mask"] = source("folder.ImageFolder", root=folders / "masks")
    with pytest.raises(ConfigError, match=r"aligned\.mask: expected a source of `mask`, found ImageFolder"):
        build(train)
