"""Train a small classifier on a configuration's data set, for `ldm evaluate --classifier FILE`.

    python scripts/evaluate.py classifier configs/fashion_mnist/autoencoder.yaml --out classifier.safetensors

It is trained on the training part, at the size that the model is trained at, and never sees a sample: how often it sees
the class that a sample was made of says whether samples show what they were asked to show. Its own accuracy on the
validation part, which is printed, is what real pictures would have. All pictures are held in memory.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ldm.cli import program
from ldm.cli.options import Parser, called, path, split_overrides, whole_number
from ldm.errors import ConfigError
from ldm.ranges import Count


def main(argv: Sequence[str]) -> int:
    """Returns the exit code (ldm/errors.py)."""
    parser = Parser(
        prog=f"{called('evaluate.py', 'evaluate')} classifier",
        description="Train a small classifier for `evaluate --classifier`.",
        epilog="Words of the form key=value override the configuration.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("config", type=path, metavar="YAML", help="whose data set it learns, such as that of the autoencoder")
    add("--out", type=path, default=Path("classifier.safetensors"), metavar="FILE", help="(default: %(default)s)")
    add("--epochs", type=whole_number, default=4, help="(default: 4)")
    add("--trust", nargs="+", default=[], metavar="PACKAGE", help="packages that targets may name")

    def work() -> None:
        overrides, words = split_overrides(argv)
        options = parser.parse_strictly(words)
        print(train(options.config, overrides, options.trust, options.epochs, options.out))

    return program.answer(work)


def train(config: Path, overrides: Sequence[str], trust: Sequence[str], epochs: Count, out: Path) -> str:
    """Train and save it; what to print.

    Raises:
        ConfigError: the data set has no classes.
        DataError: a picture cannot be read.
    """
    from ldm.evaluation.features.classifier import save, train_classifier
    from ldm.evaluation.pictures import configured

    found = configured.of_file(config, overrides, trust, "train")
    images, labels = _read(found.pictures, config, "training")
    classes = int(labels.max()) + 1
    classifier = train_classifier(images, labels, classes, epochs=epochs)
    save(classifier, found.pictures.shape[1:], out)
    lines = [f"{out}: {classes} classes, {epochs} epochs of {len(labels)} pictures of {config} (train)"]
    try:
        unseen = configured.of_file(config, overrides, trust, "validation").pictures
    except configured.NoSuchPart:
        return "\n".join([*lines, "its accuracy is not known: the configuration has no validation part"])
    from ldm.evaluation.agreement import accuracy
    from ldm.evaluation.features.classifier import judge

    images, labels = _read(unseen, config, "validation")
    share = accuracy(judge(classifier, images).logits, labels)
    return "\n".join([*lines, f"accuracy on {len(labels)} pictures that it has not seen (validation): {share:.1%}"])


def _read(pictures: Any, config: Path, part: str) -> tuple[Any, Any]:
    """All pictures (N,C,H,W) uint8 and their classes (N,)."""
    import torch

    from ldm.runtime import signals
    from ldm.runtime.progress import shown

    labels = pictures.labels()
    if labels is None:
        raise ConfigError(f"{config}: its data set has no classes, or they are not known without reading every picture")
    batches, number = [], len(pictures)
    with shown(f"{part} pictures") as show:
        for start in range(0, number, 256):
            signals.stop_if_asked()
            show(start, number)
            batches.append(pictures.images(range(start, min(number, start + 256))))
        show(number, number)
    return torch.cat(batches), torch.from_numpy(labels).long()
