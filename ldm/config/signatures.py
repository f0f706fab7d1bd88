"""The parameters of a constructor, from the imported class or from its source without an import.

Importing torch and Lightning takes seconds; a misspelled parameter is reported at once.
"""

import ast
import functools
import importlib
import importlib.util
import inspect
import sys
import typing
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from ldm.config.hints import Parameter, Signature
from ldm.config.tree import nearest
from ldm.errors import ConfigError

# ---- from the imported class -----------------------------------------------------------------------------------


def live_signature(made: Callable[..., Any]) -> Signature:
    """The signature of an imported class or function."""
    cls = made if inspect.isclass(made) else None
    try:
        signature = inspect.signature(made)
    except (TypeError, ValueError):  # written in C
        return Signature({}, True, cls)
    function = inspect.unwrap(made.__dict__.get("__init__", made.__init__) if cls else made)
    module = sys.modules.get(getattr(function, "__module__", None) or "")
    scope = dict(vars(module)) if module else {}
    found = {}
    for name, parameter in signature.parameters.items():
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            hint = Any if parameter.annotation is parameter.empty else _evaluate(parameter.annotation, scope)
            found[name] = _parameter(hint, parameter.default is parameter.empty, parameter.default is None)
    is_open = any(parameter.kind is parameter.VAR_KEYWORD for parameter in signature.parameters.values())
    return Signature(found, is_open, cls)


def _parameter(hint: Any, required: bool, is_none: bool) -> Parameter:
    # `x: int = None` accepts null as well.
    return Parameter(typing.Union[hint, None] if is_none and hint is not Any else hint, required)  # noqa: UP007


def _evaluate(annotation: Any, scope: dict[str, Any]) -> Any:
    """A hint with its forward references resolved; Any where that is not possible."""
    holder = type("Holder", (), {"__annotations__": {"hint": annotation}})
    try:
        return typing.get_type_hints(holder, globalns=scope, include_extras=True)["hint"]
    except Exception:  # a name imported for type checkers only: whatever evaluating it raises
        return Any


# ---- from the source -------------------------------------------------------------------------------------------

# Decorators of __init__ that keep its signature.
_TRANSPARENT = {"overload", "override", "typing.overload", "_defaults_from_env_vars"}
# Modules whose names in hints are understood without importing more.
_KNOWN = ("typing", "collections.abc", "pathlib", "os", "annotated_types", "ldm.ranges")


def static_signature(target: str) -> Signature | None:
    """The signature as read from the source of `target`, an allowed dotted name; None if that is uncertain.

    Raises:
        ConfigError: there is no such module or class.
    """
    return _Search(target).find(target)


class _Search:
    """Follows a dotted name through packages and `from ... import ...` to the `class` or `def` it means."""

    def __init__(self, target: str) -> None:
        self.target = target
        self.seen: set[str] = set()  # modules may import each other circularly

    def find(self, target: str) -> Signature | None:
        if target in self.seen:
            return None
        self.seen.add(target)
        top, *rest = target.split(".")
        path = _top_file(top)
        if path is None:
            return None
        module = top
        while len(rest) > 1:
            name = rest.pop(0)
            files = (path.parent / name / "__init__.py", path.parent / f"{name}.py")
            inner = next(filter(Path.is_file, files), None)
            if path.stem != "__init__" or inner is None:
                self._check_submodule(path, module, name)
                return None
            path, module = inner, f"{module}.{name}"
        return self._in_module(path, module, rest[0])

    def _check_submodule(self, path: Path, module: str, name: str) -> None:
        """Raises ConfigError if a package certainly has no module `name`."""
        names = _names(path)
        if path.stem != "__init__" or name in names or names & {"*", "__getattr__"}:
            return
        known = {inner.name.split(".")[0] for inner in path.parent.iterdir() if not inner.name.startswith(("_", "."))}
        if name not in known:
            fix = nearest(name, known or names)
            raise ConfigError(f"'{self.target}' does not exist: {module} has no '{name}'; {fix}")

    def _in_module(self, path: Path, module: str, name: str) -> Signature | None:
        stars = []
        for statement in _statements(_parsed(path)):
            if isinstance(statement, ast.ClassDef) and statement.name == name:
                return self._class(statement, path, module)
            if isinstance(statement, ast.FunctionDef) and statement.name == name:
                return None if statement.decorator_list else replace(_function(statement, path), is_function=True)
            if isinstance(statement, ast.ImportFrom):
                source = _absolute(statement, module, path)
                if source.split(".")[0] != module.split(".")[0]:
                    continue
                for alias in statement.names:
                    if (alias.asname or alias.name) == name:
                        return self._elsewhere(f"{source}.{alias.name}")
                    if alias.name == "*":
                        stars.append(source)
        found = [signature for source in stars if (signature := self._elsewhere(f"{source}.{name}"))]
        names = _names(path)
        if found or stars or name in names or "__getattr__" in names or path.stem == "__init__":
            return found[0] if found else None
        classes = [node.name for node in _parsed(path).body if isinstance(node, ast.ClassDef | ast.FunctionDef)]
        raise ConfigError(f"'{self.target}' does not exist: {module} has no '{name}'; {nearest(name, classes)}")

    def _elsewhere(self, target: str) -> Signature | None:
        try:
            return self.find(target)
        except ConfigError:  # not the user's name, so not the user's mistake
            return None

    def _class(self, node: ast.ClassDef, path: Path, module: str) -> Signature | None:
        if node.decorator_list or node.keywords:
            return None
        methods = {inner.name: inner for inner in node.body if isinstance(inner, ast.FunctionDef)}
        if "__new__" in methods:
            return None
        if function := methods.get("__init__"):
            known = all(ast.unparse(decorator) in _TRANSPARENT for decorator in function.decorator_list)
            return _function(function, path, skip=1) if known else None
        if len(node.bases) == 1 and isinstance(base := node.bases[0], ast.Name):
            return self._elsewhere(f"{module}.{base.id}")
        return None if node.bases else Signature({}, False)


def _top_file(top: str) -> Path | None:
    """The file of a top-level package or module, which is not imported."""
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return None
    return Path(spec.origin) if spec and spec.origin and spec.origin.endswith(".py") else None


@functools.cache
def _parsed(path: Path) -> ast.Module:
    try:
        return ast.parse(path.read_bytes())
    except SyntaxError as error:
        raise ConfigError(f"{path}:{error.lineno}: not valid Python: {error.msg}") from error


def _statements(tree: ast.Module) -> Iterator[ast.stmt]:
    """The module's statements, looking into `if` and `try`."""
    waiting = list(tree.body)
    while waiting:
        statement = waiting.pop(0)
        yield statement
        if isinstance(statement, ast.If | ast.Try):
            waiting += [*statement.body, *statement.orelse, *getattr(statement, "finalbody", [])]
            waiting += [inner for handler in getattr(statement, "handlers", []) for inner in handler.body]


def _names(path: Path) -> set[str]:
    """The names that a module binds; `*` stands for a star import."""
    names = set()
    for statement in _statements(_parsed(path)):
        if isinstance(statement, ast.ClassDef | ast.FunctionDef):
            names.add(statement.name)
        elif isinstance(statement, ast.Import | ast.ImportFrom):
            names |= {(alias.asname or alias.name).split(".")[0] for alias in statement.names}
        else:
            names |= {node.id for node in ast.walk(statement) if isinstance(node, ast.Name)}
    return names


def _absolute(statement: ast.ImportFrom, module: str, path: Path) -> str:
    """The full name of the module that a `from` statement imports from."""
    if not statement.level:
        return statement.module or ""
    parts = module.split(".")
    keep = len(parts) - statement.level + (path.stem == "__init__")
    return ".".join([*parts[:keep], *([statement.module] if statement.module else [])])


def _function(node: ast.FunctionDef, path: Path, skip: int = 0) -> Signature:
    """The signature of a `def` without its first `skip` arguments."""
    arguments = node.args
    plain = [*arguments.posonlyargs, *arguments.args]
    absent: list[ast.expr | None] = [None] * (len(plain) - len(arguments.defaults))
    pairs = [*zip(plain, [*absent, *arguments.defaults], strict=True)][skip:]
    pairs += zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    scope = _scope(path)
    found = {}
    for argument, default in pairs:
        hint = _evaluate(ast.unparse(argument.annotation), scope) if argument.annotation else Any
        is_none = isinstance(default, ast.Constant) and default.value is None
        found[argument.arg] = _parameter(hint, default is None, is_none)
    return Signature(found, arguments.kwarg is not None)


def _scope(path: Path) -> dict[str, Any]:
    """The names that a module imports from the modules whose names appear in hints."""
    scope: dict[str, Any] = {}
    for statement in _statements(_parsed(path)):
        if isinstance(statement, ast.ImportFrom) and statement.module in _KNOWN and not statement.level:
            source = importlib.import_module(statement.module)
            for alias in statement.names:
                if hasattr(source, alias.name):
                    scope[alias.asname or alias.name] = getattr(source, alias.name)
    return scope
