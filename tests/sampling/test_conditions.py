import numpy as np
import pytest
import torch

from ldm.errors import ConfigError
from ldm.sampling.conditions import check_conditions, columns, rows

CPU = torch.device("cpu")


def test_conditions_are_the_columns_of_a_batch():
    table = columns(
        [
            {"class_label": 3, "caption": "a cat", "score": 0.5, "features": np.ones(2)},
            {"class_label": np.int64(1), "caption": "", "score": 2, "features": [0, 0.25]},
            {"class_label": torch.tensor(2), "caption": "a dog", "score": 1, "features": torch.zeros(2)},
        ]
    )
    assert table["class_label"].dtype == torch.int64
    assert table["class_label"].tolist() == [3, 1, 2]
    assert table["caption"] == ["a cat", "", "a dog"]
    assert table["score"].dtype == table["features"].dtype == torch.float32
    assert table["features"].tolist() == [[1, 1], [0, 0.25], [0, 0]]
    # The numbers of a batch have the type that those of all of them have.
    batch = rows(table, slice(1, 2), CPU)
    assert batch["caption"] == [""]
    assert batch["score"].dtype == torch.float32
    assert batch["features"].shape == (1, 2)


@pytest.mark.parametrize("values", [([1, 2], [1]), (1, [1]), ("a", 1), (None, None), ({}, {}), ([[1], [1, 2]], [1])])
def test_values_that_make_no_batch_are_refused(values):
    with pytest.raises(ConfigError, match="conditions: thing: expected a text, a number, or numbers of one shape"):
        check_conditions([{"thing": value} for value in values], ("thing",), None)


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
        ({"class_label": True}, ("class_label",), "whole number, found True"),
        ({"class_label": 1.0}, ("class_label",), "whole number, found 1.0"),
    ],
)
def test_what_the_model_does_not_know_is_refused(condition, reads, message):
    with pytest.raises(ConfigError, match=message):
        check_conditions([condition], reads, 4)


def test_what_it_knows_is_taken():
    check_conditions([{"class_label": 0}, {"class_label": 3}], ("class_label",), 4)
    check_conditions([{"caption": "a", "class_label": 0}], ("class_label", "caption"), 4)
    check_conditions([{"class_label": np.int64(3)}, {"class_label": torch.tensor(0)}], ("class_label",), 4)
