"""The section `randomness`: what makes a run's noise and the order of its items (ldm/randomness.py::Randomness).

    randomness:
      normals: {target: ldm.normals.CounterBased}
      order: {target: ldm.randomness.KeyedBijection}

It is written into each new run. Runs from before there was a choice do not have it, and go on with what they had.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ldm.config.load import build
from ldm.config.merging import merge
from ldm.config.tree import Node, from_plain

if TYPE_CHECKING:
    from ldm.randomness import Randomness

STANDARD = {"normals": {"target": "ldm.normals.CounterBased"}, "order": {"target": "ldm.randomness.KeyedBijection"}}
_FORMER = {
    "normals": {"target": "ldm.normals.GeneratorPerRow"},
    "order": {"target": "ldm.randomness.StoredPermutation"},
}


def written(root: Node) -> Node:
    """The configuration of a new run, with the standard where it says nothing."""
    section = from_plain(STANDARD, "ldm's standard")
    said = root.children.get("randomness")
    return Node({**root.children, "randomness": section if said is None else merge(section, said)}, root.origin)


def chosen(tree: Mapping[str, Any], trust: Sequence[str] = ()) -> "Randomness":
    """Of a run's configuration, checked and in plain containers."""
    from ldm.randomness import Randomness  # torch, which a mistake on the command line need not wait for

    nodes = _FORMER | tree.get("randomness", {})
    return Randomness(**{name: build(node, trust, key=f"randomness.{name}") for name, node in nodes.items()})
