"""What lies on a picture stays on it: cropped and mirrored with it, exactly; kept by a cache as it is computed."""

import os
import signal
import time
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.autoencoder.codec import Codec
from ldm.data.transforms import EvalTransform
from ldm.errors import ConfigError, DataError
from ldm.images import to_uint8
from ldm.latents.aligned import Boxes, Map, Mask, Pair, Pixels
from ldm.latents.columns import AlignedRows, Crop, pixels
from ldm.latents.dataset_parts import DatasetParts
from ldm.latents.masked import MaskedLatents, MaskedRows
from ldm.latents.part_reader import PartReader
from ldm.latents.parts import verify
from ldm.latents.shards import MANIFEST
from tests.latents.test_parts import content
from tests.tiny_dense import CLASSES, Blocks, Scenes

SIZES = [(21, 27), (27, 21), (16, 16), (33, 16), (17, 40), (5, 101), (640, 9), (16, 17)]
CROPS = [16, (12, 20), (7, 9), (31, 30)]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def crop_of(size=16, interpolation="nearest"):
    return Crop(EvalTransform(size, interpolation), 3)


def scene(size, dtype=np.uint8, **changes):
    noise = np.random.default_rng(size).integers(0, CLASSES, (*size, 3), dtype=np.uint8)
    return {"image": Image.fromarray(noise), "map": noise[..., 0].astype(dtype), **changes}


# ---- the crop ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("crop", CROPS)
@pytest.mark.parametrize("column", [Map(), Map(300)])
def test_a_map_that_is_the_picture_stays_the_picture(size, crop, column):
    item = scene(size, np.int16 if column.dtype == torch.int16 else np.uint8)
    crop = crop_of(crop)
    row, _ = column.row(item, crop, "x")
    picture = to_uint8(crop.transform(item["image"]))
    assert row.dtype == column.dtype
    assert tuple(row.shape) == crop.size
    assert torch.equal(row.to(torch.uint8), picture[0])
    assert torch.equal(column.mirrored(row[None])[0], picture.flip(-1)[0].to(row.dtype))


@pytest.mark.parametrize("edge", [(slice(2, None), slice(None)), (slice(None), slice(3, None))])
def test_edges_lie_where_they_lie_in_a_picture_that_is_smoothed(edge):
    """Bicubic, as pictures are by default."""
    halves = np.zeros((5, 7), np.uint8)
    halves[edge] = 1
    item = {"image": Image.fromarray(halves * 255).convert("RGB"), "map": halves}
    for size in (80, (60, 90)):
        crop = crop_of(size, "bicubic")
        assert torch.equal(crop.transform(item["image"])[0] > 0, Map().row(item, crop, "x")[0] > 0)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("crop", CROPS)
def test_a_box_lies_around_what_it_lay_around(size, crop):
    height, width = size
    transform = EvalTransform(crop, "nearest")
    for left, top, right, bottom in [(0, 0, 1, 1), (0.2, 0.3, 0.9, 0.8), (0.5, 0.0, 0.75, 1.0)]:
        box = np.array([round(left * width), round(top * height), round(right * width), round(bottom * height)])
        if box[0] == box[2] or box[1] == box[3]:
            continue
        inside = np.zeros(size, np.uint8)
        inside[box[1] : box[3], box[0] : box[2]] = 1
        row, _ = Boxes().row(scene(size, boxes=[[*box, 4]]), Crop(transform, 3), "x")
        rows, columns = np.nonzero(transform.labels(inside))
        if not len(row):
            assert not len(rows)
            continue
        found = row[0, :4].numpy() * [*transform.size[::-1], *transform.size[::-1]]
        if len(rows):
            around = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert np.abs(found - around).max() <= 0.51
        assert row[0, 4] == 4


def test_boxes_are_clipped_and_those_that_vanish_are_left_out():
    boxes = [[0, 0, 40, 20, 1], [0, 0, 9, 20, 2], [12, 5, 22, 15, 3], [-3, 2, 14, 99, 4]]
    row, too_many = Boxes().row(scene((20, 40), boxes=boxes), crop_of(20), "x")
    expected = torch.tensor([[0, 0, 1, 1, 1], [0.1, 0.25, 0.6, 0.75, 3], [0, 0.1, 0.2, 1, 4]])
    torch.testing.assert_close(row, expected, atol=1e-4, rtol=0)
    assert not too_many
    row, too_many = Boxes(2).row(scene((20, 40), boxes=boxes), crop_of(20), "x")
    assert row[:, 4].tolist() == [1, 3]
    assert too_many


def test_boxes_are_mirrored_exactly():
    random = np.random.default_rng(0)
    corners = np.sort(random.uniform(0, 20, (30, 2, 2)), axis=1).reshape(30, 4)
    row, _ = Boxes().row(scene((20, 20), boxes=np.concatenate([corners, np.ones((30, 1))], 1)), crop_of(20), "x")
    padded = torch.cat([row, torch.zeros(3, 5)])[None]
    mirrored = Boxes().mirrored(padded)
    assert torch.equal(Boxes().mirrored(mirrored), padded)
    assert torch.equal(mirrored[0, :30, 0].double(), 1 - row[:, 2].double())
    assert torch.equal(mirrored[0, :30, 2] - mirrored[0, :30, 0], row[:, 2] - row[:, 0])
    assert not mirrored[0, 30:].any()


def test_pictures_come_back_with_the_bits_of_the_transform():
    item, crop = scene((21, 27)), crop_of(16, "bicubic")
    row, _ = Pixels().row(item, crop, "x")
    assert row.dtype == torch.uint8
    assert torch.equal(Pixels().placed(row), crop.transform(item["image"]))
    every = torch.arange(256, dtype=torch.uint8)
    gray = EvalTransform(1)
    assert torch.equal(pixels(every), torch.stack([gray(Image.new("L", (1, 1), int(n))) for n in every]).flatten())


def test_a_pair_of_half_the_size_lies_on_its_picture():
    height, width = 20, 28
    ramp = np.add.outer(np.arange(height) * 6, np.arange(width) * 4).astype(np.uint8)
    whole = Image.fromarray(ramp).convert("RGB")
    item = {"image": whole, "pair": whole.resize((width // 2, height // 2), Image.Resampling.BOX)}
    crop = crop_of(16, "bicubic")
    one, two = (column.row(item, crop, "x")[0].int() for column in (Pixels(), Pair()))
    assert (one - two).abs().float().mean() < 2


def test_a_larger_pair_may_be_rounded_by_as_much_as_its_picture():
    """256 x 341 pixels are 3000 x 4000 made smaller."""
    sizes = (341, 256), (4000, 3000)
    item = dict(zip(("image", "pair"), (Image.new("RGB", size) for size in sizes), strict=True))
    assert Pair().row(item, crop_of(16), "x")[0].shape == (3, 16, 16)
    assert Pair().row({"image": item["pair"], "pair": item["image"]}, crop_of(16), "x")[0].shape == (3, 16, 16)


# ---- bad input ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("column", "change", "said"),
    [
        (
            Map(),
            {"map": np.zeros((21, 26), np.uint8)},
            r"map: expected \(21, 27\), the picture's height and width, found",
        ),
        (Map(), {"map": np.zeros((21, 27), np.int64)}, r"map: expected uint8 or int16, found int64"),
        (Map(5), {"map": np.full((21, 27), 7, np.uint8)}, r"map: expected classes 0 .. 4, or 255 .* found 7"),
        (
            Map(),
            {"map": np.full((21, 27), 300, np.int16)},
            r"map: .* found 300; say how many there are",
        ),
        (Map(300), {"map": np.full((21, 27), -2, np.int16)}, r"map: expected classes 0 .. 299.* found -2"),
        (Mask(), {"mask": np.zeros((27, 21), np.uint8)}, r"mask: expected \(21, 27\), .*, found \(27, 21\)"),
        (Boxes(), {"boxes": np.zeros((2, 4))}, r"boxes: expected \(K, 5\), .*, found \(2, 4\)"),
        (
            Boxes(),
            {"boxes": [[30, 1, 40, 9, 0]]},
            r"boxes: expected .* the picture of 21 x 27 pixels.* found 30, 1",
        ),
        (Boxes(), {"boxes": [[9, 1, 4, 9, 0]]}, r"boxes: expected left < right"),
        (Boxes(), {"boxes": [[1, 1, np.nan, 9, 0]]}, r"boxes: expected left < right"),
        (Boxes(), {"boxes": [[1, 1, 4, 9, -1]]}, r"boxes: .* a class from 0 up, found 1, 1, 4, 9, -1"),
        (
            Pair(),
            {"pair": Image.new("RGB", (27, 42))},
            r"pair: expected the proportions of its picture, 21 x 27",
        ),
    ],
)
def test_what_does_not_fit_is_one_message_with_the_file(column, change, said):
    fitting = {item: {"map": np.ones((21 + item % 3, 27 - item % 4), np.uint8)} for item in range(10)}
    dataset = Scenes(10, changes={**fitting, 0: change})
    with pytest.raises(DataError, match=rf"(?s)1 items could not be read, 0 are allowed:\n  memory/0.png: {said}"):
        built(column, dataset)
    kept = built(column, dataset, max_broken=1, cache="more")
    assert kept.broken == [0]


def test_unlabeled_pixels_have_one_number_in_each_type():
    narrow, wide = np.full((4, 4), 255, np.uint8), np.full((4, 4), -1, np.int16)
    for values in (narrow, wide):
        item = {"image": Image.new("RGB", (4, 4)), "map": values}
        assert (Map(5).row(item, crop_of(4), "x")[0] == 255).all()
        assert (Map(300).row(item, crop_of(4), "x")[0] == -1).all()


def test_a_thousand_boxes_are_one_warning(caplog):
    many = np.tile([[1, 1, 9, 9, 0]], (1000, 1)).astype(np.float32)
    reader = built(Boxes(), Scenes(6, changes={2: {"boxes": many}}), name="boxes")
    assert caplog.text.count("data.params.aligned.boxes: 1 of 6 items have more of them than are kept") == 1
    assert reader.gather("boxes", np.array([2]), np.array([0]))["boxes.value_mask"].all()


def test_an_item_without_the_key_names_it():
    class Depth(Mask):
        reads = "depth"

    with pytest.raises(ConfigError, match=r"memory/0.png: has no depth, which data.params.aligned.x reads"):
        built(Depth(), Scenes(3))


# ---- in the cache ------------------------------------------------------------------------------------------------


def built(column, dataset=None, cache="cache", name="x", size=16, **params) -> PartReader:
    parts = DatasetParts("train", dataset or Scenes(), Path(cache), **params)
    return parts.of_items(name, AlignedRows(column, crop_of(size, "bicubic")), f"data.params.aligned.{name}", TOO_MANY)


TOO_MANY = "data.params.aligned.{name}: {cut} of {rows} items have more of them than are kept; the largest are"


@pytest.mark.parametrize("column", [Map(), Map(300), Mask(), Boxes(), Pixels(), Pair()])
def test_what_is_kept_is_what_is_computed(column):
    dataset = Scenes(150)
    reader = built(column, dataset)
    verify(reader.folder)
    assert reader.plan.num_shards > 1
    items = np.random.default_rng(0).integers(0, 150, 40)
    found = reader.gather("x", items, np.zeros(40, int))
    for place, item in enumerate(items.tolist()):
        row, _ = column.row(dataset[item], crop_of(16, "bicubic"), "x")
        kept = found["x.value"][place]
        if (mask := found.get("x.value_mask")) is not None:
            assert mask[place].sum() == len(row)
            kept = kept[: len(row)]
        assert kept.dtype == row.dtype
        assert torch.equal(kept, row)


def test_layouts_that_are_all_empty():
    empty = {item: {"boxes": np.zeros((0, 5), np.float32)} for item in range(5)}
    reader = built(Boxes(), Scenes(5, changes=empty))
    verify(reader.folder)
    found = reader.gather("x", np.arange(5), np.zeros(5, int))
    assert not found["x.value_mask"].any()
    assert found["x.value"].shape == (5, 30, 5)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"dataset": Scenes(10, salt=1)}, "source"),
        ({"size": 8}, "feature.pixels.resolution"),
        ({"column": Map(20)}, "feature.num_classes"),
        ({"column": Pixels()}, "reads"),
    ],
)
def test_a_stale_part_is_refused_by_key(change, key):
    built(Map(CLASSES))
    with pytest.raises(DataError, match=rf"(?s)cache/train-x: this part of a latent cache .*\n  {key}: expected"):
        built(**{"column": Map(CLASSES), **change})


def build_boxes(dataset, cache):
    built(Boxes(), dataset, cache)


def build_masked(dataset, cache):
    """Of pixels, which are encoded by no network."""
    made = MaskedRows(MaskedLatents(Blocks(), 2), crop_of(), Codec.pixels(3), "none", {"image": Pixels()})
    DatasetParts("train", dataset, Path(cache)).of_items("x", made, "data.params.masked")


class Slow(Scenes):
    def __getitem__(self, index):
        time.sleep(0.001)
        return super().__getitem__(index)


@pytest.mark.parametrize(("build", "world"), [(build_boxes, 1), (build_masked, 2)])
def test_a_build_killed_at_any_moment_goes_on_to_the_same_bytes(here, build, world):
    def work(rank):
        torch.set_num_threads(1)
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
        build(Slow(150), "killed")
        os._exit(0)

    build(Scenes(150), "whole")
    draw, kills = np.random.default_rng(world), 0
    for attempt in range(20):
        builders = [get_context("fork").Process(target=work, args=(rank,)) for rank in range(world)]
        for builder in builders:
            builder.start()
        time.sleep(draw.uniform(0, 0.1 + 0.1 * attempt))
        for builder in builders:
            os.kill(builder.pid, signal.SIGKILL)
            builder.join()
            kills += builder.exitcode == -signal.SIGKILL
        if (here / "killed" / "train-x" / MANIFEST).exists():
            break
    build(Scenes(150), "killed")
    assert kills
    assert content(here / "killed") == content(here / "whole")
