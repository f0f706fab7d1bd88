"""The section `randomness`: written into new runs, absent from those before it, checked as any other."""

import pytest

from ldm.config.load import from_tree
from ldm.config.randomness import STANDARD, chosen, written
from ldm.config.tree import from_plain
from ldm.errors import ConfigError
from ldm.normals import CounterBased, GeneratorPerRow
from ldm.randomness import KeyedBijection, StoredPermutation

FORMER_NORMALS = {"target": "ldm.normals.GeneratorPerRow"}
FORMER_ORDER = {"target": "ldm.randomness.StoredPermutation"}


def test_a_run_without_it_has_what_runs_had():
    found = chosen({"seed": 3})
    assert type(found.normals) is GeneratorPerRow
    assert type(found.order) is StoredPermutation
    partly = chosen({"randomness": {"order": STANDARD["order"]}})
    assert type(partly.normals) is GeneratorPerRow
    assert type(partly.order) is KeyedBijection


def test_a_new_run_has_the_standard_beside_what_it_says():
    plain = written(from_plain({"seed": 3}, "a.yaml")).plain()
    assert plain == {"seed": 3, "randomness": STANDARD}
    found = chosen(plain)
    assert type(found.normals) is CounterBased
    assert type(found.order) is KeyedBijection
    said = written(from_plain({"randomness": {"order": FORMER_ORDER}, "seed": 3}, "a.yaml")).plain()
    assert said["randomness"] == {"normals": STANDARD["normals"], "order": FORMER_ORDER}


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"normal": FORMER_NORMALS}, r"randomness\.normal \(a\.yaml\): .* did you mean 'normals'\?"),
        ({"order": FORMER_NORMALS}, r"randomness\.order \(a\.yaml\): expected Order, found ldm\.normals\.Generator"),
        ({"order": "stored"}, r"randomness\.order \(a\.yaml\): expected Order, found str 'stored'"),
        ({"normals": {"target": "os.system"}}, r"randomness\.normals\.target .* refused"),
        ("former", r"randomness \(a\.yaml\): expected a mapping with normals, order, found str 'former'"),
        (None, r"randomness \(a\.yaml\): expected a mapping with normals, order, found null"),
        (FORMER_ORDER, r"randomness \(a\.yaml\): expected a mapping with normals, order, found a mapping with target"),
    ],
)
def test_mistakes_are_named(section, message):
    objects = {"model": {"target": "torch.nn.Identity"}, "data": {"target": "torch.nn.Identity"}}
    with pytest.raises(ConfigError, match=message):
        from_tree({"seed": 1, "randomness": section, **objects}, "a.yaml").check()
