"""What a constructor takes: from the imported class, or from its source without importing anything.

Importing torch and Lightning takes seconds; a misspelt parameter should be reported at once.
"""

import inspect
import sys
import typing
from collections.abc import Callable
from typing import Any

from ldm.config_types import Parameter, Signature


def live_signature(made: Callable[..., Any]) -> Signature:
    """The signature of an imported class or function."""
    cls = made if inspect.isclass(made) else None
    try:
        signature = inspect.signature(made)
    except (TypeError, ValueError):  # written in C
        return Signature({}, True, cls)
    function = inspect.unwrap(vars(cls).get("__init__", cls.__init__) if cls else made)
    module = sys.modules.get(getattr(function, "__module__", None) or "")
    scope = dict(vars(module)) if module else {}
    found = {}
    for name, parameter in signature.parameters.items():
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            hint = Any if parameter.annotation is parameter.empty else evaluate(parameter.annotation, scope)
            found[name] = _parameter(hint, parameter.default is parameter.empty, parameter.default is None)
    is_open = any(parameter.kind is parameter.VAR_KEYWORD for parameter in signature.parameters.values())
    return Signature(found, is_open, cls)


def _parameter(hint: Any, required: bool, none: bool) -> Parameter:
    return Parameter(typing.Optional[hint] if none and hint is not Any else hint, required)  # noqa: UP045 (hint is a value)


def evaluate(annotation: Any, scope: dict[str, Any]) -> Any:
    """A hint with its forward references resolved; Any where that is not possible."""
    holder = type("Holder", (), {"__annotations__": {"hint": annotation}})
    try:
        return typing.get_type_hints(holder, globalns=scope)["hint"]
    except Exception:  # a name imported for type checkers only: whatever evaluating it raises
        return Any
