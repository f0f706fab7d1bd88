"""What a run starts from: new files, or what a run folder or a checkpoint has saved, and what may then be different.

A resumed run keeps its configuration with every reference filled in, as it first ran: a longer `max_steps` does not
stretch a schedule that was written as `${lightning.trainer.max_steps}`, and `${newest:...}` stays the run it was. What
the command line changes is found by comparing what was written then with what is written now. A change that would
change the mathematics is refused unless it is allowed by name; then all references are filled in anew.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

from ldm import run
from ldm.commandline import Options
from ldm.config import Config
from ldm.config_read import Node, apply, from_plain, merge, read, to_yaml
from ldm.errors import ConfigError
from ldm.run import RunFolder

# A key is bound to the run when it is, or lies under, one of these; all others may change freely.
_BOUND = (
    *("seed", "model", "data"),
    *(
        "lightning.trainer.precision",
        "lightning.trainer.gradient_clip_val",
        "lightning.trainer.gradient_clip_algorithm",
    ),
    *("lightning.trainer.limit_train_batches", "lightning.trainer.overfit_batches"),
)
# Exceptions to the above: how the same batch is loaded and cut to pieces.
_FREE = ("data.params.num_workers", "data.params.micro_batch_size")


@dataclass(frozen=True)
class Start:
    """Where a run begins.

    Attributes:
        config: merged, not yet checked.
        source: what was written, with its references: the same tree but for a run that goes on.
        name: of the run.
        folder: the run to go on with; None makes a new one.
        checkpoint: the file that was named; None: the newest of `folder`, if there is one.
        notes: what a person should know, a line each.
    """

    config: Config
    source: Mapping[str, Any]
    name: str
    folder: RunFolder | None = None
    checkpoint: Path | None = None
    notes: tuple[str, ...] = ()


def start(options: Options) -> Start:
    """Find what the command line asks for.

    Raises:
        ConfigError: files or overrides cannot be read, or a resumed run would change.
        CheckpointError: there is no such run.
    """
    for part in (options.name or "", options.postfix):
        run.check_name(part)
    if options.resume is None:
        return _new(options)
    if options.resume == "auto":
        new = _new(options)
        folder = run.newest(options.logdir, new.name, options.postfix)
        return new if folder is None else _continued(options, folder, None)
    found, checkpoint = run.resolve(options.resume, options.logdir)
    if found is not None:
        return _continued(options, found, checkpoint)
    assert checkpoint is not None
    return _from_checkpoint(options, checkpoint)


def save(folder: RunFolder, source: Mapping[str, Any], tree: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Write down what runs, for `start` to find.

    Args:
        source: what was written, with its references.
        tree: the configuration as it was built, every reference filled in.
        facts: what the data said of itself.
    """
    run.write_whole(folder.source_file, to_yaml(dict(source)))
    run.write_whole(folder.facts_file, json.dumps(dict(facts), indent=2) + "\n")
    # Last, since this file makes the folder a run.
    run.write_whole(folder.config_file, to_yaml(dict(tree)))


def check_facts(folder: RunFolder, facts: Mapping[str, Any], allowed: Sequence[str]) -> None:
    """Refuse data that is no longer what the run was started with (more images, other classes, ...).

    Raises:
        ConfigError: naming each fact that differs.
    """
    if not folder.facts_file.is_file():
        return
    from ldm.data.fingerprint import comparable  # numpy, which a mistake on the command line need not wait for

    found, wanted = json.loads(folder.facts_file.read_text()), json.loads(json.dumps(dict(facts)))
    if "source" in found and "source" in wanted:
        found["source"], wanted["source"] = comparable(found["source"], wanted["source"])
    changes = differences(found, wanted)
    # Some facts repeat a key of the configuration, which may have been allowed by its own name.
    changes = {key: change for key, change in changes.items() if f"data.params.{key}" not in allowed}
    _refuse({f"data ({key})": change for key, change in changes.items()}, folder.path, allowed)


def differences(old: Any, new: Any, key: str = "") -> dict[str, tuple[Any, Any]]:
    """{dotted key: (old, new)} of what differs; lists, and nodes of another target, are compared whole."""
    if not isinstance(old, dict) or not isinstance(new, dict) or old.get("target") != new.get("target"):
        return {} if old == new and type(old) is type(new) else {key: (old, new)}
    found: dict[str, tuple[Any, Any]] = {}
    for name in [*old, *(name for name in new if name not in old)]:
        found |= differences(old.get(name), new.get(name), f"{key}.{name}" if key else name)
    return found


def _new(options: Options) -> Start:
    if not options.base:
        raise ConfigError("--resume auto starts a new run where there is none, so it needs --base FILE.yaml.")
    root = _wanted(options, Node({}, "command line"))
    return Start(Config(root, options.trust), root.plain(), _name(options, root))


def _continued(options: Options, folder: RunFolder, checkpoint: Path | None) -> Start:
    if options.scale_lr:
        raise ConfigError("--scale-lr belongs to a run's start: the rates saved in a run are scaled already.")
    if options.name and f"{options.name}{options.postfix}" != folder.name:
        raise ConfigError(f"--name {options.name}: the run to go on with is called {folder.name}; leave the flag out.")
    source = _wanted(options, read(folder.source_file))
    root, notes = _changed(options, source, read(folder.source_file), read(folder.config_file), folder.path)
    return Start(Config(root, options.trust), source.plain(), folder.name, folder, checkpoint, notes)


def _from_checkpoint(options: Options, checkpoint: Path) -> Start:
    from ldm.checkpoint import load  # torch, which a mistake on the command line need not wait for

    tree = load(checkpoint).get("ldm", {}).get("config")
    if tree is None:
        raise ConfigError(f"{checkpoint}: holds no configuration; expected a checkpoint written by main.py.")
    saved = from_plain(tree, str(checkpoint))
    source = _wanted(options, saved)
    root, notes = _changed(options, source, saved, saved, checkpoint)
    return Start(Config(root, options.trust), source.plain(), _name(options, root), None, checkpoint, notes)


def _wanted(options: Options, saved: Node) -> Node:
    """`saved`, the files and the overrides of the command line, merged."""
    return apply(reduce(merge, [read(file) for file in options.base], saved), options.overrides)


def _changed(options: Options, wanted: Node, source: Node, filled: Node, origin: Path) -> tuple[Node, tuple[str, ...]]:
    """The configuration to go on with, and a note on each change.

    Args:
        wanted: what is written now.
        source: what was written then.
        filled: the same with every reference filled in.
    """
    changes = differences(source.plain(), wanted.plain())
    # A value that was a reference then and is now written out is no change.
    ran = filled.plain()
    changes = {key: change for key, change in changes.items() if _at(ran, key) != change[1]}
    bound = {key: change for key, change in changes.items() if _bound(key)}
    _refuse(bound, origin, options.allow_change)
    notes = tuple(f"changed: {key} from {_brief(old)} to {_brief(new)}" for key, (old, new) in changes.items())
    if bound:
        return wanted, notes
    return apply(filled, [f"{key}={json.dumps(new)}" for key, (_, new) in changes.items()]), notes


def _refuse(changes: Mapping[str, tuple[Any, Any]], origin: Path, allowed: Sequence[str]) -> None:
    refused = {key: change for key, change in changes.items() if not any(_under(key, name) for name in allowed)}
    if refused:
        lines = [
            f"  {key}: the run has {_brief(old)}, asked for is {_brief(new)}" for key, (old, new) in refused.items()
        ]
        flags = " ".join(f"--allow-change {key.split(' ')[0]}" for key in refused)
        raise ConfigError(
            f"{origin}: resuming with these changes would be another run:\n" + "\n".join(lines) + "\n"
            f"Start a new run, undo the changes, or accept them with {flags}."
        )


def _bound(key: str) -> bool:
    return any(_under(key, name) or _under(name, key) for name in _BOUND) and not any(_under(key, n) for n in _FREE)


def _under(key: str, name: str) -> bool:
    """True when `key` is `name` or lies below it."""
    return key == name or key.startswith((f"{name}.", f"{name} "))


def _at(tree: Any, key: str) -> Any:
    for name in key.split("."):
        tree = tree.get(name) if isinstance(tree, dict) else None
    return tree


def _name(options: Options, root: Node) -> str:
    candidates: Iterator[Any] = iter((options.name, root.plain().get("name"), *(file.stem for file in options.base)))
    return str(next((name for name in candidates if name), "run"))


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
