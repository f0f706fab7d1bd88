"""Boxes from COCO's JSON."""

import json
import logging

import numpy as np
import pytest
from PIL import Image

from ldm.data.dataset import Subset, box_classes
from ldm.data.sources.coco import CocoBoxes
from ldm.data.sources.folder import ImageFolder
from ldm.errors import DataError


def document() -> dict:
    """Three pictures of 8 x 6: two boxes, none, and one."""
    return {
        "info": {"year": 2017},
        "images": [
            {"id": 30 - number, "file_name": f"{number}.png", "width": 8, "height": 6, "license": 1}
            for number in range(3)
        ],
        "annotations": [
            box(30, 7, [1, 2, 3, 2.5], segmentation=[[1, 2, 3]]),
            box(28, 90, [0, 0, 8, 6]),
            box(30, 2, [4, 0, 1, 1]),
        ],
        "categories": [{"id": 90, "name": "kite"}, {"id": 2, "name": "cat"}, {"id": 7, "name": "dog"}],
    }


def box(image: int, category: int, sides, **more) -> dict:
    return {"id": 1, "image_id": image, "category_id": category, "bbox": sides, "iscrowd": 0, **more}


@pytest.fixture
def data(tmp_path):
    """What makes a data set of three pictures from the content of its JSON."""
    (tmp_path / "pictures").mkdir()
    for number in range(3):
        Image.new("RGB", (8, 6)).save(tmp_path / f"pictures/{number}.png")

    def make(content) -> ImageFolder:
        (tmp_path / "boxes.json").write_text(content if isinstance(content, str) else json.dumps(content))
        return ImageFolder(tmp_path / "pictures", aligned={"boxes": CocoBoxes(tmp_path / "boxes.json")})

    return make


def test_boxes_are_corners_and_classes_are_in_the_order_of_ids(data):
    found = data(document())
    assert box_classes(Subset(found, [1])) == ["cat", "dog", "kite"]
    boxes = [found[index]["boxes"] for index in range(3)]
    assert boxes[0].tolist() == [[1, 2, 4, 4.5, 1], [4, 0, 5, 1, 0]]
    assert boxes[1].shape == (0, 5), "an empty layout"
    assert boxes[2].tolist() == [[0, 0, 8, 6, 2]]
    assert {one.dtype for one in boxes} == {np.dtype(np.float32)}


def test_what_is_clipped_and_left_out_is_counted(data, caplog):
    content = document()
    content["annotations"] = [
        box(30, 2, [-1, 2, 4, 9]),
        box(30, 2, [8, 0, 3, 3]),  # wholly outside
        box(29, 2, [1, 1, 0, 3]),
        box(28, 2, [5, 5, -2, 1]),
        box(28, 2, {"counts": []}, iscrowd=1),
        box(28, 2, [0, 0, 8.0001, 6]),  # rounding
    ]
    content["images"].append({"id": 5, "file_name": "elsewhere.png", "width": 1, "height": 1})
    found = data(content)
    assert found[0]["boxes"].tolist() == [[0, 2, 3, 6, 0]]
    assert found[1]["boxes"].shape == (0, 5)
    assert found[2]["boxes"].tolist() == [[0, 0, 8, 6, 0]]
    with caplog.at_level(logging.WARNING):
        found.prepare()
    assert "1 crowds are left out" in caplog.text
    assert "3 boxes have no area in their picture and are left out (the first in 0.png)" in caplog.text
    assert "1 boxes reach outside of their picture and are clipped (the first in 0.png)" in caplog.text
    assert "1 images of" in caplog.text


def test_a_thousand_boxes(data):
    content = document()
    content["annotations"] = [box(30, 2, [number % 7, number % 5, 1, 1]) for number in range(1000)]
    assert data(content)[0]["boxes"][[0, 999]].tolist() == [[0, 0, 1, 1, 0], [5, 4, 6, 5, 0]]
    assert data(content)[0]["boxes"].shape == (1000, 5)


def test_boxes_are_scaled_with_a_picture_that_was_resized(data, tmp_path):
    Image.new("RGB", (16, 12)).save(tmp_path / "pictures/0.png")
    Image.new("RGB", (6, 8)).save(tmp_path / "pictures/2.png")
    found = data(document())
    assert found[0]["boxes"].tolist() == [[2, 4, 8, 9, 1], [8, 0, 10, 2, 0]]
    with pytest.raises(DataError, match=r"boxes\.json: says that 2\.png has 8 x 6 pixels; it has 6 x 8"):
        found[2]


@pytest.mark.parametrize(
    ("key", "place", "value", "message"),
    [
        ("categories", None, None, "`categories` is missing; expected"),
        ("categories", None, [], "`categories` is empty"),
        ("images", None, {"1": {}}, "`images` is no list of objects"),
        ("categories", 1, {"id": 90, "name": "x"}, r"categories\[1\]: id 90 is also that of 'kite'"),
        ("categories", 1, {"id": 5}, r"categories\[1\]: name: expected a text, found None"),
        ("images", 1, {"id": 29, "file_name": "1.png", "height": 6}, r"images\[1\]: width: expected a whole number"),
        ("images", 1, {"id": 29, "file_name": "1.png", "height": 0, "width": 8}, r"images\[1\]: .* found 8 x 0"),
        ("images", 1, {"id": 30, "file_name": "1.png", "height": 6, "width": 8}, r"images\[1\]: its id 30 .* another"),
        ("annotations", 0, box(1, 2, [0, 0, 1, 1]), r"annotations\[0\]: image_id 1 is none of the 3 `images`"),
        (
            "annotations",
            0,
            box(30, 3, [0, 0, 1, 1]),
            r"annotations\[0\]: category_id 3 is none of `categories` \(2, 7, 90\)",
        ),
        ("annotations", 1, box(30, 2, [0, 0, 1]), r"annotations\[1\]: bbox: expected \[left, top, width, height\]"),
        ("annotations", 1, box(30, 2, [0, 0, 1, float("nan")]), r"annotations\[1\]: bbox: .* nan\]"),
        ("annotations", 1, box(30, 2, None), r"annotations\[1\]: bbox: .* found None"),
    ],
)
def test_what_is_wrong_in_the_file(data, key, place, value, message):
    content = document()
    if place is not None:
        content[key][place] = value
    elif value is None:
        del content[key]
    else:
        content[key] = value
    with pytest.raises(DataError, match=rf"boxes\.json: {message}"):
        data(content)


@pytest.mark.parametrize("content", ["{", "[" * 100_000, "[1]", '"text"'])
def test_a_file_that_is_something_else(data, content):
    with pytest.raises(DataError, match=r'boxes\.json: .*expected \{"images": \[\.\.\.\]'):
        data(content)


def test_pictures_that_it_does_not_list(data, tmp_path):
    content = document()
    content["images"][1]["file_name"] = "val/1.png"
    with pytest.raises(DataError, match=r"pictures/1\.png: is not among the 3 `images` of .*boxes\.json, like 1 of 3"):
        data(content)
    with pytest.raises(DataError, match=r"absent\.json: cannot be read"):
        ImageFolder(tmp_path / "pictures", aligned={"boxes": CocoBoxes(tmp_path / "absent.json")})


def test_the_fingerprint_is_of_the_boxes_of_the_pictures(data):
    content = document()
    first = data(content).fingerprint()
    content["images"] = content["images"][::-1]
    content["info"] = {"year": 2018}
    assert data(content).fingerprint() == first
    content["annotations"][0]["bbox"][0] = 1.5
    assert data(content).fingerprint() != first
    other = document()
    other["categories"][0]["name"] = "bird"
    assert data(other).fingerprint() != first
