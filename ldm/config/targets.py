"""Which classes a `target:` may name, and how nodes become objects.

A configuration is data, and may come from an untrusted checkpoint: building it must not run code its author chose.
So a target is refused by its name before anything is imported, and again by the object it leads to: a class
(with `partial: true` also a function) that itself lives in an allowed package. Of the libraries only the parts
with layers, optimizers, transforms, callbacks and the like are open: no class there runs its arguments as code.
"""

import functools
import importlib
import inspect
import pkgutil
import re
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

from ldm.config.tree import dotted, nearest
from ldm.errors import ConfigError, LdmError

PACKAGES = ("ldm", "torch", "torchvision", "pytorch_lightning")

# Only classes from these; torch as a whole also holds loaders, compilers and process starters.
_LIBRARIES = (
    *("torch.nn", "torch.optim", "torch.utils.data"),
    *("torchvision.transforms", "torchvision.models", "torchvision.ops"),
    *("pytorch_lightning.callbacks", "pytorch_lightning.loggers", "pytorch_lightning.plugins"),
    *("pytorch_lightning.profilers", "pytorch_lightning.strategies", "pytorch_lightning.trainer"),
)


def _within(name: str, packages: Sequence[str]) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def check_name(target: str, trust: Sequence[str] = ()) -> None:
    """Raises ConfigError if the name alone shows that `target` is not allowed; imports nothing."""
    parts = target.split(".")
    if len(parts) < 2 or not all(re.fullmatch(r"[A-Za-z]\w*", part, re.ASCII) for part in parts):
        raise ConfigError(f"expected a dotted name such as ldm.diffusion.networks.unet.UNet, found '{target}'")
    if not _within(parts[0], PACKAGES) and not _within(target, trust):
        raise ConfigError(
            f"'{target}' is refused: '{parts[0]}' is not on the allow-list; {nearest(parts[0], (*PACKAGES, *trust))} "
            f"If you know and trust that package, add --trust {parts[0]}"
        )
    # `torch.Name` is decided once the object is there; a deeper module is not even imported.
    if len(parts) > 2 and not _within(target, ("ldm", *_LIBRARIES, *trust)):
        raise ConfigError(
            f"'{target}' is refused: of {parts[0]} only classes in "
            f"{', '.join(name for name in _LIBRARIES if _within(name, parts[:1]))} may be named"
        )


def resolve(target: str, trust: Sequence[str] = (), *, partial: bool = False) -> Callable[..., Any]:
    """The class (for a partial, also function) that `target` names; ConfigError if it is missing or refused."""
    check_name(target, trust)
    top, *rest = target.split(".")
    found: Any = _import(top)
    for name in rest:
        found = _member(found, name, target)
        if isinstance(found, ModuleType) and not _within(found.__name__, (*PACKAGES, *trust)):
            raise ConfigError(f"'{target}' is refused: it leads out of {top} into '{found.__name__}'")
    home = str(getattr(found, "__module__", ""))
    if inspect.isclass(found) and _within(home, ("ldm", *_LIBRARIES, *trust)):
        return found
    if inspect.isfunction(found) and found.__qualname__ == found.__name__ and _within(home, ("ldm", *trust)):
        if partial:
            return found
        raise ConfigError(f"'{target}' is a function; a function needs 'partial: true', otherwise name a class")
    allowed = ", ".join(("ldm", *_LIBRARIES, *trust))
    raise ConfigError(f"'{target}' is refused: expected a class of {allowed}, found {_describe(found)}")


def _describe(found: Any) -> str:
    if isinstance(found, ModuleType):
        classes = [name for name, value in vars(found).items() if _defines(found, name, value)]
        return f"the module {found.__name__} (classes: {', '.join(classes) or 'none'})"
    if inspect.isclass(found):
        return f"a class of {found.__module__}"
    return f"a {type(found).__name__}" + (f" of {home}" if (home := getattr(found, "__module__", None)) else "")


def _defines(module: ModuleType, name: str, value: Any) -> bool:
    """Whether the module, or a package by one of its modules, is where this class belongs."""
    within = inspect.isclass(value) and f"{value.__module__}.".startswith(f"{module.__name__}.")
    return within and not name.startswith("_")


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except Exception as error:  # whatever a module does when it is imported
        raise ConfigError(f"importing {name} failed: {type(error).__name__}: {error}") from error


def _member(holder: Any, name: str, target: str) -> Any:
    try:
        return getattr(holder, name)
    except AttributeError:
        pass
    known = [other for other in dir(holder) if not other.startswith("_")]
    if isinstance(holder, ModuleType):
        submodules = [module.name for module in pkgutil.iter_modules(getattr(holder, "__path__", ()))]
        if name in submodules:
            return _import(f"{holder.__name__}.{name}")
        known = submodules + [other for other in known if _defines(holder, other, getattr(holder, other))] or known
    holder_name = getattr(holder, "__name__", str(holder))
    raise ConfigError(f"'{target}' does not exist: {holder_name} has no '{name}'; {nearest(name, known)}")


def is_node(value: object) -> bool:
    """Whether a plain value is an object node."""
    return isinstance(value, Mapping) and "target" in value


def build(node: Any, trust: Sequence[str] = (), *, key: str = "") -> Any:
    """Build the object of a resolved node, leaves first; lists and mappings of nodes give lists and dicts of objects.

    Args:
        trust: packages allowed besides ldm, torch, torchvision and pytorch_lightning.
        key: the node's own dotted key, for messages.

    Raises:
        ConfigError: the target is refused, or its constructor failed, for whatever reason: the key says what to look
            at, and the error it came from what happened there. An LdmError of the constructor stays what it is.
    """
    if isinstance(node, list | tuple):
        return [build(child, trust, key=dotted(key, i)) for i, child in enumerate(node)]
    if isinstance(node, str) and "${" in node:
        raise ConfigError(f"{key}: '{node}' is not resolved; resolve the configuration with its facts before building")
    if not isinstance(node, Mapping):
        return node
    if not is_node(node):
        return {name: build(child, trust, key=dotted(key, name)) for name, child in node.items()}
    if unknown := [str(name) for name in node if name not in ("target", "params", "partial")]:
        raise ConfigError(f"{dotted(key, unknown[0])}: unknown key; a node has target, params and partial")
    target, partial = str(node["target"]), node.get("partial") is True
    try:
        make = resolve(target, trust, partial=partial)
    except ConfigError as error:
        raise ConfigError(f"{dotted(key, 'target')}: {error}") from error
    params = build(dict(node.get("params") or {}), trust, key=dotted(key, "params"))
    if partial:
        return functools.partial(make, **params)
    try:
        return make(**params)
    except (LdmError, MemoryError):
        raise
    except Exception as error:
        raise ConfigError(f"{key or target}: {target} cannot be built: {reason(error)}") from error


def reason(error: Exception) -> str:
    """The text of a library's error; for a missing package, how to install it."""
    text = str(error)
    if isinstance(error, ModuleNotFoundError):
        named = re.search(r"`([\w-]+)` is not installed", text)  # Lightning raises it without a name
        name = (error.name or (named[1] if named else "")).partition(".")[0]
        fix = f"; install it: pip install {name}" if name and "pip install" not in text else ""
        return f"it needs a package that is not installed: {text}{fix}"
    if isinstance(error, TypeError | ValueError):
        return text
    return f"{type(error).__name__}: {text}"
