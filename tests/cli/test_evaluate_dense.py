"""`ldm evaluate` of models that read what lies on pictures: beside the truth, and beside what knows nothing."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ldm.cli import evaluate, evaluate_samples, evaluate_subject
from ldm.evaluation import feature_store, subject
from ldm.evaluation.followed import bicubic, followed, mean_filled
from ldm.evaluation.record import Record
from tests.dense_models import save_dense
from tests.evaluation.spaces import Projection

SPACE = "inception-2015/tf1-299"
MASKED = ("mask", "masked_latent")


def of_tests(name: str, **params: Any) -> dict[str, Any]:
    return {"target": f"tests.tiny_dense.{name}", "params": params}


DATA = {
    "train": of_tests("Scenes", number=14),
    "autoencoder": None,
    "batch_size": 4,
    "resolution": 16,
    "num_validation": 5,
    "drawn": {"low_resolution": of_tests("Quartered")},
    "aligned": {"map": {"target": "ldm.latents.aligned.Map"}, "image": {"target": "ldm.latents.aligned.Pixels"}},
    "masked": {"target": "ldm.latents.masked.MaskedLatents", "params": {"masks": of_tests("Blocks")}},
}


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """An empty folder to work in, and a feature space that needs no weights."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setattr(evaluate, "choose", lambda name, device: Projection(name))


@pytest.fixture(scope="module")
def dense(runs, tmp_path_factory):
    """dense(keys) -> run folder of a model that reads them."""
    made: dict[tuple[str, ...], Path] = {}

    def make(*keys: str) -> Path:
        if keys not in made:
            made[keys] = save_dense(tmp_path_factory.mktemp("dense") / "run", runs, keys, DATA)
        return made[keys]

    return make


def words(run: Path, *more: Any, number: int = 12) -> list[str]:
    quick = ("--steps", "2", "-n", number, "--features", SPACE, "--trust", "tests")
    return [str(word) for word in ("-r", run, *quick, *more)]


def measured(run: Path, *more: Any, out: str = "here.json", **kinds: Any) -> Record:
    assert evaluate.main(words(run, *more, "--out", out, **kinds)) == 0
    return Record.read(Path(out))


def numbers(record: Record) -> dict[str, float]:
    return {one.metric: one.value for one in record.values}


def samples_of(run: Path, number: int, *more: str) -> subject.Asked:
    found = evaluate_samples.samples(evaluate.parse(words(run, *more, number=number)), run, "cpu")
    assert isinstance(found, subject.Asked)
    return found


def test_the_hole_beside_a_mean_fill(dense):
    run = dense(*MASKED)
    record = measured(run, "--seed", 3)  # the items go round, and seeds go on
    made = followed(samples_of(run, 12, "--seed", "3").pictures, range(12))
    holes = np.stack([condition["mask"].numpy() > 0 for condition in made.conditions])
    images, truths, filled = made.images.numpy(), made.truths.numpy(), mean_filled(made).numpy()
    assert np.array_equal(np.where(holes, 0, images), np.where(holes, 0, truths))
    for name, pictures in {"": images, ", mean fill": filled}.items():
        errors = [(a.astype(float) - b)[:, hole[0]] for a, b, hole in zip(pictures, truths, holes, strict=True)]
        expected = [10 * np.log10(255**2 / (error**2).mean()) for error in errors if error.size]
        value = record.value(f"PSNR in the hole{name}")
        assert value.value == pytest.approx(np.mean(expected), rel=1e-6)
        assert value.settings == {"images": len(expected)}
        assert len(expected) < 12, "some holes are empty"
    assert "FID, mean fill" in numbers(record)
    assert any(note.startswith("LPIPS: left out") for note in record.notes)  # 16 pixels
    assert record.protocol["labels"].startswith("items ")
    assert record.protocol["reference"]["name"] == "its own data (train)"


def test_super_resolution_beside_bicubic(dense, tmp_path):
    run = dense("low_resolution")
    made = followed(samples_of(run, 12).pictures, range(12))
    (tmp_path / "truths").mkdir()
    for index, truth in enumerate(made.truths):
        Image.fromarray(truth.permute(1, 2, 0).numpy()).save(tmp_path / "truths" / f"{index}.png")
    record = measured(run, "--against", "truths")
    np.savez("bicubic.npz", arr_0=bicubic(made).permute(0, 2, 3, 1).numpy())
    against = ["bicubic.npz", "--against", "truths", "--features", SPACE, "--metrics", "fd", "--out", "b.json"]
    assert evaluate.main(against) == 0
    found, beside = numbers(record), numbers(Record.read(Path("b.json")))
    assert found["FID, bicubic"] == pytest.approx(beside["FID"], rel=1e-6)
    assert found["FID, bicubic"] != found["FID"]
    names = [*found]
    assert names.index("FID, bicubic") == names.index("FID") + 1
    assert names[-4:] == ["PSNR", "PSNR, bicubic", "SSIM", "SSIM, bicubic"]
    assert found["PSNR, bicubic"] > found["PSNR"], "of an untrained model"
    assert Image.open(record.sheets["pictures"]).size == (4 * 66 + 2, 12 * 66 + 2)


def test_batches_and_ranks_change_nothing(dense, forked, monkeypatch):
    monkeypatch.setattr(feature_store, "BLOCK", 5)
    run = dense("low_resolution")
    alone = measured(run)
    Path("cache").rename("cache64")
    small = measured(run, "--batch-size", "2", out="small.json")
    Path("cache").rename("cache2")
    assert forked(2, lambda rank: evaluate.main(words(run, "--out", "ranks.json"))) == [0, 0]
    assert numbers(Record.read(Path("ranks.json"))) == numbers(alone)
    assert numbers(small) == pytest.approx(numbers(alone), rel=1e-3)


def test_others_are_asked_by_the_next_item(dense):
    maps = samples_of(dense("map"), 12)
    pictures = maps.pictures
    whole = followed(pictures, range(12))
    assert all((a["map"] == b["map"]).all() for a, b in zip(whole.others, whole.conditions[1:], strict=False))
    few = followed(pictures, [3, 9])
    assert (few.others[0]["map"] == whole.conditions[4]["map"]).all()
    # There are nine items.
    assert (whole.conditions[9]["map"] == whole.conditions[0]["map"]).all()
    reference = maps.own_reference().pictures
    assert (whole.truths[:9] == reference.images(range(9))).all(), "item by item"
    assert not (whole.images[9] == whole.images[0]).all()


def test_held_out_items_ask_and_training_pictures_are_the_reference(dense, capsys):
    run = dense(*MASKED)
    one, other = measured(run), measured(run, "--part", "validation")
    assert one.protocol["reference"] == other.protocol["reference"]
    assert one.protocol["labels"] != other.protocol["labels"]
    assert "Retrieval@1" in numbers(one)
    assert "Retrieval@1" not in numbers(other)
    assert "FDr" in numbers(other)
    assert evaluate.main(words(run, "--part", "validation", "--metrics", "retrieval")) == 2
    assert "leave out --part validation" in capsys.readouterr().err


def test_what_is_asked_for_alone_is_measured(dense, capsys):
    run = dense("low_resolution")
    assert [*numbers(measured(run, "--metrics", "psnr"))] == ["PSNR", "PSNR, bicubic"]
    assert [*numbers(measured(run, "--metrics", "fd", out="fd.json"))] == ["FID", "FID, bicubic"]
    assert "PSNR" in numbers(measured(run, "--metrics", "fd")), "is added to what is there"
    for metric, message in {
        "lpips": "--metrics lpips: it compares pictures of 1 or 3 channels and 31 pixels or more",
        "map": "samples of a model that reads low_resolution have none; they have fd",
    }.items():
        assert evaluate.main(words(run, "--metrics", metric)) == 2
        assert message in capsys.readouterr().err


def test_features_that_no_metric_reads_are_not_computed(dense, monkeypatch):
    space = Projection(SPACE)
    monkeypatch.setattr(evaluate, "choose", lambda name, device: space)
    measured(dense("low_resolution"), "--metrics", "psnr")
    assert space.seen == 0
    measured(dense("low_resolution"), "--metrics", "fd")
    assert space.seen > 0


def test_what_nobody_can_judge_is_noted(dense, capsys):
    run = dense("map")
    assert any(note.startswith("map: left out: it needs a segmenter") for note in measured(run).notes)
    assert evaluate.main(words(run, "--metrics", "map")) == 2
    assert "--metrics map: it needs a segmenter (--segmenter FILE)" in capsys.readouterr().err


def test_no_more_samples_are_made_than_the_sheet_shows(dense, monkeypatch):
    found, made = samples_of(dense("low_resolution"), 24), []

    def noted(pictures, indices):
        made.append(len(indices))
        return followed(pictures, indices)

    monkeypatch.setattr(subject, "followed", noted)
    found.sheet(24)
    assert made == [12]


def test_held_out_items_ask_and_training_pictures_of_another_configuration_are_compared_with(dense, monkeypatch):
    run = dense("low_resolution")
    options = evaluate.parse(words(run, "--part", "validation", "--against", "other.yaml"))
    found = evaluate_samples.samples(options, run, "cpu")
    parts = []

    def of_file(path, overrides, trust, part):
        parts.append(part)
        return SimpleNamespace(pictures=found.own_reference().pictures, part=part)

    monkeypatch.setattr(evaluate_subject.configured, "of_file", of_file)
    assert evaluate_subject.reference_of(options, found).name == "other.yaml (train)"
    assert evaluate_subject.held_out_of(options, found).name == "other.yaml (validation)"
    assert parts == ["train", "validation"]
