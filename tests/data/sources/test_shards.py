"""Names of shards."""

import pytest

from ldm.data.sources.shards import braces, expanded
from ldm.errors import ConfigError


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("a.tar", ["a.tar"]),
        ("{008..010}.tar", ["008.tar", "009.tar", "010.tar"]),
        ("{8..10}.tar", ["8.tar", "9.tar", "10.tar"]),
        ("{a,b}/{0..1}", ["a/0", "a/1", "b/0", "b/1"]),
        ("https://host/{0..1}.tar?key={x}", None),
    ],
)
def test_braces(pattern, expected):
    if expected is None:
        with pytest.raises(ConfigError, match=r"found \{x\}"):
            braces(pattern)
    else:
        assert braces(pattern) == expected


def test_the_order_is_as_given():
    assert expanded(["b{1..2}", "a"]) == ["b1", "b2", "a"]
