"""Faults of trust: configurations, checkpoints and caches by a stranger who wants his code to run."""

import json
import os
import pickle
import shutil
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ldm.checkpoints import sealed_file, store
from ldm.config.load import to_yaml
from scripts.faults.harness import Place, fault
from scripts.faults.processes import demand
from scripts.faults.runs import Run, last_line
from scripts.faults.tiny import Tree, node, stage1, stage2


class Harm:
    """Touches a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.marker}",)


def _targets(marker: Path) -> dict[str, Tree]:
    """Nodes that would touch the marker, or run or fetch what a stranger names, if they were built."""
    touch, code = f"touch {marker}", f"open({str(marker)!r}, 'w')"
    return {
        "os.system": node("os.system", command=touch),
        "posix.system": node("posix.system", command=touch),
        "subprocess.Popen": node("subprocess.Popen", args=["touch", str(marker)]),
        "subprocess.check_output": node("subprocess.check_output", args=["touch", str(marker)]),
        "builtins.exec": node("builtins.exec", source=code),
        "builtins.eval": node("builtins.eval", source=code),
        "builtins.open": node("builtins.open", file=str(marker), mode="w"),
        "pathlib.Path.touch": node("pathlib.Path.touch", self=str(marker)),
        "importlib.import_module": node("importlib.import_module", name="this"),
        "runpy.run_path": node("runpy.run_path", path_name=str(marker.with_suffix(".py"))),
        "pickle.loads": node("pickle.loads", data=str(pickle.dumps(Harm(marker), 0), "latin1")),
        "torch.load": node("torch.load", f=str(marker.with_suffix(".pt")), weights_only=False),
        "torch.hub.load": node("torch.hub.load", repo_or_dir=str(marker.parent), model="harm", source="local"),
        "torch.jit.load": node("torch.jit.load", f=str(marker.with_suffix(".pt"))),
        "torch.package.PackageImporter": node("torch.package.PackageImporter", file_or_buffer=str(marker)),
        "torch.serialization.os.system": node("torch.serialization.os.system", command=touch),
        "torch.nn.__builtins__.exec": node("torch.nn.__builtins__.exec", source=code),
        "torch.multiprocessing.spawn": node("torch.multiprocessing.spawn", fn="os.system", args=[touch]),
        "torchvision.io.write_file": node("torchvision.io.write_file", filename=str(marker), data="x"),
        "pytorch_lightning...os.system": node("pytorch_lightning.utilities.imports.os.system", command=touch),
        "ldm.runtime.distributed.os.system": node("ldm.runtime.distributed.os.system", command=touch),
        "ldm.config.yaml_text.Path.touch": node("ldm.config.yaml_text.Path.touch", self=str(marker)),
        "ldm.config.yaml_text.yaml.load": node(
            "ldm.config.yaml_text.yaml.load", stream=f"!!python/object/apply:os.system ['{touch}']"
        ),
        "a module of the working folder": node("trap.Trap"),
        "partial": node("os.system", partial=True, command=touch),
        "nested in a list": node("torch.nn.Sequential", args=[[node("os.system", command=touch)]]),
        "_target_": {"_target_": "os.system", "command": touch},
    }


def _through_configuration(place: Place, marker: Path, attack: Tree, key: str) -> None:
    tree = stage1(place.lab)
    tree["model"]["params"][key] = attack
    (place.folder / "trap.py").write_text(f"open({str(marker)!r}, 'w')\nclass Trap: pass\n")
    sys.path.insert(0, str(place.folder))
    torch.save({"x": Harm(marker)}, marker.with_suffix(".pt"))
    marker.with_suffix(".py").write_text(f"open({str(marker)!r}, 'w')\n")
    (marker.parent / "hubconf.py").write_text(f"open({str(marker)!r}, 'w')\ndef harm(): pass\n")
    _demand_refused(Run(place.new("run"), tree), marker, (2,))


def _demand_refused(run: Run, marker: Path, codes: tuple[int, ...], *words: str, said: str = "", **how: Any) -> None:
    child = run.start(*words, **how)
    code, text = child.wait(60), child.output()
    demand(not marker.exists(), "its code was executed")
    demand(code in codes, f"exit code {code}: {last_line(text)}")
    demand(said in text, f"{said} is not in: {text[-300:]}")


def _sealed_pickle(place: Place, marker: Path) -> None:
    """A run whose newest checkpoint is sealed as it should be, and holds an object with __reduce__."""
    run = Run(place.new("run"), stage2(place.lab, steps=2))
    run.complete()
    good = store.load(run.newest())
    # An attacker can compute a checksum, too.
    sealed_file.write(run.folder.checkpoints / "step=00000009.ckpt", good | {"x": Harm(marker)}, 9)
    _demand_refused(run, marker, (4,), "lightning.trainer.max_steps=4")


def _named_pickle(place: Place, marker: Path) -> None:
    """`--resume evil.ckpt`, a bare pickle."""
    file = place.new("evil") / "evil.ckpt"
    file.write_bytes(pickle.dumps(Harm(marker)))
    _demand_refused(Run(place.new("run"), stage2(place.lab)), marker, (4,), "--resume", str(file), said="evil.ckpt")


def _torch_pickle(place: Place, marker: Path) -> None:
    """The same as torch.save writes it."""
    file = place.new("evil") / "evil.ckpt"
    torch.save({"ldm": {"config": {}}, "x": Harm(marker)}, file)
    _demand_refused(Run(place.new("run"), stage2(place.lab)), marker, (4,), "--resume", str(file), said="evil.ckpt")


def _autoencoder_pickle(place: Place, marker: Path) -> None:
    """data.params.autoencoder names a sealed checkpoint with an object in it."""
    file = place.new("evil") / "evil.ckpt"
    sealed_file.write(file, {"state_dict": {}, "ldm": {"step": 1, "kind": "autoencoder"}, "x": Harm(marker)}, 1)
    run = Run(place.new("run"), stage2(place.lab))
    _demand_refused(run, marker, (4,), f"data.params.autoencoder={file}", said="evil.ckpt")


def _autoencoder_target(place: Place, marker: Path) -> None:
    """An autoencoder's checkpoint whose stored configuration names os.system as its encoder."""
    state = store.load(store.verify(place.lab / "autoencoder").path)
    state["ldm"]["config"]["model"]["params"]["encoder"] = node("os.system", command=f"touch {marker}")
    file = place.new("evil") / "evil.ckpt"
    store.save(file, state)
    run = Run(place.new("run"), stage2(place.lab))
    _demand_refused(run, marker, (2, 4), f"data.params.autoencoder={file}", said="os.system")


def _configuration_in_checkpoint(place: Place, marker: Path) -> None:
    """`--resume` of a checkpoint whose stored configuration names os.system."""
    run = Run(place.new("run"), stage2(place.lab, steps=2))
    run.complete()
    state = store.load(run.newest())
    state["ldm"]["config"]["data"] = node("os.system", command=f"touch {marker}")
    file = place.new("evil") / "evil.ckpt"
    store.save(file, state)
    words = ["--resume", str(file), "--allow-change", "data", "--allow-change", "model"]
    _demand_refused(Run(place.new("other"), {"name": "evil"}), marker, (2,), *words, said="os.system")


def _configuration_of_a_run(place: Place, marker: Path) -> None:
    """A run folder whose config.yaml was changed to os.system."""
    run = Run(place.new("run"), stage2(place.lab, steps=2))
    run.complete()
    tree = json.loads(json.dumps(run.tree))
    tree["model"]["params"]["network"] = node("os.system", command=f"touch {marker}")
    for file in (run.folder.config_file, run.folder.source_file):
        file.write_text(to_yaml(tree))
    words = ("--resume", str(run.folder.path), "lightning.trainer.max_steps=4", "--allow-change", "model")
    _demand_refused(Run(place.new("other"), {"name": "tiny_diffusion"}), marker, (2,), *words, said="os.system")


def _python_tag(place: Place, marker: Path) -> None:
    """!!python/object/apply:os.system in the file."""
    run = Run(place.new("run"), stage2(place.lab))
    text = run.file.read_text()
    run.file.write_text(text.replace("seed: 23", f"seed: !!python/object/apply:os.system ['touch {marker}']"))
    _demand_refused(run, marker, (2,), said="refused")


def _forged_metadata(place: Place, marker: Path) -> None:
    """Folders in the form of torch.distributed.checkpoint, whose `.metadata` is a pickle, beside the checkpoints."""
    run = Run(place.new("run"), stage2(place.lab, steps=2))
    run.complete()
    for name in ("step=00000009.ckpt", "step=00000002.shards", "sharded"):
        folder = run.folder.checkpoints / name
        folder.mkdir(exist_ok=True)
        (folder / ".metadata").write_bytes(pickle.dumps(Harm(marker)))
        (folder / "__0_0.distcp").write_bytes(pickle.dumps(Harm(marker)))
    _demand_refused(run, marker, (0, 4), "lightning.trainer.max_steps=4")
    named = str(run.folder.checkpoints / "sharded")
    _demand_refused(Run(place.new("other"), run.tree), marker, (2, 4), "--resume", named)


def _forced_unpickling(place: Place, marker: Path) -> None:
    """The environment variable by which torch unpickles anything."""
    file = place.new("evil") / "evil.ckpt"
    torch.save({"x": Harm(marker)}, file)
    run = Run(place.new("run"), stage2(place.lab))
    environment = {"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}
    _demand_refused(run, marker, (4,), "--resume", str(file), environment=environment, said="TORCH_FORCE")


def _names_that_climb(place: Place, marker: Path) -> None:
    """A zip archive whose member is called ../../marker, as a checkpoint; and a run's name with slashes."""
    file = place.new("evil") / "evil.ckpt"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(f"../../../{marker.name}", "x")
    _demand_refused(Run(place.new("run"), stage2(place.lab)), marker, (4,), "--resume", str(file))
    _demand_refused(Run(place.new("run"), stage2(place.lab)), marker, (2,), "--name", f"../../{marker.name}")


def _environment_in_configuration(place: Place, marker: Path) -> None:
    """${oc.env:SECRET}, which would end up in the saved configuration and the log."""
    run = Run(place.new("run"), stage2(place.lab))
    _demand_refused(run, marker, (2,), "name=${oc.env:SECRET}", environment={"SECRET": "s3cr3t"})
    demand("s3cr3t" not in (run.place / "log.1").read_text(), "the secret was printed")


FILES = {
    "forged .metadata": _forged_metadata,
    "sealed checkpoint with a pickle": _sealed_pickle,
    "pickle as checkpoint": _named_pickle,
    "torch.save of a pickle": _torch_pickle,
    "pickle as autoencoder": _autoencoder_pickle,
    "target in an autoencoder's checkpoint": _autoencoder_target,
    "target in a checkpoint's configuration": _configuration_in_checkpoint,
    "target in a run's configuration": _configuration_of_a_run,
    "YAML tag": _python_tag,
    "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": _forced_unpickling,
    "names that climb": _names_that_climb,
    "secret of the environment": _environment_in_configuration,
}


@fault(38, "code in a configuration, a checkpoint, a cache")
def attacks(place: Place) -> str:
    """Targets such as os.system, exec, torch.load and torch.hub.load, bare and nested; pickles bare, sealed and by
    torch.save; stored configurations with such targets; a forged .metadata; YAML tags; climbing names.

    Expected: refused with 2 or 4; the file that each would touch does not exist.
    """
    for number, (name, attack) in enumerate(_targets(place.new("marker") / "touched").items()):
        if place.figures.quick and number % 9:
            continue
        with place.trial(name):
            marker = place.new("marker") / "touched"
            attack = _targets(marker)[name]
            _through_configuration(place, marker, attack, "loss" if number % 2 else "encoder")
    for name, make in place.some(FILES.items(), quick=3):
        with place.trial(name):
            make(place, place.new("marker") / "touched")
    with place.trial("the marker works"):
        marker = place.new("marker") / "touched"
        pickle.loads(pickle.dumps(Harm(marker)))
        demand(marker.exists(), "an executed attack would not be seen")
    shutil.rmtree(place.folder / "trap.py", ignore_errors=True)
    return "attacks, none executed (the last trial shows that an executed one is seen)"
