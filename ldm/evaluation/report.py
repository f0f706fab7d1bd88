"""How good samples are, beside reconstructions and real images, in the eyes of a classifier of the real images.

Every row of the report is as many images of each class, and none of them was seen by the classifier in training, so
that their accuracies and Fréchet distances can be compared with one another.
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
from ldm.evaluation.features.classifier import Classifier, judge, train_classifier, unit_range
from ldm.evaluation.metrics import accuracy, frechet_distance
from ldm.images import grid, to_uint8
from ldm.ranges import Resolution
from ldm.sampling.generate import generate
from ldm.sampling.guidance import Guidance
from ldm.sampling.pipeline import Pipeline

BATCH = 100


class Pictures(NamedTuple):
    """`images` (N,C,H,W) uint8 with their `labels` (N,) int64."""

    images: Tensor
    labels: Tensor

    def take(self, rows: Tensor | slice) -> "Pictures":
        return Pictures(self.images[rows], self.labels[rows])


class Score(NamedTuple):
    """`accuracy` in [0, 1]: how often the classifier sees the label; `distance`: Fréchet, to the test set."""

    accuracy: float
    distance: float


class Report(NamedTuple):
    """Pictures and scores of each row, by its name, and the classifier's accuracy on the whole test set."""

    pictures: dict[str, Pictures]
    scores: dict[str, Score]
    test_accuracy: float

    def markdown(self) -> str:
        rows = [[name, f"{row.accuracy:.1%}", f"{row.distance:.2f}"] for name, row in self.scores.items()]
        rows.append(["the whole test set", f"{self.test_accuracy:.1%}", "0"])
        return markdown(["images", "classifier accuracy", "Fréchet distance to the test set"], rows)

    def sheet(self, columns: int = 10) -> np.ndarray:
        """A picture (H,W,3) uint8: a grid for each row of the report, side by side, in each a line a class."""
        grids = []
        for pictures in self.pictures.values():
            classes = len(pictures.labels.unique())
            number = min(columns, len(pictures.labels) // classes)
            chosen = of_each_class(pictures, number, classes).images.expand(-1, 3, -1, -1)
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
    """Judge real images, their reconstructions, and samples.

    Args:
        pipeline: of a class-conditional model.
        train: what both stages were trained on; a tenth is kept from the classifier, and gives the real images.
        test: of the same classes.
        number: images of each class.
        epochs: of the classifier's training.
        guidance_scales: a row of samples for each.
        steps: of DDIM.
    """
    classes = pipeline.num_classes
    if classes is None:
        raise ConfigError("quality is judged by class, and this model was trained without classes")
    resolution, codec = pipeline.manifest.plan.pixels["resolution"], pipeline.codec
    trained = Judge.trained(train, test, resolution, codec.encoder.in_channels, epochs)
    real = of_each_class(trained.unseen, number, classes)
    pictures = {"real": real, "reconstructions of these": reconstructions(codec, real)}
    for scale in guidance_scales:
        pictures[f"samples, guidance {scale:g}"] = samples(pipeline, number, classes, steps, scale)
    return Report(pictures, {name: trained(row) for name, row in pictures.items()}, trained.test_accuracy)


class Judge(NamedTuple):
    """A classifier of real images: judge(pictures) -> Score.

    Attributes:
        classifier: it.
        reference: its features of the test set.
        test_accuracy: on the test set.
        unseen: real images of the training set that it was not trained on.
        classes: how many it knows.
    """

    classifier: Classifier
    reference: Tensor
    test_accuracy: float
    unseen: Pictures
    classes: int

    @classmethod
    def trained(
        cls, train: ImageDataset, test: ImageDataset, resolution: Resolution, channels: int, epochs: int
    ) -> "Judge":
        """On all but a tenth of `train`, whose pictures are brought to the resolution and channels of the model's."""
        known, tested = (read(dataset, resolution, channels) for dataset in (train, test))
        kept, classes = len(known.labels) * 9 // 10, int(known.labels.max()) + 1
        classifier = train_classifier(*known.take(slice(kept)), classes, epochs=epochs)
        reference = judge(classifier, tested.images)
        test_accuracy = accuracy(reference.logits, tested.labels)
        return cls(classifier, reference.features, test_accuracy, known.take(slice(kept, None)), classes)

    def __call__(self, pictures: Pictures) -> Score:
        seen = judge(self.classifier, pictures.images)
        return Score(accuracy(seen.logits, pictures.labels), frechet_distance(seen.features, self.reference))


def read(dataset: ImageDataset, resolution: Resolution, channels: int) -> Pictures:
    """A labelled data set's pictures as the autoencoder gets them (EvalTransform)."""
    transform, items = EvalTransform(resolution), [dataset[index] for index in range(len(dataset))]
    images = [transformed(item["image"], transform, channels, dataset.path(index)) for index, item in enumerate(items)]
    return Pictures(to_uint8(torch.stack(images)), torch.tensor([item["class_label"] for item in items]))


def of_each_class(pictures: Pictures, number: int, num_classes: int) -> Pictures:
    """The first `number` of every class, class by class.

    Raises:
        DataError: there are not so many.
    """
    rows = [torch.nonzero(pictures.labels == label)[:number, 0] for label in range(num_classes)]
    short = [label for label, found in enumerate(rows) if len(found) < number]
    if short:
        raise DataError(f"class {short[0]}: expected {number} images, found {len(rows[short[0]])}. Ask for fewer.")
    return pictures.take(torch.cat(rows))


def reconstructions(codec: Codec, pictures: Pictures) -> Pictures:
    """Through the autoencoder, by the posterior's mean."""
    decoded = [codec.decode(codec.encode(unit_range(batch))[0]).cpu() for batch in pictures.images.split(BATCH)]
    return Pictures(to_uint8(torch.cat(decoded)), pictures.labels)


def samples(pipeline: Pipeline, number: int, num_classes: int, steps: int, guidance_scale: float) -> Pictures:
    """`number` of every class, class by class, by DDIM, no two from the same noise."""
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
