"""Measure samples, reconstructions or any pictures, and say what is needed to compare the numbers.

    python scripts/evaluate.py -r logs/<run>                             # samples, against what it was trained on
    python scripts/evaluate.py -r logs/<run> -n 50000 --guidance 1.5 --features inception dinov2
    torchrun --nproc-per-node 8 scripts/evaluate.py -r logs/<run> -n 50000   # shared by all ranks
    python scripts/evaluate.py -r logs/<run> --part validation           # inpainting, ...: asked by held-out items
    python scripts/evaluate.py -r logs/<stage-1 run>                     # reconstructions
    python scripts/evaluate.py samples.npz --against VIRTUAL_imagenet256_labeled.npz
    python scripts/evaluate.py folder/ --against configs/diffusion/imagenet_f8_class.yaml --part validation
    python scripts/evaluate.py compare logs/<run> logs/<other run>           # side by side
    python scripts/evaluate.py classifier FILE.yaml --out FILE               # trains one for --classifier

Prints a table, and writes a record (JSON) beside the checkpoint or the pictures: every number with all that decides it.
What other --metrics of the same pictures have found stays in it.
Samples are never kept: they go straight into features, which lie in cache/.features, so that the same command goes on
after an interruption, makes only what is missing when it is asked for more, and is shared by any number of processes.
"""

from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ldm.cli import evaluate_classifier, evaluate_compare, program
from ldm.cli.devices import usable
from ldm.cli.evaluate_options import parse
from ldm.cli.evaluate_subject import held_out_of, reference_of, subject_of
from ldm.errors import CheckpointError, ConfigError, DataError
from ldm.evaluation import record
from ldm.evaluation.feature_store import FeatureStore, key
from ldm.evaluation.features.base import LOGITS, Features, size
from ldm.evaluation.features.choose import choose
from ldm.evaluation.measure import OF_ITEMS, Measured, agreement, check_held_out, measure
from ldm.evaluation.pictures.base import Description, Pictures, digest
from ldm.evaluation.record import Record
from ldm.evaluation.reference import Reference, identity, save
from ldm.evaluation.sheets import pairs_sheet, save_sheet
from ldm.evaluation.subject import Subject
from ldm.evaluation.values import table, titles
from ldm.runtime import distributed
from ldm.training.evaluations import send_to_wandb

SHOWN = 24
"""Pictures of the sheet."""


def chosen_spaces(names: Sequence[str] | None, device: str) -> tuple[list[Features], list[str]]:
    """The feature spaces, and a line on the choice where it was left to us."""
    if names is not None:
        return [choose(name, device=device) for name in dict.fromkeys(names)], []
    try:
        return [choose("inception", device=device)], []
    except (CheckpointError, ConfigError):
        note = (
            "FID is left out, since Inception's weights (or torch-fidelity) are not there: `ldm weights` says how to "
            "get them. The distance is FD-AlexNet, which compares with other FD-AlexNet alone."
        )
        return [choose("alexnet", device=device)], [note]


def check_sizes(subject: Pictures, reference: Reference, called: str = "the reference") -> list[str]:
    """Notes on what differs between the two; DataError if their sizes do."""
    if reference.pictures is None:
        return []
    ours, theirs = subject.shape, reference.pictures.shape
    if ours[1:] != theirs[1:]:
        raise DataError(
            f"the pictures have {ours[1]} x {ours[2]} pixels (height x width), those of {called} {reference.name} "
            f"{theirs[1]} x {theirs[2]}: compare pictures of one size; --resolution resizes and crops those of folders"
        )
    if ours[0] != theirs[0]:
        kinds = {1: "gray", 3: "in color"}
        found = [kinds.get(one, f"of {one} channels") for one in (ours[0], theirs[0])]
        return [f"the pictures are {found[0]}, those of {called} {found[1]}: gray is repeated to three channels"]
    return []


def looked_at(subject: Pictures, reference: Reference, number: int) -> list[str]:
    """A note where all of the first pictures on one side are gray, and those on the other are not."""
    if reference.pictures is None or 1 in (subject.shape[0], reference.pictures.shape[0]):  # which check_sizes notes
        return []
    first = [pictures.images(range(min(number, len(pictures)))) for pictures in (subject, reference.pictures)]
    ours, theirs = ("gray" if bool((images == images[:, :1]).all()) else "in color" for images in first)
    if ours == theirs:
        return []
    return [f"the first {len(first[0])} pictures are {ours}, those of the reference are {theirs}"]


def evaluate(options: Any) -> str | None:
    """Do what the command line asks for; what to print on rank 0."""
    device = usable(options.device)
    spaces, notes = chosen_spaces(options.features, device)
    classifier = None if options.classifier is None else choose(f"classifier:{options.classifier}", device=device)
    subject = subject_of(options, device)
    computed = spaces
    if not {*OF_ITEMS} & {*subject.metrics} and options.save_reference is None:
        computed, notes = [], []  # the others read no features
    labels = checked_labels(subject.pictures, classifier)
    if (number := len(subject.pictures)) < 2:
        raise DataError(f"{subject.name}: {number} pictures, expected 2 or more: a distribution has a spread")
    reference = reference_of(options, subject)
    notes += check_sizes(subject.pictures, reference)
    held_out = held_out_of(options, subject)
    if held_out is not None:
        check_held_out(held_out, reference)
        notes += check_sizes(subject.pictures, held_out, "the held-out pictures")
    for one in (reference, held_out):
        if one is not None:
            one.prepare(computed, options.batch_size)
    if options.save_reference is not None and distributed.is_main():
        save(reference, spaces[0], options.save_reference)
    store = FeatureStore(subject.pictures.description(), number)
    columns = [*subject.columns(computed), *([] if classifier is None else [subject.column_of(classifier)])]
    store.fill(subject.make, columns, options.batch_size, subject.title)
    if not distributed.is_main():
        return None
    tables = [store.table(key(space)) for space in computed]
    measured = measure(computed, tables, reference, subject.metrics, held_out, subject.asked)
    measured = subject.completed(measured, store, computed, reference)
    if classifier is not None and labels is not None:
        measured.values.append(agreement(classifier, store.table(key(classifier)), labels))
    measured.notes[:0] = [*notes, *looked_at(subject.pictures, reference, SHOWN)]
    return written(options, subject, reference, spaces, classifier, measured, store.description, torch.device(device))


def checked_labels(pictures: Pictures, classifier: Features | None) -> np.ndarray | None:
    """The classes that a classifier is to see; refused where there are none, or it knows fewer."""
    if classifier is None:
        return None
    labels, logits = pictures.labels(), classifier.parts[LOGITS]
    if labels is None:
        raise ConfigError("--classifier: the pictures have no classes that it could agree with; leave it out")
    if labels.max() >= (known := size(logits)):
        raise ConfigError(f"--classifier: knows {known} classes, and the pictures have class {labels.max()}")
    return labels


def written(
    options: Any,
    subject: Subject,
    reference: Reference,
    spaces: Sequence[Features],
    classifier: Features | None,
    measured: Measured,
    described: Description,
    device: torch.device,
) -> str:
    """Write the record and its sheets; what to print."""
    protocol = {
        **subject.protocol,
        "reference": {"identity": identity(reference), "kind": reference.description()["kind"], "name": reference.name},
        "features": record.spaces_of(spaces),
        "classifier": None if classifier is None else classifier.weights,
        "device": device.type,
    }
    file = options.out or subject.home / f"{record.file_name(subject.words, protocol)}.json"
    sheets = drawn(subject, reference, measured, file)
    made_in = protocol.get("precision") or record.rounding(described.get("float32"))
    pictures = {"name": subject.name, "kind": subject.kind, "pictures": digest(described)}
    found = Record(
        {**pictures, "training": subject.training},
        protocol,
        measured.values,
        measured.notes,
        sheets,
        record.versions(),
        record.machine(device, made_in),
        record.now(),
    )
    kept = keep(found, file, subject.metrics)
    titled = zip(titles((one.metric, one.features) for one in found.values), found.values, strict=True)
    sent = send_to_wandb(subject.run, {title: one.value for title, one in titled}, subject.step, options.project)
    lines = [
        f"{subject.name}: {len(subject.pictures)} pictures against {reference.name}",
        "",
        table(found.values),
        "",
        *(f"note: {note}" for note in [*found.notes, *kept, *sent]),
        str(file),
        *(str(file.parent / name) for name in sheets.values()),
    ]
    return "\n".join(lines)


def drawn(subject: Subject, reference: Reference, measured: Measured, file: Path) -> dict[str, str]:
    """Write the sheets beside the record; their names, by what they show."""
    sheets = {"pictures": subject.sheet(SHOWN)}
    if measured.pairs and reference.pictures is not None:
        sheets["nearest"] = pairs_sheet(measured.pairs, subject.pictures, reference.pictures)
    named = {name: f"{file.stem}.{name}.png" for name in sheets}
    for name, sheet in sheets.items():
        save_sheet(sheet, file.parent / named[name])
    return named


def keep(found: Record, file: Path, asked: Collection[str]) -> list[str]:
    """Write the record, with the values of one that is there, if they may stand side by side; a line on what was done.

    So `--metrics kid` adds to what an earlier call has measured of the same pictures.
    """
    whole, said = found, []
    if file.is_file():
        with suppress(DataError):  # it is no record
            whole = found.beside(Record.read(file), asked) or found
        if whole is found:
            said = [f"{file}: replaced, since what was there is of other pictures, libraries or another machine"]
        elif others := len(whole.values) - len(found.values):
            said = [f"{file}: still holds {others} other values of the same pictures, which were measured before"]
    whole.write(file)
    return said


def main(argv: Sequence[str]) -> int:
    """Returns the exit code (ldm/errors.py)."""
    for name, other in {"compare": evaluate_compare, "classifier": evaluate_classifier}.items():
        if argv[:1] == [name]:
            return other.main(argv[1:])

    def work() -> None:
        text = evaluate(parse(argv))
        if text is not None:
            print(text)

    return program.answer(work, memory="Lower --batch-size; what is done already is kept.")
