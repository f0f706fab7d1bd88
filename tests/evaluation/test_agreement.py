"""What judges say of samples: against closed forms and other libraries, with judges that are right by construction."""

import numpy as np
import pytest
import torch
from torchmetrics.functional.classification import multiclass_jaccard_index

from ldm.errors import DataError
from ldm.evaluation.agreement import BoxAgreement, MapAgreement, accuracy
from ldm.evaluation.features.classifier import Classifier
from ldm.evaluation.features.segmenter import Segmenter
from ldm.evaluation.followed import Followed
from ldm.evaluation.judges import BoxClassifier, MapSegmenter, crops

CLASSES = 5
QUARTERS = torch.tensor([[0, 0, 0.5, 0.5], [0.5, 0, 1, 0.5], [0, 0.5, 0.5, 1], [0.5, 0.5, 1, 1]])


def test_accuracy_counts_hits() -> None:
    logits = torch.tensor([[2.0, 1.0], [0.0, 3.0], [5.0, 4.0], [1.0, 0.0]])
    assert accuracy(logits, torch.tensor([0, 1, 1, 0])) == 0.75


class Right:
    """A judge that reads the class off the color: 10 times as bright."""

    num_classes, weights = CLASSES, "right"

    def __call__(self, images, boxes=None):
        if boxes is None:
            return images[:, 0].long() // 10
        return crops(images, boxes)[:, 0].float().mean((1, 2)).div(10).round().long()


def randomly(*shape, seed=0, most=CLASSES):
    return torch.randint(most, shape, generator=torch.Generator().manual_seed(seed))


def rolled(conditions):
    return [*conditions[1:], conditions[0]]


def layouts(number, seed=0):
    """Pictures whose quarters have the colors of their classes, and their conditions."""
    classes = randomly(number, 4, seed=seed)
    images = (10 * classes.view(-1, 1, 2, 2)).byte().repeat_interleave(8, 2).repeat_interleave(8, 3)
    conditions = [{"boxes": torch.cat([QUARTERS, one[:, None].float()], 1)} for one in classes]
    return images, conditions, classes


def found(agreement, made):
    rows = agreement.rows(made).float().numpy()  # as a store keeps them
    return {one.metric: one for one in agreement.values(rows)}, agreement.notes(rows)


def test_a_judge_of_boxes_that_is_right():
    images, conditions, classes = layouts(100)
    values, notes = found(BoxAgreement(Right()), Followed(images, images, conditions, rolled(conditions)))
    assert [*values] == ["accuracy in boxes", "accuracy in boxes, shuffled", "accuracy in boxes, real pictures"]
    own, shuffled, real = values.values()
    assert (own.value, own.error, real.value) == (1, 0, 1)
    hits = (classes == classes.roll(-1, 0)).double().mean(1)
    assert shuffled.value == pytest.approx(hits.mean().item())
    assert shuffled.error == pytest.approx(hits.std().item() / 10)
    assert abs(shuffled.value - 1 / CLASSES) < 4 * shuffled.error, "is chance"
    assert (own.better, shuffled.better, real.better) == ("higher", "", "")
    assert own.settings == {"items": 100, "counted": 400}
    assert (own.freedom, notes) == (99, [])


def test_samples_that_show_something_else():
    images, conditions, _ = layouts(50)
    others, _, _ = layouts(50, seed=1)
    values, _ = found(BoxAgreement(Right()), Followed(others, images, conditions, rolled(conditions)))
    assert values["accuracy in boxes"].value < 0.4
    assert values["accuracy in boxes, real pictures"].value == 1


def test_boxes_count_alike_and_empty_layouts_for_nothing():
    images, conditions, _ = layouts(4)
    conditions[1] = {"boxes": conditions[1]["boxes"][:1]}
    conditions[2] = {"boxes": torch.zeros(0, 5)}
    images[0] = 0  # the class of no more than some of its boxes
    values, notes = found(BoxAgreement(Right()), Followed(images, images, conditions, rolled(conditions)))
    hits = int((conditions[0]["boxes"][:, 4] == 0).sum())
    assert values["accuracy in boxes"].value == (hits + 1 + 4) / 9
    assert values["accuracy in boxes"].settings == {"items": 3, "counted": 9}
    assert notes == ["boxes: 1 of 4 samples have an empty layout, which counts for nothing"]
    nothing = [{"boxes": torch.zeros(0, 5)}] * 4
    values, notes = found(BoxAgreement(Right()), Followed(images, images, nothing, nothing))
    assert (values, len(notes)) == ({}, 1)
    alone = Followed(images[1:2], images[1:2], conditions[1:2], conditions[1:2])
    assert found(BoxAgreement(Right()), alone)[0]["accuracy in boxes"].error is None


def test_a_class_that_no_judge_knows():
    images, conditions, _ = layouts(2)
    conditions[1]["boxes"][0, 4] = 7
    with pytest.raises(DataError, match="boxes: the judge knows classes 0 to 4, found 7"):
        BoxAgreement(Right()).rows(Followed(images, images, conditions, conditions))
    maps = [{"map": torch.full((16, 16), 9, dtype=torch.uint8)}] * 2
    with pytest.raises(DataError, match="map: the judge knows classes 0 to 4, found 9"):
        MapAgreement(Right()).rows(Followed(images, images, maps, maps))


def pictures(maps):
    return (10 * maps[:, None]).byte()


def test_a_segmenter_that_is_right():
    maps = randomly(30, 12, 20)
    conditions = [{"map": one.byte()} for one in maps]
    images = pictures(maps)
    values, notes = found(MapAgreement(Right()), Followed(images, images, conditions, rolled(conditions)))
    assert [*values] == [f"{name}{beside}" for beside in ("", ", shuffled", ", real pictures") for name in NAMES]
    assert [values[name].value for name in NAMES] == [1, 1]
    assert values["mIoU of the map"].error == 0
    shuffled = values["pixel accuracy of the map, shuffled"]
    assert abs(shuffled.value - 1 / CLASSES) < 4 * shuffled.error < 0.05
    # Of independent maps in which all classes are as frequent: p^2 / (2 p - p^2).
    assert values["mIoU of the map, shuffled"].value == pytest.approx(1 / (2 * CLASSES - 1), abs=0.01)
    assert notes == []


NAMES = ("pixel accuracy of the map", "mIoU of the map")


@pytest.mark.parametrize(("dtype", "unlabeled"), [(torch.uint8, 255), (torch.int16, -1), (torch.int16, 255)])
def test_the_mean_iou_is_that_of_torchmetrics(dtype, unlabeled):
    maps, seen = randomly(6, 9, 7, most=CLASSES - 1), randomly(6, 9, 7, seed=1, most=CLASSES - 1)  # one is nowhere
    maps[randomly(6, 9, 7, seed=2) == 0] = unlabeled
    maps[3] = unlabeled
    conditions = [{"map": one.to(dtype)} for one in maps]
    values, notes = found(
        MapAgreement(Right()), Followed(pictures(seen), pictures(seen), conditions, rolled(conditions))
    )
    theirs = multiclass_jaccard_index(seen, maps, CLASSES, ignore_index=unlabeled)
    assert values["mIoU of the map"].value == pytest.approx(theirs.item(), rel=1e-6)
    labeled = maps != unlabeled
    expected = (seen == maps)[labeled].double().mean().item()
    assert values["pixel accuracy of the map"].value == pytest.approx(expected, rel=1e-6)
    assert values["pixel accuracy of the map"].settings == {"items": 5, "counted": int(labeled.sum())}
    assert notes == [f"map: {1 - labeled.double().mean():.1%} of the pixels are unlabeled, and count for nothing"]


def test_errors_are_those_of_repeated_trials():
    values = []
    for trial in range(60):
        maps, seen = randomly(40, 4, 4, seed=trial), randomly(40, 4, 4, seed=1000 + trial)
        seen = torch.where(randomly(40, 1, 1, seed=2000 + trial) > 1, maps, seen)  # right in whole pictures
        conditions = [{"map": one.byte()} for one in maps]
        images = pictures(seen)
        values.append(found(MapAgreement(Right()), Followed(images, images, conditions, conditions))[0])
    for name in NAMES:
        spread = np.std([one[name].value for one in values], ddof=1)
        assert np.mean([one[name].error for one in values]) == pytest.approx(spread, rel=0.35)


def test_samples_of_the_same_items_are_no_surer():
    images, conditions, _ = layouts(10)
    once = BoxAgreement(Right()).rows(Followed(images, images, rolled(conditions), conditions)).numpy()
    one, other = (
        BoxAgreement(Right(), 10).values(rows)[0] for rows in (once, np.concatenate([once, once, once[:1] * 0]))
    )
    assert (one.value, one.error, one.freedom) == pytest.approx((other.value, other.error, other.freedom))
    assert other.settings == {"items": 10, "counted": 80}


def test_batches_change_nothing():
    images, conditions, classes = layouts(12)
    maps = classes[:, 0, None, None].expand(-1, 16, 16).byte()
    asked = [one | {"map": own} for one, own in zip(conditions, maps, strict=True)]
    asked[4] = asked[4] | {"boxes": torch.zeros(0, 5)}
    torch.manual_seed(0)
    noise = torch.randint(256, (12, 3, 16, 16)).byte()
    made = Followed(noise, images.expand(-1, 3, -1, -1), asked, rolled(asked))
    box, segmenter = BoxClassifier(Classifier(3, 9, 4), (16, 16)), MapSegmenter(Segmenter(3, 9, 4), (16, 16))
    for agreement in (BoxAgreement(box), MapAgreement(segmenter)):
        whole = agreement.rows(made)
        parts = [agreement.rows(Followed(*(one[start : start + 5] for one in made))) for start in (0, 5, 10)]
        assert torch.equal(whole, torch.cat(parts))
        assert agreement.column.key == type(agreement)(agreement.judge).column.key
    other = BoxAgreement(BoxClassifier(Classifier(3, 9, 4), (16, 16)))
    assert other.column.key != BoxAgreement(box).column.key, "of another judge"
