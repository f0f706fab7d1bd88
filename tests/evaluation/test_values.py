"""Names of metrics, and numbers as people read them."""

import pytest

from ldm.evaluation.values import Value, frechet_name, in_space, space, spelled, table


@pytest.mark.parametrize(
    ("features", "name", "kid"),
    [
        ("inception-2015/tf1-299", "FID", "KID"),
        ("inception-2015/clean-299", "clean-FID", "KID-Inception"),
        ("alexnet-conv5/clean-128", "FD-AlexNet", "KID-AlexNet"),
        ("dinov2-large-cls/pillow-224", "FD-DINOv2", "KID-DINOv2"),
        ("something/clean-64", "FD-something", "KID-something"),
    ],
)
def test_fid_is_the_name_of_inceptions_alone(features, name, kid):
    assert frechet_name(features) == name
    assert in_space("KID", features) == kid
    assert space(features) in name + " Inception"


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (12.3456, None, "12.35"),
        (12.3456, 0.0, "12.35"),
        (12.3456, 0.456, "12.35 ± 0.46"),
        (1234.5, 45.6, "1234 ± 46"),
        (0.00123, 0.000045, "0.001230 ± 0.000045"),
    ],
)
def test_numbers_have_the_digits_that_their_error_leaves(value, error, text):
    assert spelled(value, error) == text


def test_a_table_says_which_way_is_better():
    values = [Value("FID", 12.0, 0.5, 9, 11.0, "inception-2015/tf1-299"), Value("Precision", 0.5, better="higher")]
    first, second = table(values).splitlines()[2:]
    assert [cell.strip() for cell in first.split("|")[1:-1]] == [
        "FID ↓",
        "12.00 ± 0.50",
        "11",
        "inception-2015/tf1-299",
    ]
    assert [cell.strip() for cell in second.split("|")[1:-1]] == ["Precision ↑", "0.5", "", ""]


def test_values_are_told_apart_without_their_bias():
    assert Value("FID", 12.0, 0.5, 9, 11.0).estimate[:2] == (11.0, 0.5)
    assert Value("KID", 12.0, 0.5, 9).estimate[:2] == (12.0, 0.5)
    assert Value("Precision", 0.5).estimate is None
