import numpy as np
import pytest
import torch

from ldm.errors import ConfigError
from ldm.sampling.conditions import check_conditions, collate_conditions


def test_conditions_are_the_columns_of_a_batch():
    rows = [
        {"class_label": 3, "caption": "a cat", "score": 0.5, "features": np.ones(2, np.float32)},
        {"class_label": 1, "caption": "", "score": 2.0, "features": np.zeros(2, np.float32)},
    ]
    batch = collate_conditions(rows, torch.device("cpu"))
    assert batch["class_label"].dtype == torch.int64
    assert batch["class_label"].tolist() == [3, 1]
    assert batch["caption"] == ["a cat", ""]
    assert batch["score"].dtype == torch.float32
    assert batch["features"].tolist() == [[1, 1], [0, 0]]


@pytest.mark.parametrize(
    ("condition", "reads", "message"),
    [
        ({"class_label": 1}, (), "trained without conditions"),
        ({"clas_label": 1}, ("class_label",), "keys that the model reads, class_label; found clas_label"),
        ({}, ("class_label",), "found none"),
        ({"caption": "a"}, ("class_label", "caption"), "reads, class_label, caption; found caption"),
        ({"class_label": 4}, ("class_label",), "class 4: expected 0 to 3, the 4 classes"),
        ({"class_label": -1}, ("class_label",), "class -1: expected 0 to 3"),
        ({"class_label": "dress"}, ("class_label",), "class_label: expected a whole number, found 'dress'"),
        ({"class_label": 1.0}, ("class_label",), "whole number, found 1.0"),
    ],
)
def test_what_the_model_does_not_know_is_refused(condition, reads, message):
    with pytest.raises(ConfigError, match=message):
        check_conditions([condition], reads, 4)


def test_what_it_knows_is_taken():
    check_conditions([{"class_label": 0}, {"class_label": 3}], ("class_label",), 4)
    check_conditions([{"caption": "a", "class_label": 0}], ("class_label", "caption"), 4)
