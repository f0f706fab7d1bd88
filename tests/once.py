"""What many tests begin with and none of them is about, done once in a process: trials without values, a first run."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import main
from ldm.training import dry_run, rehearsal

Trial = Callable[..., Any]
Begun = Callable[..., None]


@pytest.fixture(scope="session")
def known_trials() -> dict[tuple[str, str], Any]:
    return {}


@pytest.fixture
def tried_once(known_trials, monkeypatch) -> None:
    """A model that has passed through the trials before a run is not tried again."""

    def remembered(trial: Trial) -> Trial:
        def outcome(model: Any, tree: dict[str, Any], facts: dict[str, Any], *more: Any) -> Any:
            lightning = tree["lightning"]
            read = [tree["model"], facts, lightning["trainer"]["max_steps"], lightning.get("callbacks")]
            key = trial.__name__, json.dumps(read)
            if key not in known_trials:
                known_trials[key] = trial(model, tree, facts, *more)
            return known_trials[key]

        return outcome

    for module, name in ((dry_run, "check_fit"), (rehearsal, "check"), (dry_run, "report")):
        monkeypatch.setattr(module, name, remembered(getattr(module, name)))


@pytest.fixture(scope="session")
def begun(tmp_path_factory) -> Begun:
    """begun(file, *words): the working folder holds logs/ as `main.py --base file words` leaves it."""
    made: dict[tuple[str, ...], Path] = {}

    def begin(file: str, *words: str) -> None:
        key = Path(file).read_text(), *words
        if key in made:
            shutil.copytree(made[key], "logs", symlinks=True)
            return
        assert main.main(["--base", file, *words]) == 0
        made[key] = shutil.copytree("logs", tmp_path_factory.mktemp("begun") / "logs", symlinks=True)

    return begin
