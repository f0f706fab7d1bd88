"""Score samples, reconstructions and real images with a classifier that was trained on real images.

Every row of the report has the same number of images of each class, none of which the classifier saw in training, so
accuracies and Fréchet distances can be compared between rows.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ldm.autoencoder.codec import Codec
from ldm.data.dataset import ImageDataset
from ldm.data.transforms import EvalTransform, transformed
from ldm.errors import ConfigError, DataError
from ldm.evaluation.agreement import accuracy
from ldm.evaluation.distances.frechet import frechet_distance
from ldm.evaluation.features.classifier import Classifier, judge, train_classifier, unit_range
from ldm.evaluation.moments import Moments
from ldm.images import grid, to_uint8
from ldm.ranges import Resolution
from ldm.sampling.generate import generate
from ldm.sampling.guidance import Guidance
from ldm.sampling.pipeline import Pipeline

BATCH = 100


class Pictures(NamedTuple):
    """`images` (N,C,H,W) uint8 and their `labels` (N,) int64."""

    images: Tensor
    labels: Tensor

    def take(self, rows: Tensor | slice) -> "Pictures":
        return Pictures(self.images[rows], self.labels[rows])


class Score(NamedTuple):
    """`accuracy` in [0, 1]: how often the classifier predicts the label; `distance`: Fréchet, to the test set."""

    accuracy: float
    distance: float


class Report(NamedTuple):
    """The images and scores of each row by its name, and the classifier's accuracy on the whole test set."""

    pictures: dict[str, Pictures]
    scores: dict[str, Score]
    test_accuracy: float

    def markdown(self) -> str:
        rows = [[name, f"{row.accuracy:.1%}", f"{row.distance:.2f}"] for name, row in self.scores.items()]
        rows.append(["the whole test set", f"{self.test_accuracy:.1%}", "0"])
        return markdown(["images", "classifier accuracy", "Fréchet distance to the test set"], rows)

    def sheet(self, columns: int = 10) -> np.ndarray:
        """The rows of the report side by side, each as a grid with one line per class: (H,W,3 or 1) uint8."""
        grids = []
        for pictures in self.pictures.values():
            classes = len(pictures.labels.unique())
            number = min(columns, len(pictures.labels) // classes)
            chosen = of_each_class(pictures, number, classes).images
            if chosen.shape[1] == 1:
                chosen = chosen.expand(-1, 3, -1, -1)
            grids.append(grid([*chosen.permute(0, 2, 3, 1).numpy()], number))
        return np.concatenate(grids, axis=1)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows))


def compare(
    pipeline: Pipeline,
    train: ImageDataset,
    test: ImageDataset,
    number: int,
    epochs: int,
    guidance_scales: Sequence[float],
    steps: int,
) -> Report:
    """Score real images, their reconstructions, and samples.

    Args:
        pipeline: a class-conditional model.
        train: the data set of both stages; a tenth is held out from the classifier and provides the real images.
        test: a test set with the same classes.
        number: images per class.
        epochs: how long the classifier is trained.
        guidance_scales: each gives one row of samples.
        steps: DDIM steps.
    """
    classes = pipeline.num_classes
    if classes is None:
        raise ConfigError("quality is judged by class, and this model was trained without classes")
    if others := [key for key in pipeline.conditioner.keys if key != "class_label"]:
        raise ConfigError(f"quality is judged by class alone, and this model also reads {', '.join(others)}")
    resolution, codec = pipeline.manifest.plan.pixels["resolution"], pipeline.codec
    trained = Judge.trained(train, test, resolution, codec.in_channels, epochs)
    real = of_each_class(trained.unseen, number, classes)
    pictures = {"real": real, "reconstructions of these": reconstructions(codec, real)}
    for scale in guidance_scales:
        pictures[f"samples, guidance {scale:g}"] = samples(pipeline, number, classes, steps, scale)
    return Report(pictures, {name: trained(row) for name, row in pictures.items()}, trained.test_accuracy)


class Judge(NamedTuple):
    """A trained classifier that scores images: judge(pictures) -> Score.

    Attributes:
        classifier: trained on real images.
        reference: the moments of its features of the test set.
        test_accuracy: its accuracy on the test set.
        unseen: images of the training set that it was not trained on.
        classes: the number of classes.
    """

    classifier: Classifier
    reference: Moments
    test_accuracy: float
    unseen: Pictures
    classes: int

    @classmethod
    def trained(
        cls, train: ImageDataset, test: ImageDataset, resolution: Resolution, channels: int, epochs: int
    ) -> "Judge":
        """Trained on nine tenths of `train`, with images converted to the model's resolution and channels."""
        known, tested = (read(dataset, resolution, channels) for dataset in (train, test))
        kept, classes = len(known.labels) * 9 // 10, int(known.labels.max()) + 1
        classifier = train_classifier(*known.take(slice(kept)), classes, epochs=epochs)
        reference = judge(classifier, tested.images)
        test_accuracy = accuracy(reference.logits, tested.labels)
        moments = Moments.of(reference.features)
        return cls(classifier, moments, test_accuracy, known.take(slice(kept, None)), classes)

    def __call__(self, pictures: Pictures) -> Score:
        seen = judge(self.classifier, pictures.images)
        distance = frechet_distance(Moments.of(seen.features), self.reference)
        return Score(accuracy(seen.logits, pictures.labels), distance)


def read(dataset: ImageDataset, resolution: Resolution, channels: int) -> Pictures:
    """The images of a labeled data set, transformed as for the autoencoder (EvalTransform)."""
    transform, items = EvalTransform(resolution), [dataset[index] for index in range(len(dataset))]
    images = [transformed(item["image"], transform, channels, dataset.path(index)) for index, item in enumerate(items)]
    return Pictures(to_uint8(torch.stack(images)), torch.tensor([item["class_label"] for item in items]))


def of_each_class(pictures: Pictures, number: int, num_classes: int) -> Pictures:
    """The first `number` images of every class, sorted by class.

    Raises:
        DataError: a class has fewer.
    """
    rows = [torch.nonzero(pictures.labels == label)[:number, 0] for label in range(num_classes)]
    short = [label for label, found in enumerate(rows) if len(found) < number]
    if short:
        raise DataError(f"class {short[0]}: expected {number} images, found {len(rows[short[0]])}. Ask for fewer.")
    return pictures.take(torch.cat(rows))


def reconstructions(codec: Codec, pictures: Pictures) -> Pictures:
    """The images encoded to the mean of the posterior and decoded."""
    decoded = [codec.decode(codec.encode(unit_range(batch))[0]).cpu() for batch in pictures.images.split(BATCH)]
    return Pictures(to_uint8(torch.cat(decoded)), pictures.labels)


def samples(pipeline: Pipeline, number: int, num_classes: int, steps: int, guidance_scale: float) -> Pictures:
    """`number` DDIM samples of every class, sorted by class, each from noise of its own."""
    labels = torch.arange(num_classes).repeat_interleave(number)
    made = generate(
        pipeline,
        range(len(labels)),
        [{"class_label": label} for label in labels.tolist()],
        steps=steps,
        guidance=Guidance(guidance_scale),
        batch_size=BATCH,
        progress=True,
    )
    images = torch.from_numpy(np.stack([sample.image for sample in made])).permute(0, 3, 1, 2)
    return Pictures(images.contiguous(), labels)
