import pytest

from ldm.sizes import as_resolution, as_size, is_multiple, nearest, spell


@pytest.mark.parametrize(
    ("written", "size", "stored", "words"),
    [
        (64, (64, 64), 64, "64"),
        ([64, 64], (64, 64), 64, "64"),
        ([48, 80], (48, 80), [48, 80], "48 x 80"),
        ((80, 48), (80, 48), [80, 48], "80 x 48"),
    ],
)
def test_a_resolution_is_a_size_and_back(written, size, stored, words):
    assert as_size(written) == size
    assert as_resolution(size) == stored
    assert as_size(as_resolution(size)) == size
    assert spell(size) == words


@pytest.mark.parametrize(
    ("size", "factor", "words"),
    [
        ((30, 30), 4, "28 or 32"),
        ((3, 3), 4, "4"),
        ((48, 80), 16, ""),
        ((50, 80), 8, "height 48 or 56"),
        ((50, 3), 8, "height 48 or 56 and width 8"),
    ],
)
def test_the_nearest_sizes_of_each_side_that_does_not_fit(size, factor, words):
    assert nearest(size, factor) == words


@pytest.mark.parametrize(
    ("size", "of", "expected"),
    [
        ((16, 24), (4, 6), True),
        ((4, 6), (4, 6), True),
        ((16, 25), (4, 6), False),
        ((2, 6), (4, 6), False),
        ((0, 6), (4, 6), False),
    ],
)
def test_whole_multiples(size, of, expected):
    assert is_multiple(size, of) is expected
