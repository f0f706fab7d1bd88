"""Which caches follow a change of the pictures, and which one of what lies on them; former caches are found."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm.autoencoder.codec import Codec
from ldm.data.dataset import Subset, aligned_apart, with_aligned
from ldm.data.fingerprint import parts, together
from ldm.data.sources.coco import CocoBoxes
from ldm.data.sources.folder import ImageFolder
from ldm.data.sources.maps import MapFiles
from ldm.data.sources.masks import MaskFiles
from ldm.data.sources.pairs import PairFiles
from ldm.errors import DataError
from ldm.latents import dataset_parts, encoding
from ldm.latents.aligned import Boxes, Map, Pair, Pixels
from ldm.latents.datamodule import LatentDataModule
from ldm.latents.masked import MaskedLatents
from ldm.latents.source import former_source, source
from tests.tiny_dense import Blocks, Scenes

ALL = {"map": Map(), "boxes": Boxes(4), "pair": Pair(), "image": Pixels()}
ITEMS = 6


def picture(path: str, shift: int, mode: str = "RGB") -> None:
    Path(path).parent.mkdir(exist_ok=True)
    pixels = np.random.default_rng(shift).integers(0, 3, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels if mode == "RGB" else pixels[..., 0] * np.uint8(1 if mode == "P" else 127)).save(path)


def boxes(shift: int) -> None:
    images = [{"id": one, "file_name": f"{one}.png", "width": 16, "height": 16} for one in range(ITEMS)]
    found = [{"image_id": one, "category_id": 1, "bbox": [one + shift, 2, 5, 6]} for one in range(ITEMS)]
    document = {"images": images, "annotations": found, "categories": [{"id": 1, "name": "cat"}]}
    Path("boxes.json").write_text(json.dumps(document))


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for one in range(ITEMS):
        picture(f"pictures/{one}.png", one)
        picture(f"maps/{one}.png", 10 + one, "P")
        picture(f"masks/{one}.png", 20 + one, "L")
        picture(f"pairs/{one}.png", 30 + one)
    boxes(0)


def folder(**more) -> ImageFolder:
    files = {"map": MapFiles("maps", ["a", "b", "c"]), "mask": MaskFiles("masks"), "pair": PairFiles("pairs")}
    return ImageFolder("pictures", **{"aligned": {**files, "boxes": CocoBoxes("boxes.json")}, **more})


@pytest.fixture
def make(runs):
    def make(data=None, **params):
        defaults = {"autoencoder": str(runs.autoencoder), "batch_size": 2, "resolution": 16, "num_validation": 2}
        defaults |= {"aligned": ALL, "masked": MaskedLatents()}
        module = LatentDataModule(folder() if data is None else data, **{**defaults, **params})
        module.setup()
        return module

    return make


@pytest.fixture
def encoded(monkeypatch):
    """How many pictures were encoded."""
    counts, encode = [0], Codec.encode

    def counting(self, images):
        counts[0] += len(images)
        return encode(self, images)

    monkeypatch.setattr(Codec, "encode", counting)
    return counts


def made_of(module) -> dict[str, set[str]]:
    """The folders that a module reads, by what they hold."""
    found: dict[str, set[str]] = {"latents": {str(cache.folder) for (cache,) in module.caches.values()}}
    for rows in module._rows.values():
        for part in rows.parts():
            found.setdefault(part.plan.name, set()).add(str(part.folder))
    return found


CHANGES = {
    "map": (lambda: picture("maps/3.png", 99, "P"), {"map"}),
    "mask": (lambda: picture("masks/3.png", 99, "L"), {"masked"}),
    "boxes": (lambda: boxes(1), {"boxes"}),
    "pair": (lambda: picture("pairs/3.png", 99), {"pair"}),
    "picture": (lambda: picture("pictures/3.png", 99), {"latents", "masked", *ALL}),
}


@pytest.mark.parametrize(("changed", "captions"), [*((one, True) for one in CHANGES), ("map", False)])
def test_what_is_made_anew_is_what_has_changed(make, encoded, changed, captions):
    for one in range(ITEMS if captions else 0):
        Path(f"pictures/{one}.txt").write_text(f"picture {one}")
    before = made_of(make())
    assert before.keys() == {"latents", "masked", *ALL} | ({"captions"} if captions else set())
    encoded[0] = 0
    change, follow = CHANGES[changed]
    change()
    after = made_of(make())
    assert {name for name in before if not before[name] & after[name]} == follow
    assert {name for name in before if before[name] != after[name]} == follow
    once = 2 * (ITEMS - 2) + 2  # of validation no mirror images
    assert encoded[0] == once * len({"latents", "masked"} & follow)
    encoded[0] = 0
    assert made_of(make()) == after
    assert encoded[0] == 0


def test_a_map_is_repaired_without_its_picture(make, encoded):
    Path("maps/3.png").write_bytes(b"nothing")
    module = make(max_broken=0.5, num_validation=0)
    assert module.caches["train"][0].manifest.broken == []
    broken = {part.plan.name: part.manifest.broken for part in module._rows["train"].parts()}
    assert {name: items for name, items in broken.items() if items} == {"map": [3]}
    picture("maps/3.png", 13, "P")
    encoded[0] = 0
    assert len(make(num_validation=0)._rows["train"]) == ITEMS
    assert encoded[0] == 0


def test_a_cache_from_before_the_data_set_had_maps_serves(make, encoded):
    before = made_of(make(folder(aligned=None), aligned={}, masked=None))["latents"]
    encoded[0] = 0
    assert made_of(make(masked=None))["latents"] == before
    assert encoded[0] == 0


@pytest.mark.parametrize("cache", [None, "mine"])
def test_caches_whose_fingerprint_covered_all_are_found(make, encoded, monkeypatch, cache):
    with monkeypatch.context() as formerly:
        for module in (encoding, dataset_parts):
            formerly.setattr(module, "source", lambda dataset, aligned=(): former_source(dataset))
        before = made_of(make(cache=cache))
    encoded[0] = 0
    module = make(cache=cache)
    assert made_of(module) == before
    assert module.manifest.plan.source == former_source(module.train_dataset)
    assert encoded[0] == 0


def test_in_a_folder_of_its_own_only_the_part_is_refused(make, encoded):
    make(cache="mine")
    encoded[0] = 0
    boxes(1)
    for name in ("train", "validation"):
        with pytest.raises(DataError, match=rf"(?s)mine/{name}-boxes: this part .*\n  source: expected.*rm -r mine/"):
            make(cache="mine")
        shutil.rmtree(f"mine/{name}-boxes")
    make(cache="mine")
    assert encoded[0] == 0


def test_masks_drawn_within_maps_follow_the_maps(make):
    class Within(Blocks):
        reads = ("image", "map")

    aligned, masked = {"map": Map(), "boxes": Boxes(4)}, MaskedLatents(Within(), 2)
    before = made_of(make(aligned=aligned, masked=masked))
    CHANGES["map"][0]()
    after = made_of(make(aligned=aligned, masked=masked))
    assert {name for name in before if before[name] != after[name]} == {"map", "masked"}


def test_a_data_set_that_cannot_tell_them_apart_has_one_fingerprint():
    data = Scenes()
    assert aligned_apart(data) is aligned_apart(Subset(data, [1])) is None
    assert source(data) == source(data, ["map"]) == data.fingerprint()
    assert with_aligned(Subset(data, [1]), 0, ["map"]).keys() == data[1].keys()
    assert source(folder(), ["depth"]) == former_source(folder())


def test_parts_of_a_data_set_are_apart_too():
    half = Subset(Subset(folder(), range(4)), [3, 0])
    assert aligned_apart(half) is half
    assert with_aligned(half, 0, ["map"]).keys() == {"image", "map"}
    found = {source(half), source(half, ["map"]), source(half, ["map", "boxes"]), source(folder(), ["map"])}
    assert len(found) == 4
    assert source(half, ["boxes", "map"]) in found, "in any order"
    picture("maps/5.png", 99, "P")
    assert source(Subset(folder(), [3, 0]), ["map"]) not in found, "of the whole data set, as that of the pictures"


def test_several_fingerprints_are_one():
    assert together("a:contents:b") == "a:contents:b"
    several = [together(*pair) for pair in (("a", "b"), ("b", "a"), ("a", "b:contents:c"), ("a:contents:c", "b"))]
    assert len({*several}) == 4
    assert all(parts(one)[1] for one in several)
