"""From features to numbers: every metric of a set of pictures against a reference, in one space after another."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from ldm.errors import DataError
from ldm.evaluation.agreement import accuracy
from ldm.evaluation.distances.frechet import frechet_distance
from ldm.evaluation.distances.inception_score import inception_score
from ldm.evaluation.distances.kernel import kid
from ldm.evaluation.distances.manifold import Manifold, manifold
from ldm.evaluation.distances.neighbors import Pair, closest_pairs, memorization, nearest
from ldm.evaluation.distances.ratio import mean_ratio
from ldm.evaluation.distances.retrieval import AT, retrieval, shuffled
from ldm.evaluation.distances.spread import blocks, extrapolates, frechet_spread, jackknife, of_blocks
from ldm.evaluation.feature_store import Table
from ldm.evaluation.features.base import LOGITS, MAIN, SPATIAL, Features, size
from ldm.evaluation.reference import Reference, identity, moments
from ldm.evaluation.values import Value, frechet_name, in_space

MANIFOLD = ("precision", "recall", "density", "coverage")
METRICS = ("fd", "sfd", "is", "kid", *MANIFOLD, "fdr", "nearest")
"""Of a set of pictures against a reference, by their names on the command line."""

OF_ITEMS = (*METRICS, "retrieval")
"""Of samples that were asked for by the items of the reference."""

ONE_BY_ONE = ("kid", *MANIFOLD, "nearest")
"""Those that need the reference's features picture by picture."""

MANIFOLD_LIMIT = 10_000
"""Pictures of either side that neighborhoods are computed of, as in ADM's evaluation: time grows with the square."""
LIMIT = 100_000
"""Pictures of either side whose features are in memory at once, for what needs them one by one."""
JACKKNIFE_LIMIT = 5_000
"""Pictures that neighborhoods are computed of eleven times, for their errors."""
BLOCKS = 10
"""Disjoint blocks of the pictures, over which errors are estimated."""
K, DENSITY_K = 3, 5
"""The neighbors that end the balls of precision and recall, and of density and coverage: the authors'."""
PAIRS = 10
"""Of the sheet of closest pairs."""


@dataclass
class Measured:
    """What was found.

    Attributes:
        values: the numbers.
        notes: what was left out, or is to be read with care, a line each.
        pairs: the pictures that are closest to the reference, of the first space.
    """

    values: list[Value] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    pairs: list[Pair] = field(default_factory=list)


def measure(
    spaces: Sequence[Features],
    tables: Sequence[Table],
    reference: Reference,
    metrics: Collection[str] = METRICS,
    held_out: Reference | None = None,
    asked: np.ndarray | None = None,
) -> Measured:
    """All metrics of these names that can be computed.

    Args:
        spaces: the feature spaces.
        tables: the pictures' features in each.
        reference: prepared for these spaces.
        metrics: names of `OF_ITEMS`; what cannot be computed is left out with a note.
        held_out: real pictures that are not in the reference, prepared as well; None: there are none.
        asked: the picture of the reference that each sample was asked for by, (N,); None: by none.

    Raises:
        DataError: fewer than two pictures, or the held-out pictures are the reference itself.
    """
    found = Measured()
    found.notes += _absent(spaces, metrics)
    distances = {}
    for space, table in zip(spaces, tables, strict=True):
        if {"fd", "fdr"} & {*metrics}:
            distances[space.name] = _frechet(space, table, reference, MAIN)
        _distances(found, space, table, reference, metrics, distances)
        _score(found, space, table, metrics)
        if wanted := [name for name in ("kid", *MANIFOLD) if name in metrics]:
            _neighborhoods(found, space, table, reference, wanted)
        if "retrieval" in metrics and asked is not None:
            found.values += _retrieval(space, table, reference, asked)
    if "fdr" in metrics:
        _ratio(found, spaces, len(tables[0]), distances, reference, held_out)
    if "nearest" in metrics:
        _nearest(found, spaces[0], tables[0], reference, held_out)
    return found


def check_held_out(held_out: Reference, reference: Reference) -> None:
    """DataError if they are the same: their distance would be rounding alone."""
    if identity(held_out) == identity(reference):
        raise DataError(f"{held_out.name}: is the reference itself. Name real pictures that are not in the reference.")


def _frechet(space: Features, table: Table, reference: Reference, part: str) -> Value:
    """The Fréchet distance in a part of a space, with its error and what it tends to where they can be known."""
    theirs, columns = reference.moments(space, part), space.parts[part]
    name = frechet_name(space.name) if part == MAIN else f"s{frechet_name(space.name)}"
    settings = {"images": len(table), "reference images": reference.number}
    number = min(BLOCKS, len(table) // 2)
    if number < 2 or len(table) > LIMIT:
        return Value(
            name, frechet_distance(moments(table, space, part), theirs), features=space.name, settings=settings
        )
    spread = frechet_spread(table.array(columns), theirs, number)
    unbiased = spread.unbiased.value if extrapolates(len(table), size(columns)) else None
    measured = spread.measured
    return Value(name, measured.value, measured.error, measured.freedom, unbiased, space.name, "lower", settings)


def _distances(
    found: Measured,
    space: Features,
    table: Table,
    reference: Reference,
    metrics: Collection[str],
    distances: Mapping[str, Value],
) -> None:
    """The Fréchet distances that were asked for."""
    values = {MAIN: distances[space.name]} if "fd" in metrics else {}
    if "sfd" in metrics and SPATIAL in space.parts:
        if reference.has(SPATIAL):
            values[SPATIAL] = _frechet(space, table, reference, SPATIAL)
        else:
            found.notes.append(f"sfd: left out: {reference.name} holds no statistics of spatial features.")
    for part, value in values.items():
        wanted = size(space.parts[part])
        for number, whose in ((len(table), "pictures"), (reference.number, "pictures of the reference")):
            if number is not None and number <= wanted:
                found.notes.append(
                    f"{value.metric}: {number} {whose} are too few for the covariance of {wanted} features: expected "
                    f"more than {wanted}. The distance is defined, and says more of the number of pictures than of "
                    "them."
                )
    found.values += values.values()


def _ratio(
    found: Measured,
    spaces: Sequence[Features],
    images: int,
    distances: Mapping[str, Value],
    reference: Reference,
    held_out: Reference | None,
) -> None:
    """FDr over all spaces: distances in units of that of held-out real pictures, which are taken as given."""
    if held_out is None:
        found.notes.append("fdr: left out: there are no held-out real pictures; name some with --held-out.")
        return
    check_held_out(held_out, reference)
    if held_out.number not in (None, images):
        found.notes.append(
            f"fdr: of {images} pictures and {held_out.number} held-out ones: fewer are farther by their number alone. "
            "Take equally many."
        )
    real = {space.name: frechet_distance(held_out.moments(space), reference.moments(space)) for space in spaces}
    value = mean_ratio({name: one.value for name, one in distances.items()}, real)
    # The same pictures are seen by all spaces: their errors add up.
    errors = {name: one.error for name, one in distances.items() if one.error is not None}
    error = mean_ratio(errors, real) if len(errors) == len(real) else None
    limits = {name: one.unbiased for name, one in distances.items() if one.unbiased is not None}
    unbiased = mean_ratio(limits, real) if len(limits) == len(real) else None
    freedom = None if error is None else min(one.freedom or 0 for one in distances.values())
    name = "FDr" if len(spaces) == 1 else f"FDr^{len(spaces)}"
    settings = {"images": images, "held-out images": held_out.number, "distances of held-out images": real}
    found.values.append(Value(name, value, error, freedom, unbiased, " ".join(real), "lower", settings))


def _scores(space: Features) -> bool:
    return LOGITS in space.parts and space.name.startswith("inception")


def _absent(spaces: Sequence[Features], metrics: Collection[str]) -> list[str]:
    """Notes on what no space has."""
    absent = [("sfd", any(SPATIAL in space.parts for space in spaces)), ("is", any(map(_scores, spaces)))]
    left_out = [name for name, there in absent if name in metrics and not there]
    return [f"{', '.join(left_out)}: left out: Inception alone has them."] if left_out else []


def _score(found: Measured, space: Features, table: Table, metrics: Collection[str]) -> None:
    """The Inception Score, in Inception's own logits alone."""
    if "is" not in metrics or not _scores(space):
        return
    logits = table.array(space.parts[LOGITS], LIMIT)
    splits = min(10, len(logits))
    score = inception_score(logits, splits)
    settings = {"images": len(logits), "splits": splits, "deviation of a split": score.deviation}
    error, freedom = (score.deviation / (splits - 1) ** 0.5, splits - 1) if splits > 1 else (None, None)
    found.values.append(Value("Inception Score", score.mean, error, freedom, None, space.name, "higher", settings))


def _neighborhoods(
    found: Measured, space: Features, table: Table, reference: Reference, metrics: Collection[str]
) -> None:
    """What needs the reference's features picture by picture."""
    other = reference.table(space)
    if other is None:
        found.notes.append(f"{', '.join(metrics)}: left out: {reference.name} holds mean and covariance alone.")
        return
    columns = space.parts[MAIN]
    if "kid" in metrics:
        found.values.append(_kid(space, table.array(columns, LIMIT), other.array(columns, LIMIT)))
    if chosen := [name for name in MANIFOLD if name in metrics]:
        number = min(MANIFOLD_LIMIT, len(table), len(other))
        if number <= DENSITY_K:
            found.notes.append(f"{', '.join(chosen)}: left out: {number} pictures, expected more than {DENSITY_K}.")
        else:
            found.values += _manifold(space, table.array(columns, number), other.array(columns, number), chosen)


def _kid(space: Features, ours: np.ndarray, theirs: np.ndarray) -> Value:
    """The kernel distance; its error is that of the mean over disjoint blocks, and not the subsets' deviation."""
    subset = min(1000, len(ours), len(theirs))
    distance = kid(ours, theirs, subset_size=subset)
    settings = {"images": len(ours), "subsets": 100, "subset size": subset, "subset deviation": distance.deviation}
    value = Value(in_space("KID", space.name), distance.mean, features=space.name, settings=settings)
    if len(ours) < 2 * BLOCKS:
        return value
    parts = [ours[rows] for rows in blocks(ours, BLOCKS)]
    of_parts = [kid(part, theirs, subsets=10, subset_size=min(subset, *map(len, parts))).mean for part in parts]
    estimate = of_blocks(of_parts)
    return replace(value, error=estimate.error, freedom=estimate.freedom)


def _manifold(space: Features, ours: np.ndarray, theirs: np.ndarray, names: Sequence[str]) -> list[Value]:
    """Precision, recall, density and coverage, with errors where computing them eleven times takes no hours."""
    whole = manifold(ours, theirs, K, DENSITY_K)
    rest: list[Manifold] = []
    if 2 * BLOCKS <= len(ours) <= JACKKNIFE_LIMIT:
        rest = [manifold(np.delete(ours, rows, 0), theirs, K, DENSITY_K) for rows in blocks(ours, BLOCKS)]
    settings = {"images": len(ours), "k": K, "density k": DENSITY_K}
    found = []
    for name in names:
        value = getattr(whole, name)
        known = jackknife(value, [getattr(one, name) for one in rest]).measured if rest else None
        error, freedom = (known.error, known.freedom) if known else (None, None)
        called = in_space(name.capitalize(), space.name)
        found.append(Value(called, value, error, freedom, None, space.name, "higher", settings))
    return found


def _nearest(found: Measured, space: Features, table: Table, reference: Reference, held_out: Reference | None) -> None:
    """How near the pictures are to those of the reference, beside real pictures that cannot be copies."""
    other = reference.table(space)
    if other is None:
        found.notes.append(f"nearest: left out: {reference.name} holds mean and covariance alone.")
        return
    columns = space.parts[MAIN]
    theirs = other.array(columns, LIMIT)
    if len(theirs) != reference.number:
        found.notes.append(
            f"nearest: {len(theirs)} of {reference.number or 'an unknown number of'} pictures of the reference were "
            "searched: a copy of another one is not found."
        )
    near = nearest(table.array(columns, MANIFOLD_LIMIT), theirs)
    found.pairs = closest_pairs(near, PAIRS)
    settings: dict[str, Any] = {"images": len(near.distances), "reference images": len(theirs)}
    median = float(np.median(near.distances))
    found.values.append(Value("distance to nearest", median, features=space.name, better="", settings=settings))
    real = None if held_out is None else held_out.table(space)
    if real is None:
        return
    unseen = nearest(real.array(columns, MANIFOLD_LIMIT), theirs)
    copied = memorization(near, unseen)
    settings = {**settings, "held-out images": len(unseen.distances)}
    for name, value in (("relative to held-out", copied.ratio), ("nearer than held-out", copied.nearer)):
        found.values.append(Value(name, value, features=space.name, better="", settings=settings))


def _retrieval(space: Features, table: Table, reference: Reference, asked: np.ndarray) -> list[Value]:
    """Whether samples are found by what they were asked for, and how far they would be by chance."""
    other = reference.table(space)
    assert other is not None, "the items themselves, which are pictures"
    columns = space.parts[MAIN]
    ours, theirs = table.array(columns, LIMIT), other.array(columns, LIMIT)
    own = asked[: len(ours)]
    searched = own < len(theirs)  # of a larger reference the first ones alone are in memory
    ours, own = ours[searched], own[searched]
    found, chance = retrieval(ours, theirs, own), retrieval(ours, theirs, shuffled(own))
    settings = {"images": len(ours), "reference images": len(theirs)}
    values = []
    for name, better in (("first", "higher"), ("among", "higher"), ("median", "lower")):
        value = float(getattr(found, name))
        called = {"first": "Retrieval@1", "among": f"Retrieval@{AT}", "median": "Retrieval median rank"}[name]
        error = None if name == "median" else float(np.sqrt(value * (1 - value) / len(ours)))
        freedom = None if error is None else len(ours) - 1
        by_chance = {**settings, "with shuffled captions": float(getattr(chance, name))}
        values.append(Value(in_space(called, space.name), value, error, freedom, None, space.name, better, by_chance))
    return values


def agreement(classifier: Features, table: Table, labels: np.ndarray) -> Value:
    """How often a classifier sees the class that was asked for, with the binomial's standard error.

    Args:
        classifier: a space with logits.
        table: the pictures' features in it.
        labels: the classes, (N,).
    """
    logits = torch.from_numpy(table.array(classifier.parts[LOGITS]))
    share = accuracy(logits, torch.from_numpy(labels[: len(table)]))
    error = float(np.sqrt(share * (1 - share) / len(table)))
    return Value("agreement with the class", share, error, len(table) - 1, None, classifier.name, "higher")
