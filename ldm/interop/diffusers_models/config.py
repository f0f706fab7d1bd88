"""diffusers' config.json and our nodes: what reading one and writing the other have in common.

A class of diffusers has many settings that our networks do not have. Each is either one that we read, or has one value,
nearly always its default, under which it does nothing; anything else is another function and is refused by name.
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ldm.config.targets import resolve
from ldm.errors import ConfigError
from ldm.interop.models import on_meta

OTHERWISE = "--to safetensors takes every model"
"""The end of messages on what cannot go out."""
MOST, MOST_LAYERS = 1_000_000, 1_000
"""Of any size, and of layers: beyond it, a file is damaged or means harm."""


@dataclass(frozen=True)
class Exported:
    """One of our networks as a model of diffusers.

    Attributes:
        class_name: of diffusers' class.
        config: its config.json, without `_class_name`.
        tensors: its state_dict, float32.
    """

    class_name: str
    config: dict[str, Any]
    tensors: dict[str, Tensor]


def apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same numbers, each tensor in memory of its own, as files of safetensors want them."""
    seen: set[int] = set()
    own = {}
    for name, tensor in tensors.items():
        memory = tensor.untyped_storage()
        shared = memory.data_ptr() in seen or memory.nbytes() != tensor.nbytes
        seen.add(memory.data_ptr())
        own[name] = tensor.clone() if shared else tensor
    return own


class Settings:
    """A config.json with the defaults of its class, and what in it our network cannot express.

    Args:
        config: as read; keys that begin with an underscore are notes.
        defaults: every setting of the class.
        where: the file, for messages.
    """

    def __init__(self, config: Mapping[str, Any], defaults: Mapping[str, Any], where: str) -> None:
        self.values = {key: config.get(key, default) for key, default in defaults.items()}
        self.where = where
        self.problems: list[str] = []
        for key, value in config.items():
            if key not in defaults and not key.startswith("_") and value:
                self.refuse(key, "a setting that is not known here; remove it if it is off")

    def refuse(self, key: str, why: str) -> None:
        value = f"={self.values[key]!r}" if key in self.values else ""
        self.problems.append(f"{key}{value}: {why}")

    def only(self, accepted: Mapping[str, Sequence[Any]]) -> None:
        """Every one of these settings must have one of its values."""
        for key, values in accepted.items():
            if not any(_same(self.values[key], value) for value in values):
                self.refuse(key, f"expected {' or '.join(map(repr, values))}")

    def whole(self, key: str) -> int:
        """A setting that is a positive whole number; 1 in place of anything else, which is refused."""
        value, most = self.values[key], MOST_LAYERS if "layers" in key else MOST
        if type(value) is int and 1 <= value <= most:
            return value
        self.refuse(key, f"expected a whole number from 1 to {most}")
        return 1

    def wholes(self, key: str) -> list[int]:
        """A list of such numbers; [1] in place of anything else, which is refused."""
        value, most = self.values[key], MOST_LAYERS if "layers" in key else MOST
        if isinstance(value, list | tuple) and value and all(type(one) is int and 1 <= one <= most for one in value):
            return [*value]
        self.refuse(key, f"expected a list of whole numbers from 1 to {most}")
        return [1]

    def number(self, key: str, least: float, below: float) -> float:
        """A setting that is a number, least <= number < below; `least` in place of anything else, which is refused."""
        value = self.values[key]
        if isinstance(value, int | float) and not isinstance(value, bool) and least <= value < below:
            return value
        self.refuse(key, f"expected a number from {least:g} to below {below:g}")
        return least

    def levels(self, key: str, plain: str, attention: str, count: int) -> list[int]:
        """The places of the blocks with attention in a list of `count` names of blocks."""
        value = self.values[key]
        if not isinstance(value, list | tuple) or len(value) != count or not {*value} <= {plain, attention}:
            self.refuse(key, f"expected {count} names, as many as block_out_channels, of {plain} or {attention}")
            return []
        return [place for place, name in enumerate(value) if name == attention]

    def widths(self) -> tuple[int, list[int]]:
        """The width of the first level, and that of each level in units of it."""
        widths = self.wholes("block_out_channels")
        if any(width % widths[0] for width in widths):
            self.refuse("block_out_channels", "expected multiples of the first")
        return widths[0], [max(1, width // widths[0]) for width in widths]

    def norm_groups(self, *networks: Mapping[str, Any]) -> dict[str, int]:
        """{"norm_groups": number} for our nodes to have as many groups as theirs; {}: they have that many anyway."""
        number = self.whole("norm_num_groups")
        self.check()
        ours = groups(*(on_meta(network) for network in networks))
        if {*ours.values()} == {number}:
            return {}
        if widths := sorted(width for width in ours if width % number):
            self.refuse("norm_num_groups", f"does not divide {', '.join(map(str, widths))} channels")
        return {"norm_groups": number}

    def check(self) -> None:
        """ConfigError that lists all that was refused."""
        raise_all(self.where, "of its settings, our network cannot express", self.problems)


def raise_all(where: str, what: str, problems: Sequence[str], fix: str = "") -> None:
    """ConfigError with these lines, unless there are none."""
    if problems:
        raise ConfigError("\n".join([f"{where}: {what}:", *(f"  {problem}" for problem in problems), fix]).rstrip())


def groups(*networks: nn.Module) -> dict[int, int]:
    """{channels: groups} of the norms of networks of ours; ConfigError where norms of one width differ."""
    norms = [made for network in networks for made in network.modules() if isinstance(made, nn.GroupNorm)]
    found: dict[int, int] = {}
    for norm in norms:
        if found.setdefault(norm.num_channels, norm.num_groups) != norm.num_groups:
            raise ConfigError(
                f"norm_groups: its norms of {norm.num_channels} channels have {found[norm.num_channels]} and "
                f"{norm.num_groups} groups, and diffusers has one number for all. {OTHERWISE}"
            )
    return found


def one_number(problems: list[str], *networks: nn.Module) -> int:
    """The number of groups of all norms; notes a problem where they differ, since diffusers has one number for all."""
    ours = groups(*networks)
    if len({*ours.values()}) > 1:
        counts = ", ".join(f"{count} for {width} channels" for width, count in sorted(ours.items()))
        problems.append(f"norm_groups=None: one number for all norms in diffusers; ours have {counts}")
    return next(iter(ours.values()))


def arguments(node: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a node of ours, those that it leaves out with their defaults."""
    signature = inspect.signature(resolve(node["target"]))
    defaults = {name: one.default for name, one in signature.parameters.items() if one.default is not one.empty}
    return {**defaults, **node.get("params", {})}


def _same(first: Any, second: Any) -> bool:
    """Equal, where 1 is not True, and a tuple is a list."""
    if isinstance(first, list | tuple) and isinstance(second, list | tuple):
        return [*first] == [*second]
    return isinstance(first, bool) == isinstance(second, bool) and first == second
