"""A run of main.py as a fault sees it: started under any launcher, watched from outside, compared bit for bit."""

import atexit
import os
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from ldm.checkpoints import store
from ldm.config.load import to_yaml
from ldm.errors import CheckpointError
from ldm.run_folder import RunFolder, RunState
from ldm.training.metrics_table import read_metrics
from scripts.faults.interpreter import ROOT, Hook, python, torchrun
from scripts.faults.processes import Child, Wrong, children, demand, descendants, fork, wait_until
from scripts.faults.tiny import Tree, pictures, stage1, stage2

_SPEEDS = ("step", "images_per_second", "data_wait")

MAIN = ROOT / "main.py"
AGENT = ("--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2", "--shutdown-timeout", "10")
"""How torchrun has to be started, as configs/cluster/torchrun.sh does."""


def prepare(lab: Path, listing: Path) -> None:
    """What all faults share: pictures, a trained autoencoder, its latent cache; and which modules runs import.

    Raises:
        Wrong: a run failed.
    """

    def list_modules() -> None:
        atexit.register(lambda: listing.write_text("\n".join(name for name in sys.modules if "__main__" not in name)))

    pictures(lab / "pictures")
    first = Run(lab / "first", stage1(lab))
    first.complete()
    state = store.load(first.newest()) | {"optimizer_states": []}  # every run of stage 2 reads it
    store.save(lab / "autoencoder" / "checkpoints" / "step=00000004.ckpt", state)
    Run(lab / "second", stage2(lab, steps=2)).complete(hook=list_modules)


class Run:
    """A run of main.py, with a folder for its configuration, its logs and what it prints.

    Attributes:
        place: that folder.
        tree: the configuration.
        logs: the folder of run folders.
    """

    def __init__(self, place: Path, tree: Tree, logs: Path | None = None) -> None:
        place.mkdir(parents=True, exist_ok=True)
        self.place = place
        self.tree = tree
        self.logs = logs or place / "logs"
        self.file = place / f"{tree['name']}.yaml"
        self.file.write_text(to_yaml(tree))
        self._starts = 0

    def start(
        self,
        *words: str,
        launcher: str = "single",
        environment: Mapping[str, str] | None = None,
        hook: Hook | None = None,
        agent: Sequence[str] = (),
    ) -> Child:
        """Start it, or go on with it where it has begun.

        Args:
            words: further ones for main.py.
            launcher: "single", "lightning" (its own launcher, which needs two devices) or "torchrun".
            environment: additional variables.
            hook: done in every process of it before main.py: what is to go wrong.
            agent: further words for torchrun itself.
        """
        self._starts += 1
        line = ["--base", str(self.file), "--logdir", str(self.logs), "--resume", "auto", *words]
        options = ["--standalone", "--nproc-per-node", "2", *AGENT, *agent] if launcher == "torchrun" else []

        def work() -> None:
            if options:
                torchrun(options, [str(MAIN), *line], environment, hook)
            else:
                python(MAIN, line, environment, hook)

        return fork(work, self.place / f"log.{self._starts}")

    def complete(self, *words: str, seconds: float = 120.0, **how: Any) -> Child:
        """Start it and wait for its good end. Raises Wrong if that does not come."""
        child = self.start(*words, **how)
        code = child.wait(seconds)
        demand(code == 0, f"exit code {code}: {last_line(child.output())}")
        return child

    @property
    def folder(self) -> RunFolder:
        """Its run folder. Raises Wrong unless there is exactly one."""
        # A start that was killed before it had written its configuration leaves a folder that is no run.
        found = [path for path in self.logs.iterdir() if RunFolder(path).exists()] if self.logs.is_dir() else []
        demand(len(found) == 1, f"{len(found)} run folders, expected 1")
        return RunFolder(found[0])

    @property
    def state(self) -> RunState:
        """What run_state.json says. Raises Wrong where it says nothing."""
        state = self.folder.read_state()
        if state is None:
            raise Wrong("run_state.json cannot be read")
        return state

    def step(self) -> int:
        """Steps done, by metrics.csv; 0 before the first."""
        with suppress(OSError, ValueError, Wrong):
            last = self.folder.metrics_file.read_text().splitlines()[-1]
            return int(last.partition(",")[0])
        return 0

    def wait_for_step(self, step: int, child: Child, seconds: float = 60.0) -> None:
        """Raises Wrong unless it comes to this step."""
        wait_until(lambda: self.step() >= step or child.code is not None, seconds, every=0.03)
        demand(self.step() >= step, f"did not come to step {step}: {last_line(child.output())}")

    def newest(self) -> Path:
        """Its newest good checkpoint. Raises Wrong where there is none."""
        try:
            found = store.newest(self.folder.checkpoints)
        except CheckpointError as error:
            raise Wrong(str(error)) from error
        if found is None:
            raise Wrong("there is no checkpoint")
        return found

    def final(self, file: Path | None = None) -> Tree:
        """What has to be equal between two runs at one step: weights, averages, optimizers, rates, images seen."""
        return essence(self.newest() if file is None else file)

    def metrics(self, after: int = 0) -> list[tuple[str, str, str]]:
        """(step, name, value) of every logged number but the speeds, after a step."""
        rows = [row for row in read_metrics(self.folder.metrics_file) if int(row["step"]) > after]
        return sorted((row["step"], name, value) for row in rows for name, value in row.items() if name not in _SPEEDS)

    def copy(self, place: Path, step: int | None = None) -> "Run":
        """A copy of it, as if it had been killed: right after the save of `step`, or with all of its checkpoints."""

        def left_out(folder: str, names: list[str]) -> list[str]:
            if step is None or Path(folder).name != "checkpoints":
                return ["run_state.json"]
            return [name for name in names if not name.startswith(f"step={step:08d}.")]

        other = Run(place, self.tree)
        shutil.copytree(self.folder.path, other.logs / self.folder.path.name, ignore=left_out)
        return other


def ranks(child: Child, launcher: str) -> list[int]:
    """The processes of rank 0 and 1."""
    below = children(child.pid)
    return below[:2] if launcher == "torchrun" else [child.pid, *below[:1]]


def all_gone(child: Child, seconds: float) -> float:
    """How long it takes until `child` and all that this process started are gone. Raises Wrong if some stay."""
    began = time.monotonic()
    gone = wait_until(lambda: child.code is not None and not descendants(os.getpid()), seconds)
    left = len(descendants(os.getpid()))
    demand(gone, f"{left} processes still alive after {seconds:.0f} s; the launcher's exit code: {child.code}")
    return time.monotonic() - began


def essence(file: Path) -> Tree:
    """See `Run.final`."""
    state = store.load(file)
    kept = {key: state.get(key) for key in ("state_dict", "optimizer_states", "lr_schedulers", "global_step")}
    metrics = {name: value for name, value in state["ldm"]["metrics"].items() if name.startswith("val/")}
    return kept | {"images_seen": state["ldm"]["images_seen"], "metrics": metrics}


def difference(ours: Any, theirs: Any, key: str = "") -> str | None:
    """The first key at which two states are not equal bit for bit; None where they are."""
    if type(ours) is not type(theirs):
        return key or "type"
    if isinstance(ours, torch.Tensor):
        return None if ours.dtype == theirs.dtype and torch.equal(ours, theirs) else key
    if isinstance(ours, dict):
        if ours.keys() != theirs.keys():
            return f"{key}: keys"
        found = (difference(ours[name], theirs[name], f"{key}.{name}") for name in ours)
    elif isinstance(ours, list | tuple):
        if len(ours) != len(theirs):
            return f"{key}: length"
        found = (
            difference(one, other, f"{key}.{place}")
            for place, (one, other) in enumerate(zip(ours, theirs, strict=True))
        )
    else:
        return None if ours == theirs else key
    return next((name for name in found if name), None)


def demand_same(ours: Any, theirs: Any, what: str = "the final state") -> None:
    """Raise Wrong unless two states are equal bit for bit."""
    key = difference(ours, theirs)
    demand(key is None, f"{what} differs at {key}")


def no_leftovers(run: Run) -> None:
    """Raise Wrong if a temporary file is left in the run folder."""
    left = [path.name for path in run.folder.path.rglob("*.tmp.*")]
    demand(not left, f"temporary files left: {', '.join(left)}")


def last_line(text: str) -> str:
    """The last line that says something, for messages."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "nothing was printed"
