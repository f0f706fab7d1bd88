"""The judges of `ldm evaluate`: files of its command line, as measures of what samples were asked by."""

from typing import Any

from ldm.errors import ConfigError
from ldm.evaluation.agreement import Agreement, BoxAgreement, MapAgreement
from ldm.evaluation.features.judge_file import BOXES, MAP, Kind
from ldm.evaluation.judges import BoxClassifier, MapSegmenter
from ldm.evaluation.pictures.made import Generated


def judges(options: Any, pictures: Generated, device: str) -> dict[str, Agreement]:
    """By the key of a condition that each looks for.

    Raises:
        CheckpointError: a file is missing, or holds another kind of judge.
        ConfigError: the model reads nothing that it looks for, or has other classes or pictures.
    """
    reads, dense = pictures.pipeline.conditioner.keys, pictures.pipeline.dense
    shown = pictures.shape[0], (pictures.shape[1], pictures.shape[2])
    asking = None if pictures.recipe.items is None else len(pictures.recipe.items)
    found: dict[str, Agreement] = {}
    for kind, file in given(options).items():
        if kind.name not in reads:
            what = f"reads {', '.join(reads)}, and no {kind.name}" if reads else "reads no conditions"
            raise ConfigError(f"{kind.flag}: this model {what}; leave it out")
        if options.metrics is not None and kind.name not in options.metrics:
            raise ConfigError(f"{kind.flag}: --metrics has no {kind.name}; add it, or leave out the file")
        if kind is BOXES:
            classifier = BoxClassifier.load(file).to(device)
            classifier.check(*shown, None, dense.box_classes)
            found[kind.name] = BoxAgreement(classifier, asking)
        else:
            segmenter = MapSegmenter.load(file).to(device)
            segmenter.check(*shown, dense.num_map_classes, dense.map_classes)
            found[kind.name] = MapAgreement(segmenter, asking)
    return found


def given(options: Any) -> dict[Kind, Any]:
    """The files of judges, by kind."""
    files = {BOXES: options.boxes_classifier, MAP: options.segmenter}
    return {kind: file for kind, file in files.items() if file is not None}


def refuse(options: Any, what: str) -> None:
    """ConfigError for judges of pictures that nobody has asked for by boxes or maps."""
    for kind in given(options):
        raise ConfigError(f"{kind.flag}: {what} were not asked for by {kind.name}; leave it out")
