"""What a run starts from: new files, or a saved run folder or checkpoint, with the changes requested now.

A resumed run keeps its configuration with every reference filled in, as it first ran. A change that would change the
mathematics is refused unless it is allowed by name. What counts as a change, and what follows from one, is defined
in ldm/training/resume_changes.py.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm import run_folder
from ldm.config import randomness
from ldm.config.load import Config
from ldm.config.merging import apply, merge
from ldm.config.tree import Node, from_plain
from ldm.config.yaml_text import read, to_yaml
from ldm.errors import ConfigError
from ldm.files import write_text
from ldm.run_folder import RunFolder
from ldm.training.options import Options
from ldm.training.resume_changes import Written, bound, brief, changes, differences, going_on, refuse

if TYPE_CHECKING:
    from ldm.checkpoints.store import Verified

_FINGERPRINTS = ("source", "validation_source")
_SCALED = "--scale-lr belongs to a run's start: the rates that were saved are scaled already."


@dataclass(frozen=True)
class Start:
    """Where a run begins.

    Attributes:
        config: merged, not yet checked.
        source: what was written, references unresolved; the same tree unless a run is resumed.
        name: of the run.
        folder: the run to resume; None makes a new one.
        checkpoint: the file that was named; None: the newest of `folder`, if there is one.
        notes: what a person should know, a line each.
        facts: the data's own description when the run began, if known.
        verified: `checkpoint`, where this rank has read all of it.
    """

    config: Config
    source: Mapping[str, Any]
    name: str
    folder: RunFolder | None = None
    checkpoint: Path | None = None
    notes: tuple[str, ...] = ()
    facts: Mapping[str, Any] | None = None
    verified: "Verified | None" = None

    @property
    def is_new(self) -> bool:
        """Whether it starts from nothing."""
        return self.folder is None and self.checkpoint is None

    def has_no_checkpoint(self) -> bool:
        """Whether it is new, or was killed before its first save."""
        from ldm.checkpoints import store  # torch, which a mistake on the command line need not wait for

        return self.checkpoint is None and not (self.folder and store.has_any(self.folder.checkpoints))


def start(options: Options) -> Start:
    """Find what the command line asks for.

    Raises:
        ConfigError: files or overrides cannot be read, or a resumed run would change.
        CheckpointError: there is no such run.
    """
    if options.resume is None:
        return _new(options)
    if options.resume == "auto":
        folder = run_folder.newest(options.logdir, _name(options, _written_new(options)), options.postfix)
        return _new(options) if folder is None else _continued(options, folder, None)
    found, checkpoint = run_folder.resolve(options.resume, options.logdir)
    if found is not None:
        return _continued(options, found, checkpoint)
    assert checkpoint is not None
    return _from_checkpoint(options, checkpoint)


def save(folder: RunFolder, source: Mapping[str, Any], tree: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Write the files that `start` reads.

    Args:
        source: what was written, with its references.
        tree: the configuration as it was built, every reference filled in.
        facts: the data's own description.
    """
    write_text(folder.source_file, to_yaml(dict(source)))
    write_text(folder.facts_file, json.dumps(dict(facts), indent=2) + "\n")
    # Last, since this file makes the folder a run.
    write_text(folder.config_file, to_yaml(dict(tree)))


def check_facts(start: Start, facts: Mapping[str, Any], allowed: Sequence[str]) -> None:
    """Refuse data that is no longer what the run was started with (more images, other classes, another autoencoder).

    A fact that was not recorded when the run began is not compared.

    Raises:
        ConfigError: naming each fact that differs.
    """
    if start.facts is None:
        return
    from ldm.data.fingerprint import comparable  # numpy, which a mistake on the command line need not wait for

    then, now = dict(start.facts), json.loads(json.dumps(dict(facts)))
    for key in _FINGERPRINTS:
        if key in then and key in now:
            then[key], now[key] = comparable(then[key], now[key])
    found = differences(then, {key: value for key, value in now.items() if key in then})
    # Some facts repeat a key of the configuration, which may have been allowed by its own name.
    found = {f"data ({key})": change for key, change in found.items() if not _follows(key, allowed)}
    refuse(found, start.checkpoint or (start.folder.path if start.folder else Path()), allowed)


def _follows(fact: str, allowed: Sequence[str]) -> bool:
    """Whether a fact may differ since a change of the parameter that it comes from was allowed by name."""
    parameter = f"data.params.{fact.removesuffix('_source')}"
    return any(name == parameter or name.startswith(f"{parameter}.") for name in allowed)


def _written_new(options: Options) -> Node:
    if not options.base:
        raise ConfigError("--resume auto starts a new run where there is none, so it needs --base FILE.yaml.")
    return _wanted(options, Node({}, "command line"))


def _new(options: Options) -> Start:
    root = randomness.written(_written_new(options))
    name = _name(options, root)
    run_folder.check_name(f"{name}{options.postfix}")
    return Start(Config(root, options.trust), root.plain(), name)


def _continued(options: Options, folder: RunFolder, checkpoint: Path | None) -> Start:
    if options.name and f"{options.name}{options.postfix}" != folder.name:
        raise ConfigError(f"--name {options.name}: the run to resume is called {folder.name}; leave the flag out.")
    if options.scale_lr and options.resume != "auto":  # which is also what has started the run
        raise ConfigError(_SCALED)
    facts = json.loads(folder.facts_file.read_text()) if folder.facts_file.is_file() else None
    source = read(folder.source_file)
    # Of a converted model's data no more than the autoencoder is known before its first start, which writes it down.
    is_trained = facts is None or "batch_size" in facts or not folder.origin_file.is_file()
    known = facts if is_trained else None
    written = Written(source, read(folder.config_file), _wanted(options, source), known, is_trained)
    config, notes = _changed(options, written, folder.path)
    return Start(config, written.wanted.plain(), folder.name, folder, checkpoint, notes, facts)


def _from_checkpoint(options: Options, checkpoint: Path) -> Start:
    if options.scale_lr:
        raise ConfigError(_SCALED)
    from ldm.checkpoints import store  # torch, which a mistake on the command line need not wait for
    from ldm.runtime import distributed

    verified = store.verify(checkpoint) if distributed.is_main() else None
    record = store.record(checkpoint)
    if record.get("config") is None:
        raise ConfigError(f"{checkpoint}: holds no configuration; expected a checkpoint written by main.py.")
    saved = from_plain(record["config"], str(checkpoint))
    facts = record.get("data")
    is_trained = "origin" not in record or record.get("step") != 0
    written = Written(saved, saved, _wanted(options, saved), facts, is_trained)
    name = _name(options, written.wanted)
    run_folder.check_name(f"{name}{options.postfix}")  # it may be a stranger's
    config, notes = _changed(options, written, checkpoint)
    return Start(config, written.wanted.plain(), name, None, checkpoint, notes, facts, verified)


def _wanted(options: Options, saved: Node) -> Node:
    """`saved`, the files and the overrides of the command line, merged."""
    return apply(reduce(merge, [read(file) for file in options.base], saved), options.overrides)


def _changed(options: Options, written: Written, origin: Path) -> tuple[Config, tuple[str, ...]]:
    """The configuration to resume with, and a note on each change."""
    changed = changes(written)
    of_run = {key: change for key, change in changed.items() if bound(key, written.is_trained)}
    refuse(of_run, origin, options.allow_change)
    config = Config(going_on(written, changed, options.allow_change), options.trust)
    notes = [f"changed: {key} from {brief(old)} to {brief(new)}" for key, (old, new) in changed.items()]
    followed = differences(written.filled.plain(), config.resolved())
    notes += [
        f"changed with it: {key} from {brief(old)} to {brief(new)}"
        for key, (old, new) in followed.items()
        # A fact of the data is not known yet.
        if key not in changed and "${" not in str(new)
    ]
    return config, tuple(notes)


def _name(options: Options, root: Node) -> str:
    """Of the run, by flag, configuration or file; not checked."""
    written = root.plain().get("name")
    if isinstance(written, str) and "${" in written:
        written = Config(root, options.trust).resolved()["name"]
    candidates: Iterator[Any] = iter((options.name, written, *(file.stem for file in options.base)))
    return str(next((name for name in candidates if name), "run"))
