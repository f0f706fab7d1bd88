"""What `ldm evaluate` measures, and what it is compared with, from the command line."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ldm import run_folder
from ldm.cli import evaluate_judges, evaluate_run
from ldm.cli.evaluate_options import OF_RECONSTRUCTIONS, OF_SAMPLES, check_metrics, check_named, is_configuration
from ldm.cli.evaluate_reconstructions import reconstructions
from ldm.cli.evaluate_samples import samples
from ldm.errors import LdmError
from ldm.evaluation.measure import METRICS, ONE_BY_ONE
from ldm.evaluation.pictures import configured
from ldm.evaluation.pictures.base import Scattered
from ldm.evaluation.pictures.configured import NoSuchPart
from ldm.evaluation.pictures.stored import opened
from ldm.evaluation.reference import PicturesReference, Reference, StatisticsReference, holds, holds_statistics
from ldm.evaluation.subject import Asked, Reconstructed, Subject


def subject_of(options: Any, device: str) -> Subject:
    """What the command line asks to measure; everything is loaded, nothing computed.

    Raises:
        LdmError: it cannot be measured.
    """
    if options.run is None:
        check_metrics(options.metrics, "pictures", METRICS)
        evaluate_judges.refuse(options, "these pictures")
        check_named(options, "pictures")
        return _stored(options)
    path = run_folder.named(options.run)
    if evaluate_run.kind(path) == "autoencoder":
        check_metrics(options.metrics, "reconstructions", OF_RECONSTRUCTIONS)
        evaluate_judges.refuse(options, "reconstructions")
        check_named(options, "reconstructions")
        return reconstructions(options, path, device)
    check_metrics(options.metrics, "samples", OF_SAMPLES)
    check_named(options, "samples")
    return samples(options, path, device)


def reference_of(options: Any, subject: Subject) -> Reference:
    """What the command line, or else the subject itself, says that it is compared with."""
    if options.against is None or isinstance(subject, Reconstructed):
        assert subject.own_reference is not None  # pictures are refused without --against
        with _named_otherwise("--against"):
            return subject.own_reference()
    word, *overrides = options.against
    path = Path(os.path.expanduser(word))
    if is_configuration(word):
        found = configured.of_file(path, overrides, options.trust, _part(options, subject))
        return PicturesReference(found.pictures, f"{path} ({found.part})", options.reference_images)
    if holds_statistics(path):
        needed = holds(path, "arr_0") and {*ONE_BY_ONE} & {*subject.metrics}
        sample = _pictures_reference(options, path, options.reference_images) if needed else None
        return StatisticsReference(path, sample)
    return _pictures_reference(options, path, options.reference_images)


def held_out_of(options: Any, subject: Subject) -> Reference | None:
    """Real pictures that are not in the reference: named, or the validation part where that is the training part."""
    if not {"fdr", "nearest"} & {*subject.metrics} or isinstance(subject, Reconstructed):
        return None
    if options.held_out is not None:
        return _pictures_reference(options, options.held_out)
    if options.against is None:
        return None if subject.own_held_out is None else subject.own_held_out()
    if _part(options, subject) == "validation":
        return None
    word, *overrides = options.against
    if not is_configuration(word):
        return None
    with suppress(NoSuchPart):
        found = configured.of_file(Path(os.path.expanduser(word)), overrides, options.trust, "validation")
        return PicturesReference(found.pictures, f"{word} (validation)")
    return None


def _part(options: Any, subject: Subject) -> str:
    """Of a configuration that is compared with; where items ask for samples, --part says which these are."""
    return "train" if isinstance(subject, Asked) else options.part or "train"


def _pictures_reference(options: Any, path: Path, number: int | None = None) -> PicturesReference:
    return PicturesReference(Scattered(opened(path, _resolution(options))), str(path), number)


@contextmanager
def _named_otherwise(flag: str) -> Iterator[None]:
    """Errors of a run's own data also say how to name another."""
    try:
        yield
    except LdmError as error:
        raise type(error)(f"{error}\nName another with {flag}.") from error


def _resolution(options: Any) -> Any:
    return None if options.resolution is None else tuple(options.resolution * 2)[:2]


def _stored(options: Any) -> Subject:
    path: Path = options.pictures
    pictures = Scattered(opened(path, _resolution(options)), options.images)
    protocol = {"kind": "pictures", "images": len(pictures), "resolution": _resolution(options)}
    return Subject(
        name=str(path),
        kind="pictures",
        pictures=pictures,
        home=path.absolute().parent,
        words=[path.name.removesuffix(".npz"), str(len(pictures))],
        protocol=protocol,
        metrics=options.metrics or METRICS,
    )
