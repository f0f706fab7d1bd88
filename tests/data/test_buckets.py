"""Buckets: which sizes there are, and which pictures go where."""

import logging
import math

import numpy as np
import pytest

from ldm.data.buckets import Buckets, assigned, picture_sizes, sizes_of
from ldm.data.dataset import Subset
from ldm.data.sources.folder import ImageFolder
from ldm.errors import ConfigError


def pictures(*sizes: tuple[int, int]) -> np.ndarray:
    return np.array(sizes, dtype=np.int64).reshape(-1, 2)


def chosen(buckets: Buckets, *sizes: tuple[int, int]) -> list[tuple[int, int]]:
    return [buckets.sizes[index] for index in buckets.assign(pictures(*sizes))]


class TestSizes:
    def test_of_sdxl(self):
        """Podell et al. 2023, appendix I: for each short side the longest of the published sizes that fits."""
        found = sizes_of(1024, 64, 4.0)
        published = {(512, 2048), (576, 1792), (640, 1600), (704, 1472), (768, 1344), (832, 1216), (896, 1152)}
        published |= {(960, 1088), (1024, 1024)}
        assert set(found) == published | {size[::-1] for size in published}
        assert found == sorted(found, key=lambda size: size[0] / size[1])

    @pytest.mark.parametrize(("resolution", "step", "ratio"), [(32, 8, 2.0), (256, 64, 2.0), (512, 32, 3.0)])
    def test_are_about_as_large_as_the_square_and_no_larger(self, resolution, step, ratio):
        for height, width in sizes_of(resolution, step, ratio):
            assert height % step == width % step == 0
            assert max(height, width) <= ratio * min(height, width)
            assert resolution**2 - min(height, width) * step < height * width <= resolution**2

    def test_a_step_that_does_not_divide(self):
        with pytest.raises(ConfigError, match=r"multiples of the step 64, found 100: use 64 or 128"):
            Buckets([100])

    def test_written_out(self):
        sizes = [32, [24, 40], (40, 24), [64, 48], 64, [8, 16]]
        assert Buckets(sizes=sizes).tiers == [[(64, 64), (64, 48)], [(24, 40), (32, 32), (40, 24)], [(8, 16)]]
        assert Buckets(sizes=[32, [16, 32], (32, 16)]).sizes == [(16, 32), (32, 32), (32, 16)]

    def test_either_resolutions_or_sizes(self):
        for params in ({}, {"resolutions": [64], "sizes": [64]}, {"sizes": []}):
            with pytest.raises(ConfigError, match="either resolutions or sizes"):
                Buckets(**params)

    def test_close_resolutions_share_no_size(self):
        sizes = Buckets([272, 256, 240], step=16, max_ratio=4.0).sizes
        assert len(sizes) == len(set(sizes))


class TestAssignment:
    def test_to_the_nearest_proportions(self):
        buckets = Buckets([32], step=8, max_ratio=2.0)
        assert buckets.sizes == [(24, 40), (32, 32), (40, 24)]
        assert chosen(buckets, (500, 500), (300, 500), (500, 300), (100, 900), (500, 450)) == [
            (32, 32),
            (24, 40),
            (40, 24),
            (24, 40),
            (32, 32),
        ]

    def test_nearest_is_on_a_log_scale(self):
        buckets = Buckets(sizes=[[32, 32], [64, 16]])  # ratios 1 and 4: 2 is in the middle
        assert chosen(buckets, (199, 100), (201, 100)) == [(32, 32), (64, 16)]

    def test_to_the_largest_resolution_that_does_not_enlarge(self):
        buckets = Buckets([32, 64, 128], step=8)
        assert chosen(buckets, (500, 500), (128, 128), (127, 500), (100, 100), (64, 63), (5, 5)) == [
            (128, 128),
            (128, 128),
            *chosen(Buckets([128], step=8), (127, 500)),
            (64, 64),
            (32, 32),
            (32, 32),
        ]

    def test_unreadable_pictures_go_where_most_are(self):
        buckets = Buckets([32], step=8)
        assert chosen(buckets, (0, 0), (300, 500), (200, 400), (10, 10))[0] == (24, 40)
        assert len(chosen(buckets, (0, 0), (0, 0))) == 2

    def test_matches_a_plain_search(self):
        random = np.random.default_rng(3)
        sizes = random.integers(1, 400, (500, 2))
        buckets = Buckets([64, 128], step=16, max_ratio=4.0)
        for (height, width), index in zip(sizes.tolist(), buckets.assign(sizes).tolist(), strict=True):
            for tier in buckets.tiers:
                best = min(tier, key=lambda size: abs(math.log(size[0] / size[1] * width / height)))
                if best[0] <= height and best[1] <= width:
                    break
            assert buckets.sizes[index] == best


class TestMerging:
    SIZES = pictures(*[(40, 24)] * 9, *[(32, 32)] * 3, *[(24, 40)] * 2)

    def test_small_buckets_join_the_nearest(self, caplog):
        with caplog.at_level(logging.WARNING):
            found = assigned(Buckets([32], step=8), self.SIZES, min_items=4)
        assert found.sizes == [(32, 32), (40, 24)]
        assert [items.tolist() for items in found.items] == [[9, 10, 11, 12, 13], list(range(9))]
        (record,) = caplog.records
        assert record.getMessage() == (
            "data.params.buckets: 1 of 3 sizes would hold fewer than 4 items; the 2 items concerned, of 14, join the "
            "nearest bucket"
        )

    def test_until_one_is_left(self):
        found = assigned(Buckets([32], step=8), self.SIZES, min_items=100)
        assert found.sizes == [(40, 24)]
        assert len(found.items[0]) == 14

    def test_large_enough(self, caplog):
        assert len(assigned(Buckets([32], step=8), self.SIZES, min_items=2).sizes) == 3
        assert not caplog.records

    def test_only_sizes_that_a_model_is_trained_on(self):
        found = assigned(Buckets([32], step=8), self.SIZES, min_items=100, among=[(32, 32), (40, 24)])
        assert found.sizes == [(32, 32), (40, 24)]
        assert [len(items) for items in found.items] == [5, 9]

    def test_the_default_has_most_items_then_is_nearest_to_a_square(self):
        buckets = Buckets([32], step=8)
        assert assigned(buckets, self.SIZES).sizes[assigned(buckets, self.SIZES).default] == (40, 24)
        even = assigned(buckets, pictures((40, 24), (32, 32), (24, 40)))
        assert even.sizes[even.default] == (32, 32)

    def test_the_table(self):
        table = assigned(Buckets([32], step=8), pictures((64, 64), (56, 64), (100, 50), (20, 10))).table([6, 8])
        assert table.splitlines() == [
            "  height x width     items   cropped  enlarged   batch",
            "         32 x 32         2      6.2%         0       6",
            "         40 x 24         2     16.7%         1       8",
        ]


class TestTokens:
    def test_batches_hold_about_as_many_pixels(self):
        buckets = Buckets([256, 512], constant_tokens=True, batch_multiple=4)
        found = {size: buckets.batch_size(size, 32) for size in buckets.sizes}
        assert found[512, 512] == 32
        assert found[256, 256] == 128
        for (height, width), number in found.items():
            assert number % 4 == 0
            assert abs(number * height * width - 32 * 512**2) <= 2 * height * width

    def test_never_an_empty_batch(self):
        assert Buckets(sizes=[16, 512], constant_tokens=True, batch_multiple=1).batch_size((512, 512), 1) == 1

    def test_a_batch_that_is_no_multiple(self):
        buckets = Buckets([256], constant_tokens=True)
        with pytest.raises(ConfigError, match=r"batch_size: expected a multiple of .*batch_multiple \(8\), found 12"):
            buckets.batch_size((256, 256), 12)

    def test_as_many_images_by_default(self):
        buckets = Buckets([256, 512])
        assert {buckets.batch_size(size, 12) for size in buckets.sizes} == {12}


def test_a_data_set_without_sizes(image_folder):
    with pytest.raises(ConfigError, match=r"does not know the sizes of its pictures: give it a method sizes\(\)"):
        picture_sizes(Subset(Unsized(image_folder), [0, 1]))


class Unsized(ImageFolder):
    def sizes(self):
        return None
