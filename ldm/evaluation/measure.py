"""From features to numbers: every metric of a set of pictures against a reference, in one space after another."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ldm.evaluation.agreement import accuracy
from ldm.evaluation.distances.frechet import distance_to, frechet_distance
from ldm.evaluation.distances.inception_score import inception_score
from ldm.evaluation.distances.kernel import kid
from ldm.evaluation.distances.manifold import manifold
from ldm.evaluation.distances.neighbors import Pair, closest_pairs, memorization, nearest
from ldm.evaluation.distances.ratio import mean_ratio
from ldm.evaluation.feature_store import Table
from ldm.evaluation.features.base import LOGITS, MAIN, SPATIAL, Features
from ldm.evaluation.reference import Reference, moments
from ldm.evaluation.values import Value, frechet_name, in_space

MANIFOLD = ("precision", "recall", "density", "coverage")
METRICS = ("fd", "sfd", "is", "kid", *MANIFOLD, "fdr", "nearest")
"""Of a set of pictures against a reference, by their names on the command line."""

MANIFOLD_LIMIT = 10_000
"""Pictures of either side that neighborhoods are computed of, as in ADM's evaluation: time grows with the square."""
REFERENCE_LIMIT = 100_000
"""Pictures of the reference that are in memory at once, for what needs them one by one."""
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
) -> Measured:
    """All metrics of these names that can be computed.

    Args:
        spaces: the feature spaces.
        tables: the pictures' features in each.
        reference: prepared for these spaces.
        metrics: names of `METRICS`; what cannot be computed is left out with a note.
        held_out: real pictures that are not in the reference, prepared as well; None: there are none.

    Raises:
        DataError: fewer than two pictures.
    """
    found = Measured()
    for space, table in zip(spaces, tables, strict=True):
        _distances(found, space, table, reference, metrics)
        _score(found, space, table, metrics)
        _neighborhoods(found, space, table, reference, metrics)
    if "fdr" in metrics:
        _ratio(found, spaces, tables, reference, held_out)
    if "nearest" in metrics:
        _nearest(found, spaces[0], tables[0], reference, held_out)
    return found


def _distances(found: Measured, space: Features, table: Table, reference: Reference, metrics: Collection[str]) -> None:
    """The Fréchet distances."""
    for metric, part in (("fd", MAIN), ("sfd", SPATIAL)):
        if metric not in metrics or part not in space.parts:
            continue
        ours, theirs = moments(table, space, part), reference.moments(space, part)
        name = frechet_name(space.name) if part == MAIN else f"s{frechet_name(space.name)}"
        if ours.rank_deficient:
            found.notes.append(
                f"{name}: {len(table)} pictures are too few for the covariance of {ours.size} features: expected more "
                f"than {ours.size}. The distance is defined, and says more of the number of pictures than of them."
            )
        settings = {"images": len(table), "reference images": reference.number}
        found.values.append(Value(name, frechet_distance(ours, theirs), features=space.name, settings=settings))


def _ratio(
    found: Measured,
    spaces: Sequence[Features],
    tables: Sequence[Table],
    reference: Reference,
    held_out: Reference | None,
) -> None:
    """FDr over all spaces: distances in units of that of held-out real pictures."""
    if held_out is None:
        found.notes.append("fdr: left out: there are no held-out real pictures; name some with --held-out")
        return
    ours, real = {}, {}
    for space, table in zip(spaces, tables, strict=True):
        to_reference = distance_to(reference.moments(space))
        ours[space.name] = to_reference(moments(table, space))
        real[space.name] = to_reference(held_out.moments(space))
    name = "FDr" if len(spaces) == 1 else f"FDr^{len(spaces)}"
    settings = {"images": len(tables[0]), "held-out images": held_out.number, "distances of held-out images": real}
    found.values.append(Value(name, mean_ratio(ours, real), features=" ".join(ours), settings=settings))


def _score(found: Measured, space: Features, table: Table, metrics: Collection[str]) -> None:
    """The Inception Score, in Inception's own logits alone."""
    if "is" not in metrics or LOGITS not in space.parts or not space.name.startswith("inception"):
        return
    splits = min(10, len(table))
    score = inception_score(table.array(space.parts[LOGITS]), splits)
    name = "Inception Score"
    found.values.append(Value(name, score.mean, score.deviation, None, space.name, "higher", {"splits": splits}))


def _neighborhoods(
    found: Measured, space: Features, table: Table, reference: Reference, metrics: Collection[str]
) -> None:
    """What needs the reference's features picture by picture."""
    wanted = [name for name in ("kid", *MANIFOLD) if name in metrics]
    other = reference.table(space)
    if other is None or not wanted:
        if wanted:
            found.notes.append(f"{', '.join(wanted)}: left out: {reference.name} holds mean and covariance alone.")
        return
    columns = space.parts[MAIN]
    if "kid" in wanted:
        size = min(1000, len(table), len(other))
        ours, theirs = table.array(columns, REFERENCE_LIMIT), other.array(columns, REFERENCE_LIMIT)
        distance = kid(ours, theirs, subset_size=size)
        name, settings = in_space("KID", space.name), {"subsets": 100, "subset size": size}
        found.values.append(Value(name, distance.mean, distance.deviation, None, space.name, "lower", settings))
    if chosen := [name for name in MANIFOLD if name in wanted]:
        number = min(MANIFOLD_LIMIT, len(table), len(other))
        if number <= DENSITY_K:
            found.notes.append(f"{', '.join(chosen)}: left out: {number} pictures, expected more than {DENSITY_K}.")
            return
        shares = manifold(table.array(columns, number), other.array(columns, number), K, DENSITY_K)
        settings = {"images": number, "k": K, "density k": DENSITY_K}
        for name in chosen:
            called = in_space(name.capitalize(), space.name)
            found.values.append(Value(called, getattr(shares, name), None, None, space.name, "higher", settings))


def _nearest(found: Measured, space: Features, table: Table, reference: Reference, held_out: Reference | None) -> None:
    """How near the pictures are to those of the reference, beside real pictures that cannot be copies."""
    other = reference.table(space)
    if other is None:
        found.notes.append(f"nearest: left out: {reference.name} holds mean and covariance alone.")
        return
    columns = space.parts[MAIN]
    theirs = other.array(columns, REFERENCE_LIMIT)
    near = nearest(table.array(columns, MANIFOLD_LIMIT), theirs)
    found.pairs = closest_pairs(near, PAIRS)
    settings: dict[str, Any] = {"images": len(near.distances), "reference images": len(theirs)}
    median = float(np.median(near.distances))
    found.values.append(Value("distance to nearest", median, None, None, space.name, "", settings))
    real = None if held_out is None else held_out.table(space)
    if real is None:
        return
    unseen = nearest(real.array(columns, MANIFOLD_LIMIT), theirs)
    copied = memorization(near, unseen)
    settings = {**settings, "held-out images": len(unseen.distances)}
    for name, value in (("relative to held-out", copied.ratio), ("nearer than held-out", copied.nearer)):
        found.values.append(Value(name, value, None, None, space.name, "", settings))


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
    return Value("agreement with the class", share, error, None, classifier.name, "higher")
