from pathlib import Path

import numpy as np
import pytest
import torch

from ldm.errors import DataError, NumericError
from ldm.evaluation.features.base import SPATIAL
from ldm.evaluation.moments import Moments


def features(number: int = 500, size: int = 12) -> np.ndarray:
    """(number, size) float32, far from zero in units of their deviation, as those of a trained network are."""
    random = np.random.default_rng(0)
    mixing = random.standard_normal((size, size))
    return (random.standard_normal((number, size)) @ mixing + 30).astype(np.float32)


def in_batches(rows: np.ndarray, size: int) -> Moments:
    moments = Moments(rows.shape[1])
    for start in range(0, len(rows), size):
        moments.add(rows[start : start + size])
    return moments


def assert_equal(found: Moments, expected: Moments) -> None:
    """To 1e-9, relative: far from it, in truth."""
    assert found.count == expected.count
    np.testing.assert_allclose(found.mean, expected.mean, rtol=1e-12)
    scale = np.abs(expected.covariance).max()
    np.testing.assert_allclose(found.covariance, expected.covariance, rtol=1e-9, atol=1e-11 * scale)


def test_they_are_numpys_in_fp64() -> None:
    # A mean far from zero: sums about zero would lose the covariance.
    rows = torch.randn(50, 3, generator=torch.Generator().manual_seed(0)) * 1e-2 + 1e3
    moments = Moments.of(rows)
    assert moments.covariance.dtype == np.float64
    np.testing.assert_allclose(moments.mean, rows.double().mean(0).numpy(), rtol=1e-12)
    np.testing.assert_allclose(moments.covariance, torch.cov(rows.double().T).numpy(), rtol=1e-9)
    in_ones = in_batches(rows.numpy(), 1)
    np.testing.assert_allclose(in_ones.covariance, torch.cov(rows.double().T).numpy(), rtol=1e-9)


def test_neither_batches_nor_order_nor_parts_matter(monkeypatch) -> None:
    rows = features()
    expected = Moments.of(rows)
    assert_equal(in_batches(rows, 7), expected)
    assert_equal(in_batches(rows, 64), expected)
    monkeypatch.setattr("ldm.evaluation.moments._BLOCK", 33)
    assert_equal(Moments.of(rows), expected)
    assert_equal(in_batches(np.random.default_rng(1).permutation(rows), 64), expected)
    first, second = in_batches(rows[:123], 7), in_batches(rows[123:], 64)
    first.merge(second, Moments(12))
    assert_equal(first, expected)
    empty = Moments(12)
    empty.merge(first)
    assert_equal(empty, expected)


def test_a_part_can_be_taken_out() -> None:
    rows = features()
    assert_equal(Moments.of(rows).without(Moments.of(rows[:50])), Moments.of(rows[50:]))


def test_ranks_are_reduced_once(grouped) -> None:
    rows = features()

    def work(rank: int) -> tuple[int | None, np.ndarray, np.ndarray]:
        total = in_batches(rows[rank::2], 7 if rank else 64).over_ranks()
        return total.count, total.mean, total.scatter

    first, second = grouped(2, work)
    assert first[0] == second[0]
    assert all(np.array_equal(*pair) for pair in zip(first[1:], second[1:], strict=True))
    found = Moments(12)
    found.count, found.mean, found.scatter = first
    assert_equal(found, Moments.of(rows))


def test_a_rank_without_images_takes_part(grouped) -> None:
    rows = features()

    def work(rank: int) -> np.ndarray:
        return (Moments(12) if rank else Moments.of(rows)).over_ranks().covariance

    for found in grouped(2, work):
        np.testing.assert_allclose(found, Moments.of(rows).covariance, rtol=1e-12)


def test_alone_the_reduction_changes_nothing() -> None:
    assert_equal(Moments.of(features()).over_ranks(), Moments.of(features()))


def test_too_few_images_mark_themselves() -> None:
    rows = features()
    assert Moments.of(rows[:12]).rank_deficient
    assert not Moments.of(rows[:13]).rank_deficient
    for number in (0, 1):
        with pytest.raises(DataError, match=f"{number} images have no covariance"):
            _ = in_batches(rows[:number], 7).covariance


def test_what_is_not_finite_and_another_size_are_refused() -> None:
    moments = Moments.of(features())
    with pytest.raises(NumericError, match="image 1"):
        moments.add(np.array([[0.0], [np.nan]]))
    with pytest.raises(ValueError, match="features of 3 numbers"):
        moments.add(np.zeros((2, 3)))


# ---- files ----


def test_files_come_back_and_are_those_of_adm(tmp_path: Path) -> None:
    path, moments, spatial = tmp_path / "reference.npz", Moments.of(features()), Moments.of(features(size=5))
    moments.save(path, spatial)
    assert_equal(Moments.load(path), moments)
    assert_equal(Moments.load(path, SPATIAL, size=5), spatial)
    with np.load(path) as stored:  # as guided-diffusion's evaluator reads them
        np.testing.assert_array_equal(stored["mu"], moments.mean)
        np.testing.assert_array_equal(stored["sigma"], moments.covariance)
        np.testing.assert_array_equal(stored["sigma_s"], spatial.covariance)
    assert [file.name for file in tmp_path.iterdir()] == ["reference.npz"]


def test_a_file_of_adm_without_a_count(tmp_path: Path) -> None:
    moments = Moments.of(features())
    np.savez(tmp_path / "adm.npz", arr_0=np.zeros((2, 4, 4, 3), np.uint8), mu=moments.mean, sigma=moments.covariance)
    found = Moments.load(tmp_path / "adm.npz", size=12)
    assert found.count is None
    assert not found.rank_deficient
    np.testing.assert_array_equal(found.covariance, moments.covariance)
    found.save(tmp_path / "again.npz")
    assert Moments.load(tmp_path / "again.npz").count is None
    with pytest.raises(ValueError, match="unknown number of images"):
        found.add(features())


MEAN, COVARIANCE = np.zeros(3), np.eye(3)


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ({"mu": MEAN, "sigma": np.eye(4)}, r"sigma: expected the shape \(3, 3\), found \(4, 4\)"),
        ({"mu": np.zeros((3, 3)), "sigma": COVARIANCE}, r"mu: expected the shape .*found \(3, 3\)"),
        ({"mu": MEAN}, "expected the keys mu and sigma, found mu; sigma missing"),
        ({"arr_0": MEAN, "arr_1": MEAN}, "found arr_0, arr_1; mu and sigma missing. It holds images"),
        ({}, "found none; mu and sigma missing"),
        ({"mu": MEAN * np.nan, "sigma": COVARIANCE}, "found NaN, infinity or text"),
        ({"mu": MEAN, "sigma": np.array([{}])}, "truncated or of another kind"),
        ({"mu": np.zeros(5), "sigma": np.eye(5)}, r"mu: expected the shape \(3,\), found \(5,\)"),
        ({"mu": np.array(["a"] * 3), "sigma": COVARIANCE}, "expected numbers"),
        ({"mu": MEAN, "sigma": -COVARIANCE}, "sigma: expected variances of 0 or more, found -1"),
        ({"mu": MEAN, "sigma": np.triu(np.ones((3, 3)))}, "sigma: expected a symmetric matrix"),
        ({"mu": MEAN, "sigma": COVARIANCE, "count": np.array(1)}, "count: expected 2 pictures or more, found 1"),
    ],
)
def test_a_wrong_file_is_one_message(tmp_path: Path, stored: dict[str, np.ndarray], message: str) -> None:
    np.savez(tmp_path / "wrong.npz", **stored)
    with pytest.raises(DataError, match=message) as caught:
        Moments.load(tmp_path / "wrong.npz", size=3)
    assert "wrong.npz" in str(caught.value)


def test_a_file_without_statistics_of_the_spatial_part(tmp_path: Path) -> None:
    Moments.of(features()).save(tmp_path / "fid.npz")
    with pytest.raises(DataError, match="mu_s and sigma_s missing"):
        Moments.load(tmp_path / "fid.npz", SPATIAL)


@pytest.mark.parametrize("kept", [0, 1, 10, 400, 1500])
def test_a_truncated_file_is_one_message(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "reference.npz"
    Moments.of(features()).save(path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(DataError, match="truncated"):
        Moments.load(path)


def test_damage_in_the_middle_and_a_missing_file(tmp_path: Path) -> None:
    path = tmp_path / "reference.npz"
    Moments.of(features()).save(path)
    content = bytearray(path.read_bytes())
    content[700] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"reference.npz"):
        Moments.load(path)
    with pytest.raises(DataError, match="no such file"):
        Moments.load(tmp_path / "nothing.npz")
    np.save(tmp_path / "array.npy", MEAN)
    with pytest.raises(DataError, match="another kind"):
        Moments.load(tmp_path / "array.npy")
