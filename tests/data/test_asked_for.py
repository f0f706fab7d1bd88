"""What items are asked for by: their classes and captions."""

import pytest

from ldm.data.asked_for import asked_for, conditions
from ldm.errors import DataError
from tests.tiny_features import CaptionedPictures


def test_of_several_captions_the_first_which_may_be_empty():
    assert asked_for({"caption": ["", "two"], "class_label": 1}, ["caption"], "here") == {"caption": ""}
    assert asked_for({"caption": "one"}, ["caption"], "here") == {"caption": "one"}


@pytest.mark.parametrize("item", [{}, {"caption": []}, {"caption": None}])
def test_an_item_that_lacks_what_it_is_asked_for_by_is_named(item):
    with pytest.raises(DataError, match=r"^a/1.png: has no caption, which samples are to be asked for by$"):
        asked_for(item, ["caption"], "a/1.png")


def test_items_without_the_key_are_named():
    class Unlabeled(CaptionedPictures):
        def __getitem__(self, index):
            return {"image": super().__getitem__(index)["image"]}

    with pytest.raises(DataError, match=r"memory/\d.png: has no class_label"):
        conditions(Unlabeled(5), ["class_label"], 2)
    assert len(conditions(CaptionedPictures(5), ["class_label", "caption"], 2)) == 2
