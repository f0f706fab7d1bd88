"""Train a small judge on a configuration's data set, for `ldm evaluate`.

    python scripts/evaluate.py classifier configs/fashion_mnist/autoencoder.yaml --out classifier.safetensors
    python scripts/evaluate.py classifier FILE.yaml --of boxes --out boxes.safetensors    # for --boxes-classifier
    python scripts/evaluate.py classifier FILE.yaml --of map --out map.safetensors        # for --segmenter

It is trained on the training part, at the size that the model is trained at, and never sees a sample: how often it sees
what a sample was asked for says whether samples show what they were asked to show. A classifier learns the classes of
pictures, or of what is in their boxes; a segmenter draws their maps. How good they are on the validation part, which is
printed, is what real pictures would have. All pictures are held in memory.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ldm.cli import program
from ldm.cli.options import Parser, called, path, split_overrides, whole_number
from ldm.errors import ConfigError
from ldm.files import check_writable
from ldm.ranges import Count


class _Asked(NamedTuple):
    """What the command line says: of which configuration, and how."""

    config: Path
    overrides: Sequence[str]
    trust: Sequence[str]
    epochs: Count
    images: Count | None
    out: Path


class _Lesson(NamedTuple):
    """How a judge is trained: the function, which returns what to print, and what holds where nothing is said."""

    train: Callable[[_Asked], str]
    epochs: Count
    out: str


def main(argv: Sequence[str]) -> int:
    """Returns the exit code (ldm/errors.py)."""
    parser = Parser(
        prog=f"{called('evaluate.py', 'evaluate')} classifier",
        description="Train a small judge for `evaluate --classifier`, `--boxes-classifier` or `--segmenter`.",
        epilog="Words of the form key=value override the configuration.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("config", type=path, metavar="YAML", help="whose data set it learns, such as that of the autoencoder")
    add("--of", choices=LESSONS, default="classes", help="what it learns (default: %(default)s)")
    files = ", ".join(lesson.out for lesson in LESSONS.values())
    add("--out", type=path, metavar="FILE", help=f"(default: {files})")
    epochs = ", ".join(f"of {name} {lesson.epochs}" for name, lesson in LESSONS.items())
    add("--epochs", type=whole_number, help=f"(default: {epochs})")
    add("--images", type=whole_number, metavar="N", help="training pictures that it learns from (default: all)")
    add("--trust", nargs="+", default=[], metavar="PACKAGE", help="packages that targets may name")

    def work() -> None:
        overrides, words = split_overrides(argv)
        options = parser.parse_strictly(words)
        lesson = LESSONS[options.of]
        epochs, out = options.epochs or lesson.epochs, options.out or Path(lesson.out)
        if out.is_dir():
            raise ConfigError(f"--out {out}: is a folder; expected the name of a file")
        check_writable(out.parent, "--out")
        if out.is_file():
            print(f"{out}: is there, and will be replaced")
        print(lesson.train(_Asked(options.config, overrides, options.trust, epochs, options.images, out)))

    return program.answer(work, memory="Take fewer --images: all are held in memory.")


def of_classes(asked: _Asked) -> str:
    """A classifier of pictures.

    Raises:
        ConfigError: the data set has no classes.
        DataError: a picture cannot be read.
    """
    from ldm.evaluation.agreement import accuracy
    from ldm.evaluation.features.classifier import judge, save, train_classifier

    found = _part(asked, "train")
    images, labels = _read(found.pictures, asked, "training", asked.images)
    classes = int(labels.max()) + 1
    classifier = train_classifier(images, labels, classes, epochs=asked.epochs)
    save(classifier, found.pictures.shape[1:], asked.out)

    def figures(unseen: Any) -> str:
        images, labels = _read(unseen.pictures, asked, "validation")
        share = accuracy(judge(classifier, images).logits, labels)
        return f"accuracy on {len(labels)} pictures that it has not seen (validation): {share:.1%}"

    return _said(asked, f"{classes} classes", f"{len(labels)} pictures", figures)


def of_boxes(asked: _Asked) -> str:
    """A classifier of what is in boxes."""
    from ldm.evaluation.agreement import BoxAgreement
    from ldm.evaluation.features.classifier import train_classifier
    from ldm.evaluation.judges import BoxClassifier
    from ldm.evaluation.labeled import in_boxes

    return _of_items(asked, in_boxes, train_classifier, lambda *trained: BoxAgreement(BoxClassifier(*trained)))


def of_map(asked: _Asked) -> str:
    """A segmenter."""
    from ldm.evaluation.agreement import MapAgreement
    from ldm.evaluation.features.segmenter import train_segmenter
    from ldm.evaluation.judges import MapSegmenter
    from ldm.evaluation.labeled import with_maps

    return _of_items(asked, with_maps, train_segmenter, lambda *trained: MapAgreement(MapSegmenter(*trained)))


def _of_items(asked: _Asked, learned: Any, train: Any, judging: Any) -> str:
    """A judge of what lies on the pictures.

    Args:
        learned: what of the items it learns.
        train: the function that trains its network.
        judging: network, size and names of classes -> how it agrees with items.

    Raises:
        ConfigError: nothing of that kind lies on them.
        DataError: none can be read, or what lies on them is empty.
    """
    from ldm.evaluation import labeled

    found = _part(asked, "train")
    seen = learned(found, asked.images, asked.config)
    network = train(seen.images, seen.labels, seen.num_classes, epochs=asked.epochs)
    agreement = judging(network, found.pictures.transform.size, seen.names)
    agreement.judge.save(asked.out)

    def figures(unseen: Any) -> str:
        counts = labeled.counts(agreement, unseen, asked.config)
        shares = ", ".join(f"{one.metric} {one.value:.1%}" for one in agreement.figures(counts)) or "nothing to judge"
        return f"on {len(counts)} pictures that it has not seen (validation): {shares}"

    return _said(asked, f"{seen.num_classes} classes", f"{len(seen.labels)} {seen.what}", figures)


LESSONS = {
    "classes": _Lesson(of_classes, 4, "classifier.safetensors"),
    "boxes": _Lesson(of_boxes, 4, "boxes.safetensors"),
    "map": _Lesson(of_map, 4, "map.safetensors"),
}
"""By what is learned."""


def _part(asked: _Asked, part: str) -> Any:
    from ldm.evaluation.pictures import configured

    return configured.of_file(asked.config, asked.overrides, asked.trust, part)


def _said(asked: _Asked, classes: str, pictures: str, figures: Callable[[Any], str]) -> str:
    """What to print: what was learned, and how well, from the part that it has not seen."""
    from ldm.evaluation.pictures.configured import NoSuchPart

    lines = [f"{asked.out}: {classes}, {asked.epochs} epochs of {pictures} of {asked.config} (train)"]
    try:
        unseen = _part(asked, "validation")
    except NoSuchPart:
        return "\n".join([*lines, "its accuracy is not known: the configuration has no validation part"])
    return "\n".join([*lines, figures(unseen)])


def _read(pictures: Any, asked: _Asked, part: str, most: Count | None = None) -> tuple[Any, Any]:
    """All pictures, or the first `most` of them, (N,C,H,W) uint8, and their classes (N,)."""
    import torch

    from ldm.runtime import signals
    from ldm.runtime.progress import shown

    labels = pictures.labels()
    if labels is None:
        raise ConfigError(
            f"{asked.config}: its data set has no classes, or they are not known without reading every picture"
        )
    batches, number = [], min(most or len(pictures), len(pictures))
    with shown(f"{part} pictures") as show:
        for start in range(0, number, 256):
            signals.stop_if_asked()
            show(start, number)
            batches.append(pictures.images(range(start, min(number, start + 256))))
        show(number, number)
    return torch.cat(batches), torch.from_numpy(labels[:number]).long()
