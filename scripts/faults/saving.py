"""Faults of disks and of the files on them."""

import mmap
import os
import random
import shutil
import signal
import struct
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from ldm.checkpoints import store, writer
from ldm.errors import CheckpointError
from scripts.faults import machine
from scripts.faults.harness import NotTried, Place, fault
from scripts.faults.inject import slow_steps
from scripts.faults.processes import demand, fork
from scripts.faults.runs import Run, demand_same, last_line, no_leftovers
from scripts.faults.tiny import stage2

_VALUES = 1_000_000


def _state(step: int, values: int = _VALUES) -> dict[str, Any]:
    weights = {"weight": torch.full((values,), float(step))}
    return {"state_dict": weights, "global_step": step, "ldm": {"step": step, "metrics": {}}}


def _save_for_ever(folder: Path, acknowledged: mmap.mmap) -> None:
    for step in range(1, 1_000_000):
        store.save(folder / "last.ckpt", _state(step))
        acknowledged[:8] = struct.pack("q", step)


@fault(1, "kill -9 during a save")
def killed_while_saving(place: Place) -> str:
    """kill -9 at a random moment of a process that saves without pause, on the disk of the temporary folder and on
    another file system.

    Expected: the file loads, whole, and is not older than the last save that returned; what was half written is
    removed at the next start.
    """
    folders = {"same": place.new("saves")}
    if Path("/dev/shm").is_dir() and os.stat("/dev/shm").st_dev != os.stat(tempfile.gettempdir()).st_dev:
        folders["other"] = Path(tempfile.mkdtemp(dir="/dev/shm"))
    halves = 0
    try:
        for number in place.repeats(100, quick=8):
            for name, folder in folders.items():
                with place.trial(f"{name} file system, kill {number}"):
                    halves += _kill_one_saver(place, folder)
    finally:
        shutil.rmtree(folders.get("other", place.folder / "none"), ignore_errors=True)
    return f"on {' and '.join(folders)} file system; {halves} kills left a half-written file, which was swept"


def _kill_one_saver(place: Place, folder: Path) -> int:
    acknowledged = mmap.mmap(-1, 8)
    child = fork(lambda: _save_for_ever(folder, acknowledged), place.folder / "log.saver")
    time.sleep(place.random.uniform(0.0, 0.3))
    child.send(signal.SIGKILL)
    demand(child.wait(10) == -signal.SIGKILL, f"the saver failed: {last_line(child.output())}")
    (promised,) = struct.unpack("q", acknowledged[:8])
    swept = writer.sweep(folder)
    demand({path.name for path in folder.iterdir()} <= {"last.ckpt"}, f"left: {os.listdir(folder)}")
    if promised or (folder / "last.ckpt").exists():
        state = store.load(folder / "last.ckpt")
        demand(state["global_step"] >= promised, f"step {state['global_step']}, though {promised} was acknowledged")
        demand(bool((state["state_dict"]["weight"] == state["global_step"]).all()), "a mix of two saves")
    return len(swept)


@fault(3, "power cut")
def power_cut(place: Place) -> str:
    """The image under a mounted ext4 is copied at the moment a save returns, then repaired and mounted as after a cut.

    Expected: the new checkpoint is there and loads.
    """
    machine.private_mounts()
    image, live, dead = (place.folder / name for name in ("disk.img", "live", "dead"))
    machine.ext4_image(image, 64)
    machine.mount_image(image, live)
    for number in place.repeats(20, quick=3):
        with place.trial(f"cut {number}"):
            step = number + 1
            store.save(live / "last.ckpt", _state(step))
            shutil.copyfile(image, place.folder / "cut.img")
            subprocess.run(["fsck.ext4", "-p", place.folder / "cut.img"], capture_output=True)
            machine.mount_image(place.folder / "cut.img", dead)
            try:
                found = store.load(dead / "last.ckpt")["global_step"]
            finally:
                machine.unmount(dead)
            demand(found == step, f"step {found} is there, {step} had been acknowledged")
    machine.unmount(live)
    return "present 0 s after the save returned (ext4 on a loop device; no real power was cut)"


@fault(4, "checkpoint disk full")
def disk_full(place: Place) -> str:
    """A run on a disk of 12 MB that is filled to the brim meanwhile; in one half of the trials room is made again.

    Expected: the old checkpoint loads, nothing partial bears a valid name, the text says how many bytes are free and
    needed; with room again the run ends well, without it with code 6.
    """
    machine.private_mounts()
    straight = Run(place.new("straight"), stage2(place.lab, steps=60, every=5))
    straight.complete()
    for number in place.repeats(10, quick=2):
        again = number % 2 == 0
        with place.trial("room again" if again else "no room"):
            disk = machine.small_disk(place.new("disk"), 12)
            run = Run(place.new("run"), straight.tree, logs=disk / "logs")
            child = run.start(hook=slow_steps(0.02))
            run.wait_for_step(8, child)
            filler = machine.fill(disk)
            demand(child.says("needed", 30), f"nobody noticed: {last_line(child.output())}")
            demand(store.load(run.newest())["global_step"] > 0, "no old checkpoint")
            if again:
                filler.unlink()
            code = child.wait(60)
            text = child.output()
            demand("free" in text and "needed" in text, f"no word of bytes free and needed: {last_line(text)}")
            demand(code == (0 if again else 6), f"exit code {code}: {last_line(text)}")
            filler.unlink(missing_ok=True)
            run.complete()
            no_leftovers(run)
            demand_same(run.final(), straight.final())
    return "old checkpoint good, afterwards the same final state as undisturbed"


@fault(5, "temporary folder full")
def temporary_full(place: Place) -> str:
    """TMPDIR lies on a full disk, the run folder does not.

    Expected: every save succeeds; nothing is ever staged outside of the run folder.
    """
    machine.private_mounts()
    for number in place.repeats(5, quick=1):
        with place.trial(f"run {number}"):
            full = machine.small_disk(place.new("tmp"), 1)
            machine.fill(full)
            run = Run(place.new("run"), stage2(place.lab, steps=12, every=3))

            def forget() -> None:
                tempfile.tempdir = None

            run.complete(environment={"TMPDIR": str(full)}, hook=forget)
            demand(store.load(run.newest())["global_step"] == 12, "the last checkpoint is not of step 12")
    return "saved as ever"


@fault(6, "no permission to write")
def not_writable(place: Place) -> str:
    """The folder of runs is read-only, immutable, of mode 500 for a user without rights, or on a full disk.

    Expected: code 6 within 5 s, before any step, naming the folder.
    """
    skipped = []
    for kind in ("read-only", "immutable", "mode 500", "full"):
        try:
            with place.trial(kind):
                _demand_refused(place, kind)
        except NotTried as reason:
            skipped.append(f"{kind} ({reason})")
    return "refused at once" + (f"; not tried: {', '.join(skipped)}" if skipped else "")


def _demand_refused(place: Place, kind: str) -> None:
    folder, hook = place.new("logs"), None
    if kind in ("read-only", "full"):
        machine.private_mounts()
        machine.small_disk(folder, 1)
        if kind == "full":
            machine.fill(folder)
        else:
            machine.command("mount", "-o", "remount,ro", str(folder))
    elif kind == "immutable":
        machine.command("chattr", "+i", str(folder))
    else:
        folder.chmod(0o500)
        if os.getuid() == 0:
            os.chown(folder, machine.NOBODY, machine.NOBODY)
            hook = machine.become_nobody
    run = Run(place.new("run"), stage2(place.lab, steps=2), logs=folder)
    began = time.monotonic()
    child = run.start(hook=hook)
    code = child.wait(30)
    took = time.monotonic() - began
    if kind == "immutable":
        machine.command("chattr", "-i", str(folder))
    text = child.output()
    demand(code == 6, f"exit code {code}: {last_line(text)}")
    demand(str(folder) in text, f"the folder is not named: {last_line(text)}")
    demand(took < 5, f"took {took:.1f} s")


def _with_three_saves(place: Place) -> Run:
    run = Run(place.new("run"), stage2(place.lab, steps=12, every=4, keep=3))
    run.complete()
    return run


@fault(7, "newest checkpoint truncated")
def truncated(place: Place) -> str:
    """The newest of three checkpoints is cut to 0, 10, 50 and 99 %.

    Expected: it is named and kept as .corrupt, the run goes on from the one before, to the same end, with code 0.
    """
    whole = _with_three_saves(place)
    for share in place.some((0.5, 0.0, 0.1, 0.99), quick=2):
        with place.trial(f"{share:.0%}"):
            run = whole.copy(place.new("cut"))
            newest = run.newest()
            os.truncate(newest, int(share * newest.stat().st_size))
            text = run.complete().output()
            demand(newest.name in text, f"{newest.name} is not named")
            demand(newest.with_name(f"{newest.name}.corrupt").exists(), "it was not set aside")
            demand_same(run.final(), whole.final())
    return "resumed from the one before"


@fault(8, "flipped bit in a checkpoint")
def flipped(place: Place) -> str:
    """One random bit of a checkpoint is flipped: by reading the file, and by resuming the run.

    Expected: the checksum refuses the file, and the run goes on from the one before, to the same end.
    """
    whole = _with_three_saves(place)
    newest = whole.newest()
    good = newest.read_bytes()
    target = place.folder / "flipped.ckpt"
    for number in place.repeats(100, quick=30):
        with place.trial(f"flip {number}"):
            target.write_bytes(_flip(good, place.random))
            try:
                store.load(target)
            except CheckpointError as error:
                demand(target.name in str(error), f"the file is not named: {error}")
                continue
            demand(False, "a damaged file was loaded")
    for number in place.repeats(10, quick=1):
        with place.trial(f"resume {number}"):
            run = whole.copy(place.new("resume"))
            file = run.folder.checkpoints / newest.name
            file.write_bytes(_flip(good, place.random))
            demand(newest.name in run.complete().output(), f"{newest.name} is not named")
            demand_same(run.final(), whole.final())
    return "found by reading, and fallen back from by resuming"


def _flip(data: bytes, draw: random.Random) -> bytes:
    hurt = bytearray(data)
    hurt[draw.randrange(len(hurt))] ^= 1 << draw.randrange(8)
    return bytes(hurt)


@fault(9, "all checkpoints bad")
def all_bad(place: Place) -> str:
    """Every checkpoint of a run is damaged.

    Expected: code 4 with the name of each, as often as one tries; never a start from step 0.
    """
    run = _with_three_saves(place)
    (run.folder.path / "run_state.json").unlink()
    names = [file.name for file in run.folder.checkpoints.iterdir()]
    for file in run.folder.checkpoints.iterdir():
        file.write_bytes(_flip(file.read_bytes(), place.random))
    for number in range(2):
        with place.trial(f"start {number}"):
            child = run.start()
            code = child.wait(60)
            demand(code == 4, f"exit code {code}")
            demand(all(name in child.output() for name in names), f"not all named: {last_line(child.output())}")
            demand(run.step() == 12, "it began anew")
    return "refused, listing all three"
