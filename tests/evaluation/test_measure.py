"""All numbers of one set of pictures: the right ones, in the right order of quality, with notes on what is missing."""

import numpy as np
import pytest
import torch

from ldm.errors import DataError
from ldm.evaluation import measure as measures
from ldm.evaluation.distances.frechet import frechet_distance
from ldm.evaluation.feature_store import FeatureStore, column, key
from ldm.evaluation.features.base import MAIN
from ldm.evaluation.measure import METRICS, agreement, measure
from ldm.evaluation.moments import Moments
from ldm.evaluation.reference import PicturesReference, StatisticsReference
from tests.evaluation.spaces import Projection
from tests.evaluation.test_reference import Noise

FID = "inception-2015/tf1-299"


class Blurred(Noise):
    """The same noise, with less of it.

    Args:
        share: of the noise that is left.
    """

    def __init__(self, share: float, **arguments: int) -> None:
        super().__init__(**arguments)
        self.share = share

    def images(self, indices):
        return (super().images(indices).float() * self.share + 128 * (1 - self.share)).to(torch.uint8)

    def description(self):
        return {"kind": "blurred", "seed": self.seed, "share": self.share}


def table(pictures, space, root):
    store = FeatureStore(pictures.description(), len(pictures), root)
    store.fill(pictures.images, [column(space)])
    return store.table(key(space))


@pytest.fixture
def measured(tmp_path):
    """measured(pictures, *spaces, metrics, held_out) -> {metric: value}, and the whole, against noise."""

    def run(pictures, *spaces, metrics=METRICS, held_out=None):
        spaces = spaces or (Projection(FID),)
        references = [PicturesReference(Noise(60), "noise", root=tmp_path)]
        references += [] if held_out is None else [PicturesReference(held_out, "held out", root=tmp_path)]
        for reference in references:
            reference.prepare(spaces, 16)
        tables = [table(pictures, space, tmp_path) for space in spaces]
        found = measure(spaces, tables, references[0], metrics, references[1] if held_out else None)
        return {value.metric: value for value in found.values}, found

    return run


def test_a_fresh_set_is_nearer_than_a_blurred_one(measured):
    fresh, _ = measured(Noise(60, seed=5))
    blurred, _ = measured(Blurred(0.6, number=60, seed=5))
    more, _ = measured(Blurred(0.3, number=60, seed=5))
    assert fresh["FID"].value < blurred["FID"].value < more["FID"].value
    assert fresh["Recall"].value > more["Recall"].value
    assert all(fresh[name].error > 0 for name in ("FID", "KID", "Precision", "Inception Score"))
    assert fresh["FID"].unbiased < fresh["FID"].value
    assert fresh["sFID"].features == FID


def test_the_distance_is_that_of_all_features(measured):
    space = Projection(FID)
    found, _ = measured(Noise(60, seed=5))
    ours, theirs = (space(Noise(60, seed).images(range(60))).numpy()[:, space.parts[MAIN]] for seed in (5, 0))
    assert found["FID"].value == pytest.approx(frechet_distance(Moments.of(ours), Moments.of(theirs)), rel=1e-9)


def test_copies_are_nearest_to_the_reference(measured):
    found, whole = measured(Noise(60), held_out=Noise(60, seed=1))
    assert found["FID"].value == pytest.approx(0, abs=1e-9)
    assert [pair.image == pair.reference and pair.distance == 0 for pair in whole.pairs] == [True] * 10
    assert found["distance to nearest"].value == 0
    assert found["nearer than held-out"].value == 1
    assert (found["Precision"].value, found["Recall"].value) == (1, 1)


def test_fdr_is_in_units_of_held_out_pictures(measured):
    spaces = Projection(FID), Projection("alexnet-conv5/clean-128", width=5)
    held_out = Noise(60, seed=9)
    found, _ = measured(Noise(60, seed=9), *spaces, held_out=held_out)
    assert found["FDr^2"].value == pytest.approx(1, rel=1e-9)
    found, _ = measured(Blurred(0.5, number=60), *spaces, held_out=held_out)
    assert found["FDr^2"].value > 2
    assert found["FDr^2"].error > 0
    real = found["FDr^2"].settings["distances of held-out images"]
    expected = np.mean(
        [found[name].value / real[features] for name, features in (("FID", FID), ("FD-AlexNet", spaces[1].name))]
    )
    assert found["FDr^2"].value == pytest.approx(expected)


def test_what_cannot_be_is_noted(measured):
    found, whole = measured(Noise(4, seed=5), Projection("alexnet-conv5/clean-128"))
    assert {"FD-AlexNet", "sFD-AlexNet", "KID-AlexNet"} <= {*found}
    assert "Inception Score" not in found
    assert "Precision-AlexNet" not in found
    notes = "\n".join(whole.notes)
    assert "precision, recall, density, coverage: left out: 4 pictures" in notes
    assert "FD-AlexNet: 4 pictures are too few for the covariance of 6 features" in notes
    assert "fdr: left out: there are no held-out real pictures" in notes
    assert found["FD-AlexNet"].unbiased is None


def test_only_what_was_asked_for(measured):
    found, _ = measured(Noise(60, seed=5), metrics=["fd", "recall"])
    assert [*found] == ["FID", "Recall"]


def test_agreement_is_the_share_of_right_classes(tmp_path):
    space, pictures = Projection(), Noise(50)
    logits = space(Noise(50).images(range(50)))[:, space.parts["logits"]]
    labels = logits.argmax(1).numpy()
    labels[:10] = (labels[:10] + 1) % 3
    found = agreement(space, table(pictures, space, tmp_path), labels)
    assert found.value == pytest.approx(0.8)
    assert found.error == pytest.approx((0.8 * 0.2 / 50) ** 0.5)


def test_it_is_extrapolated_where_there_are_images_enough_for_it(measured):
    """Four a feature: with fewer the bias does not fall as 1 / N."""
    found = [measured(Noise(number, seed=5), metrics=["fd"])[0]["FID"].unbiased for number in (23, 24)]
    assert found[0] is None
    assert found[1] is not None


def test_what_no_space_has_is_noted(measured):
    found, whole = measured(Noise(60, seed=5), Projection("alexnet-conv5/clean-128"), metrics=["is"])
    assert found == {}
    assert whole.notes == ["is: left out: Inception alone has them."]


def test_spatial_features_alone(measured):
    found, whole = measured(Noise(6, seed=5), metrics=["sfd"])
    assert [*found] == ["sFID"]
    assert whole.notes[0].startswith("sFID: 6 pictures are too few for the covariance of 6 features")


def test_statistics_without_spatial_features(tmp_path):
    """As pytorch-fid writes them."""
    space = Projection(FID)
    np.savez(tmp_path / "fid.npz", mu=np.zeros(6), sigma=np.eye(6))
    reference = StatisticsReference(tmp_path / "fid.npz")
    found = measure([space], [table(Noise(60), space, tmp_path)], reference, ["fd", "sfd"])
    assert [value.metric for value in found.values] == ["FID"]
    assert found.notes == [f"sfd: left out: {tmp_path}/fid.npz holds no statistics of spatial features."]


def test_too_small_a_reference_is_noted(tmp_path):
    space, reference = Projection(FID), PicturesReference(Noise(5), "noise", root=tmp_path)
    reference.prepare([space], 16)
    found = measure([space], [table(Noise(60, seed=5), space, tmp_path)], reference, ["fd"])
    assert found.notes[0].startswith("FID: 5 pictures of the reference are too few for the covariance of 6 features")


def test_held_out_pictures_are_not_the_reference(measured):
    with pytest.raises(DataError, match="held out: is the reference itself"):
        measured(Noise(60, seed=5), metrics=["fdr"], held_out=Noise(60))


def test_a_part_of_the_reference_that_was_searched_is_said(measured, monkeypatch):
    monkeypatch.setattr(measures, "LIMIT", 50)
    found, whole = measured(Noise(60, seed=5), metrics=["nearest", "is"])
    assert whole.notes == [
        "nearest: 50 of 60 pictures of the reference were searched: a copy of another one is not found."
    ]
    assert found["distance to nearest"].settings["reference images"] == 50
    assert found["Inception Score"].settings["images"] == 50


def test_another_number_of_held_out_pictures_is_noted(measured):
    _, whole = measured(Noise(60, seed=5), metrics=["fdr"], held_out=Noise(40, seed=9))
    assert whole.notes == [
        "fdr: of 60 pictures and 40 held-out ones: fewer are farther by their number alone. Take equally many."
    ]
