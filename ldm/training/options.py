"""The options of a training run, which ldm/cli/options.py parses from a command line. Imports nothing heavy."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Options:
    """The parsed command line of main.py; `--help` describes each."""

    base: tuple[Path, ...]
    overrides: tuple[str, ...]
    resume: str | None
    name: str | None
    postfix: str
    logdir: Path
    project: str
    seed: int | None
    debug: bool
    train: bool
    scale_lr: bool
    dry_run: bool
    trust: tuple[str, ...]
    allow_change: tuple[str, ...]
