"""Finds every mistake in a configuration that can be found before anything is built, as a list of messages.

`names` checks keys and the names of targets; `parameters` compares each node's params with the signature and type hints
of the class it names: first as read from the source, without an import, then with those of the imported class.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal, Union

from annotated_types import Ge

from ldm.config import init_from, moved
from ldm.config.hints import LookUp, Parameter, Signature, mismatches, spell
from ldm.config.signatures import live_signature, static_signature
from ldm.config.targets import check_name, resolve
from ldm.config.tree import Node, dotted, nearest, show
from ldm.errors import ConfigError
from ldm.ranges import Count, CountOrZero, Fraction, FractionAboveZero, Positive, Seed

_SECTIONS = ("name", "seed", "randomness", "model", "data", "lightning", "init_from")
_LIGHTNING = ("trainer", "logger", "callbacks", "strategy")
_NODE = ("target", "params", "partial")
_TRAINER = "pytorch_lightning.Trainer"
_RANDOMNESS = "ldm.randomness.Randomness"
_NOT_IN_TRAINER = {
    "logger": "write it as lightning.logger",
    "callbacks": "write them as lightning.callbacks",
    "strategy": "write it as lightning.strategy",
    "accumulate_grad_batches": "it follows from data.params.batch_size and data.params.micro_batch_size",
    "use_distributed_sampler": "the order of the data is ldm's own; remove it",
    "max_epochs": "the length of a run is lightning.trainer.max_steps",
    "default_root_dir": "the run folder is chosen by main.py's --logdir and --name",
}
# Ranges that Lightning's own hints leave out. Special meanings that it gives to 0 and negative numbers are refused.
_TRAINER_RANGES: dict[str, Any] = {
    **dict.fromkeys(("max_steps", "num_nodes", "log_every_n_steps"), Count),
    **dict.fromkeys(("min_steps", "val_check_interval"), Count | None),
    "gradient_clip_val": Positive | None,
    "limit_train_batches": Count | FractionAboveZero | None,
    **dict.fromkeys(
        ("limit_val_batches", "limit_test_batches", "limit_predict_batches"), CountOrZero | Fraction | None
    ),
    "overfit_batches": CountOrZero | Fraction,
    "num_sanity_val_steps": Annotated[int, Ge(-1)] | None,
}


def raise_all(problems: Sequence[str]) -> None:
    """Raise one ConfigError with all problems, if there are any."""
    if len(problems) == 1:
        raise ConfigError(problems[0])
    if problems:
        lines = "\n".join(f"  {i}. {problem}" for i, problem in enumerate(problems, 1))
        raise ConfigError(f"{len(problems)} problems in the configuration:\n{lines}")


def _problem(key: str, node: Node, text: str) -> str:
    return f"{key} ({node.origin}): {text}"


# ---- keys and target names -------------------------------------------------------------------------------------


def names(root: Node, trust: Sequence[str]) -> list[str]:
    """Problems with the sections, the shape of nodes and the names of targets; imports nothing."""
    problems = list(_unknown(root, "", _SECTIONS))
    sections = root.children
    for section in ("model", "data"):
        if section not in sections:
            problems.append(f"{section} ({root.origin}): missing; expected {section}: {{target: ..., params: ...}}")
        elif not sections[section].is_object:
            found = show(sections[section])
            problems.append(_problem(section, sections[section], f"expected a mapping with 'target', found {found}"))
    if "seed" not in sections:
        problems.append(f"seed ({root.origin}): missing; write seed: 23")
    for section, kind in (("seed", Seed), ("name", str)):
        node = sections.get(section)
        if node and not (section == "name" and node.value is None):
            problems += [_problem(*wrong) for wrong in mismatches(node, kind, section, lambda target, partial: None)]
    problems += _lightning_names(sections.get("lightning"))
    problems += _init_from(sections.get("init_from"))
    for key, node in _nodes(root, ""):
        problems += _node_names(key, node, trust)
    return problems


def _init_from(node: Node | None) -> Iterator[str]:
    if node is None or isinstance(node.value, str | None):
        return
    if not isinstance(node.value, dict):
        yield _problem("init_from", node, f"expected a run, or a mapping with 'run', found {show(node)}")
        return
    if "run" not in node.value:
        yield _problem("init_from.run", node, "missing; write the run folder or checkpoint to start from")
    yield from _arguments("init_from", node, "init_from", init_from.signature(), lambda target, partial: None)


def _lightning_names(node: Node | None) -> Iterator[str]:
    if node is None or node.value is None:
        return
    if not isinstance(node.value, dict):
        yield _problem("lightning", node, f"expected a mapping with {', '.join(_LIGHTNING)}, found {show(node)}")
        return
    yield from _unknown(node, "lightning", _LIGHTNING)
    trainer = node.value.get("trainer")
    if trainer and trainer.value is not None:
        if not isinstance(trainer.value, dict) or trainer.is_object:
            yield _problem(
                "lightning.trainer", trainer, f"expected a mapping of Trainer arguments, found {show(trainer)}"
            )
        else:
            for name in _NOT_IN_TRAINER.keys() & trainer.value.keys():
                yield _problem(
                    f"lightning.trainer.{name}", trainer.value[name], f"not set here: {_NOT_IN_TRAINER[name]}"
                )
    yield from _objects(node.value.get("logger"), "lightning.logger")
    yield from _callbacks(node.value.get("callbacks"))
    strategy = node.value.get("strategy")
    if strategy and not (strategy.is_object or isinstance(strategy.value, str | None)):
        yield _problem("lightning.strategy", strategy, f"expected a name such as ddp or a node, found {show(strategy)}")


def _callbacks(node: Node | None) -> Iterator[str]:
    """`callbacks` have names, by which defaults are changed and left out."""
    key = "lightning.callbacks"
    if node is None or node.value is None:
        return
    if isinstance(node.value, dict) and not node.is_object:
        yield from _objects(node, key)
        return
    found = f"a list of {len(node.value)}" if isinstance(node.value, list) else show(node)
    advice = f"write {key}: {{my_name: {{target: ...}}}}"
    yield _problem(key, node, f"expected a mapping of names to nodes, found {found}; {advice}")


def _objects(node: Node | None, key: str) -> Iterator[str]:
    """A node, a list of nodes, or a mapping of names to nodes (null: none)."""
    if node is None or node.value is None or node.is_object:
        return
    if not isinstance(node.value, dict | list):
        yield _problem(
            key, node, f"expected a node, a list of nodes or a mapping of names to nodes, found {show(node)}"
        )
        return
    for name, child in node.children.items():
        if not child.is_object and child.value is not None:
            yield _problem(dotted(key, name), child, f"expected a mapping with 'target', found {show(child)}")


def _node_names(key: str, node: Node, trust: Sequence[str]) -> Iterator[str]:
    for name, child in node.children.items():
        if name not in _NODE:
            # After a typo, the likeliest mistake is a parameter one level too high.
            likely = nearest(name, _NODE)
            hint = likely if likely.startswith("did you mean") else f"did you mean '{dotted(key, 'params', name)}'?"
            yield _problem(dotted(key, name), child, f"unknown key '{name}'; {hint}")
    params, partial, target = (node.children.get(name) for name in ("params", "partial", "target"))
    if params and not isinstance(params.value, dict | None):
        yield _problem(f"{key}.params", params, f"expected a mapping, found {show(params)}")
    if partial and not isinstance(partial.value, bool):
        yield _problem(f"{key}.partial", partial, f"expected true or false, found {show(partial)}")
    assert target is not None
    if not isinstance(target.value, str):
        yield _problem(f"{key}.target", target, f"expected a dotted class name, found {show(target)}")
        return
    try:
        check_name(target.value, trust)
    except ConfigError as error:
        yield _problem(f"{key}.target", target, str(error))


def _unknown(node: Node, key: str, valid: Sequence[str]) -> Iterator[str]:
    for name, child in node.children.items():
        if name not in valid:
            yield _problem(dotted(key, name), child, f"unknown key '{name}'; {nearest(name, valid)}")


def _nodes(node: Node, key: str) -> Iterator[tuple[str, Node]]:
    if node.is_object:
        yield key, node
    for name, child in node.children.items():
        yield from _nodes(child, dotted(key, name))


# ---- parameters ------------------------------------------------------------------------------------------------


def quick_look_up(trust: Sequence[str]) -> LookUp:
    """Reads signatures from the source: imports nothing, and leaves uncertain ones out."""

    def look_up(target: str, partial: bool) -> Signature | None:
        try:
            check_name(target, trust)
        except ConfigError:
            return None  # `names` has said so
        signature = static_signature(target)
        # `resolve` decides whether a function is allowed here.
        return None if signature and signature.is_function and not partial else signature

    return look_up


def full_look_up(trust: Sequence[str]) -> LookUp:
    """Imports the class and checks that it is allowed."""
    return lambda target, partial: live_signature(resolve(target, trust, partial=partial))


def parameters(root: Node, look_up: LookUp) -> list[str]:
    """Problems with the params of every node, checked against the signatures and hints of the classes."""
    problems = [problem for key, node in _nodes(root, "") for problem in _node_parameters(key, node, look_up)]
    problems += _randomness(root.children.get("randomness"), look_up)
    lightning = root.children.get("lightning")
    trainer = lightning.children.get("trainer") if lightning else None
    if trainer and isinstance(trainer.value, dict) and (signature := look_up(_TRAINER, False)):
        given = {name: child for name, child in trainer.value.items() if name not in _NOT_IN_TRAINER}
        ranged = signature.parameters | {
            name: Parameter(hint, False) for name, hint in _TRAINER_RANGES.items() if name in signature.parameters
        }
        signature = _with_auto_precision(replace(signature, parameters=ranged))
        problems += _arguments("lightning.trainer", Node(given, trainer.origin), _TRAINER, signature, look_up)
    return problems


def _randomness(node: Node | None, look_up: LookUp) -> Iterator[str]:
    if node is None:
        return
    if not isinstance(node.value, dict) or node.is_object:
        yield _problem("randomness", node, f"expected a mapping with normals, order, found {show(node)}")
    elif signature := look_up(_RANDOMNESS, False):
        yield from _arguments("randomness", node, _RANDOMNESS, signature, look_up)


def _with_auto_precision(trainer: Signature) -> Signature:
    """The Trainer's signature with ldm's own value of `precision`, `auto` (runtime/precision.py)."""
    known = trainer.parameters.get("precision")
    if known is None:
        return trainer
    own = replace(known, hint=Union[known.hint, Literal["auto"]])  # noqa: UP007
    return replace(trainer, parameters={**trainer.parameters, "precision": own})


def _node_parameters(key: str, node: Node, look_up: LookUp) -> Iterator[str]:
    target = node.children["target"]
    try:
        signature = look_up(str(target.value), node.is_partial)
    except ConfigError as error:
        yield _problem(f"{key}.target", target, str(error))
        return
    if signature is None:
        return
    params = node.children.get("params")
    given = params if params and isinstance(params.value, dict) else Node({}, node.origin)
    yield from _arguments(f"{key}.params", given, str(target.value), signature, look_up)
    if not node.is_partial:
        for name, parameter in signature.parameters.items():
            filled = key.startswith("lightning.logger") and name == "save_dir"  # by the run folder
            if parameter.required and name not in given.children and not filled:
                text = f"missing; {target.value} requires it, expected {spell(parameter.hint)}"
                yield _problem(f"{key}.params.{name}", given, text)


def _arguments(key: str, given: Node, target: str, signature: Signature, look_up: LookUp) -> Iterator[str]:
    for name, value in given.children.items():
        if name in signature.parameters:
            wrong = mismatches(value, signature.parameters[name].hint, dotted(key, name), look_up)
            yield from (_problem(*mismatch) for mismatch in wrong)
        elif not signature.open:
            now = moved.parameter(target, name)
            hint = nearest(name, signature.parameters) if now == name else f"it is called '{now}' now"
            text = f"{target} has no parameter '{name}'; {hint}"
            yield _problem(dotted(key, name), value, text)
