"""Judges of boxes and maps: trained and used from the command line, and every wrong one in one message."""

from pathlib import Path
from typing import Any

import pytest

from ldm.cli import evaluate
from ldm.config.load import to_yaml
from ldm.evaluation.features.classifier import Classifier
from ldm.evaluation.features.classifier import save as save_classifier
from ldm.evaluation.features.segmenter import Segmenter
from ldm.evaluation.judges import BoxClassifier, MapSegmenter
from ldm.evaluation.record import Record
from tests.dense_models import save_dense
from tests.evaluation.spaces import Projection
from tests.tiny_dense import CLASSES, Scenes

BOXES = [*"abcdefghi"]
MAP = [f"color {number}" for number in range(CLASSES)]
READS = {"boxes": ("boxes", "boxes_mask"), "map": ("map",)}
FLAG = {"boxes": "--boxes-classifier", "map": "--segmenter"}


class Named(Scenes):
    """Scenes whose classes have names."""

    def aligned_keys(self):
        return ["map", "boxes"]

    def map_classes(self):
        return MAP

    def box_classes(self):
        return BOXES


def data(**changes: Any) -> dict[str, Any]:
    columns = {"boxes": "Boxes", "map": "Map"}
    return {
        "train": {"target": "tests.cli.test_evaluate_judges.Named", "params": {"number": 24}},
        "batch_size": 4,
        "resolution": 16,
        "num_validation": 8,
        "autoencoder": None,
        "aligned": {key: {"target": f"ldm.latents.aligned.{name}", "params": {}} for key, name in columns.items()},
    } | changes


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """An empty folder to work in, and a feature space that needs no weights."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setattr(evaluate, "choose", lambda name, device: Projection(name))


@pytest.fixture
def config(autoencoder_tree) -> Path:
    """Of stage 1, on the pictures of `data`."""
    own = data()
    autoencoder_tree["data"]["params"] |= {"train": own["train"], "num_validation": own["num_validation"]}
    Path("x.yaml").write_text(to_yaml(autoencoder_tree))
    return Path("x.yaml")


@pytest.fixture(scope="module")
def dense(runs, tmp_path_factory):
    """dense("boxes"), dense("map") -> run folder of a model that reads them."""
    facts = {"box_class_names": BOXES, "map_class_names": MAP, "map_classes": CLASSES}
    made: dict[str, Path] = {}

    def make(key: str) -> Path:
        if key not in made:
            keys = READS.get(key, (key,))
            made[key] = save_dense(tmp_path_factory.mktemp("dense") / "run", runs, keys, data(facts=facts))
        return made[key]

    return make


def train(config: Path, of: str, *more: str) -> int:
    return evaluate.main(["classifier", str(config), "--of", of, "--trust", "tests", "--epochs", "1", *more])


def words(run: Path, *more: Any) -> list[str]:
    quick = ("--steps", 2, "-n", 10, "--features", "inception-2015/tf1-299", "--trust", "tests", "--out", "here.json")
    return [*map(str, ("-r", run, *quick, *more))]


def judge(key: str, names: list[str] | None = None) -> str:
    """The file of one that knows nothing."""
    if key == "boxes":
        BoxClassifier(Classifier(3, len(BOXES), 4), (16, 16), names or BOXES).save(Path("judge.safetensors"))
    else:
        MapSegmenter(Segmenter(3, len(MAP), 4), (16, 16), names or MAP).save(Path("judge.safetensors"))
    return "judge.safetensors"


NAMES = {"boxes": ["accuracy in boxes"], "map": ["pixel accuracy of the map", "mIoU of the map"]}


@pytest.mark.parametrize("key", READS)
def test_it_is_trained_says_how_good_it_is_and_judges_samples(key, config, dense, capsys):
    assert train(config, key) == 0, capsys.readouterr().err
    first, figures = capsys.readouterr().out.splitlines()[-2:]
    number, learned = {"boxes": (9, "boxes of"), "map": (40, "16 pictures with maps of")}[key]
    assert first.startswith(f"{key}.safetensors: {number} classes, 1 epochs of ")
    assert f"{learned} x.yaml (train)" in first
    assert figures.startswith(f"on 8 pictures that it has not seen (validation): {NAMES[key][0]} ")

    run = dense(key)
    assert evaluate.main(words(run, FLAG[key], f"{key}.safetensors")) == 0, capsys.readouterr().err
    record = Record.read(Path("here.json"))
    assert record.protocol["judges"] == {key: judge_of(key).weights}
    own = {name: record.value(name) for name in NAMES[key]}
    beside = {f"{name}{end}" for name in own for end in (", shuffled", ", real pictures")}
    assert beside <= {one.metric for one in record.values}
    assert all(0 <= one.value <= 1 and one.error is not None for one in own.values())
    notes = [note for note in record.notes if note.startswith(f"{key}:")]
    nothing = {"boxes": ["samples have an empty layout, which counts for nothing"], "map": []}
    assert [note.partition("10 ")[2] for note in notes] == nothing[key]

    Path("cache").rename("cache64")
    again = words(run, FLAG[key], f"{key}.safetensors", "--batch-size", "3", "--metrics", key)
    assert evaluate.main(again) == 0
    assert {name: Record.read(Path("here.json")).value(name) for name in own} == own


def judge_of(key: str) -> Any:
    return {"boxes": BoxClassifier, "map": MapSegmenter}[key].load(Path(f"{key}.safetensors"))


def test_training_is_a_function_of_its_command(config):
    assert train(config, "boxes", "--images", "12") == 0
    first = judge_of("boxes")
    assert (first.names, first.size) == (BOXES, (16, 16))
    assert train(config, "boxes", "--images", "12") == 0
    assert judge_of("boxes").weights == first.weights
    assert train(config, "boxes", "--images", "8") == 0
    assert judge_of("boxes").weights != first.weights


def test_data_that_teaches_nothing(config, image_folder, capsys):
    here = f"data.params.train={{target: ldm.data.sources.folder.ImageFolder, params: {{root: {image_folder}}}}}"
    for key in READS:
        assert train(config, key, here) == 2
        assert f"have image, class_label, and no {key}: name the configuration of" in capsys.readouterr().err
    empty = "{0: {boxes: []}}"
    few = f"data.params.train={{target: tests.tiny_dense.Scenes, params: {{number: 1, changes: {empty}}}}}"
    assert train(config, "boxes", few, "data.params.num_validation=0") != 0
    assert "x.yaml: none of 1 items has a box" in capsys.readouterr().err
    unlabeled = "data.params.train.params.broken=[0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23]"
    assert train(config, "map", unlabeled) != 0
    assert "can be read" in capsys.readouterr().err
    assert not [*Path().glob("*.safetensors")]


def test_judges_that_do_not_fit(dense, runs, capsys):
    save_classifier(Classifier(3, 2, 4), 16, Path("classes.safetensors"))
    own = judge("boxes")
    for given, message in {
        (dense("boxes"), FLAG["map"], own): "--segmenter: this model reads boxes, boxes_mask, and no map; leave it out",
        (dense("map"), FLAG["boxes"], own): "--boxes-classifier: this model reads map, and no boxes; leave it out",
        (runs.diffusion, FLAG["boxes"], own): "this model reads class_label, and no boxes",
        (runs.autoencoder, FLAG["boxes"], own): "--boxes-classifier: reconstructions were not asked for by boxes",
        (dense("map"), FLAG["map"], own): "holds a classifier of boxes, which --boxes-classifier takes; expected a seg",
        (dense("boxes"), FLAG["boxes"], "classes.safetensors"): "holds a classifier, which --classifier takes",
        (dense("boxes"), FLAG["boxes"], "none"): "none: no such file; expected a classifier of boxes",
        (dense("boxes"), FLAG["boxes"], own, "--metrics", "fd"): "--boxes-classifier: --metrics has no boxes; add it",
        (dense("boxes"), "--metrics", "boxes"): "it needs a classifier of boxes (--boxes-classifier FILE)",
    }.items():
        assert evaluate.main(words(*given)) != 0
        assert message in capsys.readouterr().err
    for key, names in {"boxes": ["x", *BOXES[1:]], "map": ["x", *MAP[1:]]}.items():
        assert evaluate.main(words(dense(key), FLAG[key], judge(key, names))) == 2
        assert f"{FLAG[key]}: its class 0 is 'x', and the model's is " in capsys.readouterr().err
