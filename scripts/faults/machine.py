"""What faults do to the machine, in namespaces of their own: disks that are small or full, networks that are cut."""

import ctypes
import os
import shutil
import subprocess
from contextlib import suppress
from pathlib import Path

from scripts.faults.harness import NotTried

_CLONE_NEWNS = 0x20000
_CLONE_NEWNET = 0x40000000
NOBODY = 65534


def private_mounts() -> None:
    """From now on this process and its children mount for themselves alone; NotTried where that is not permitted."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNS):
        raise NotTried(f"mounting needs more rights ({os.strerror(ctypes.get_errno())})")
    command("mount", "--make-rprivate", "/")


def small_disk(folder: Path, megabytes: int) -> Path:
    """A new tmpfs of this size at `folder`; call private_mounts first."""
    folder.mkdir(parents=True, exist_ok=True)
    command("mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder))
    return folder


def fill(folder: Path, leave: int = 0) -> Path:
    """Fill the disk of `folder` but for `leave` bytes; the file that does it."""
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        while free(folder) > leave:
            file.write(bytes(min(1 << 16, free(folder) - leave)))
    return filler


def free(folder: Path) -> int:
    """Bytes that are free on the disk of `folder`."""
    return shutil.disk_usage(folder).free


def ext4_image(image: Path, megabytes: int) -> None:
    """A new ext4 file system in a file."""
    with image.open("wb") as file:
        file.truncate(megabytes << 20)
    command("mkfs.ext4", "-q", "-F", str(image))


def mount_image(image: Path, folder: Path) -> None:
    """Mount it, through a loop device; call private_mounts first."""
    folder.mkdir(exist_ok=True)
    command("mount", "-o", "loop", str(image), str(folder))


def unmount(folder: Path) -> None:
    command("umount", str(folder))


def command(*words: str) -> None:
    """Do it; NotTried where the machine has no such program or does not permit it."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    except FileNotFoundError:
        raise NotTried(f"there is no {words[0]} here") from None
    if done.returncode:
        raise NotTried(f"{' '.join(words)}: {done.stderr.strip()}")


def become_nobody() -> None:
    """Give up root's rights over files, in this process for good."""
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)


class TwoNodes:
    """Two network namespaces with a cable between them; NotTried where that is not permitted.

    Attributes:
        addresses: of node 0 and 1.
    """

    addresses = ("10.213.0.1", "10.213.0.2")

    def __init__(self) -> None:
        self.names = [f"ldm{os.getpid()}n{node}" for node in range(2)]
        self._ends = [f"ldm{os.getpid()}v{node}"[-15:] for node in range(2)]
        try:
            for name in self.names:
                command("ip", "netns", "add", name)
            command("ip", "link", "add", self._ends[0], "type", "veth", "peer", "name", self._ends[1])
            for name, end, address in zip(self.names, self._ends, self.addresses, strict=True):
                command("ip", "link", "set", end, "netns", name)
                for device in ("lo", end):
                    command("ip", "-n", name, "link", "set", device, "up")
                command("ip", "-n", name, "addr", "add", f"{address}/24", "dev", end)
        except NotTried:
            self.remove()
            raise

    def environment(self, node: int) -> dict[str, str]:
        """What gloo needs to know on this node."""
        return {"GLOO_SOCKET_IFNAME": self._ends[node]}

    def enter(self, node: int) -> None:
        """Be on this node from here on, in this process and its children."""
        handle = os.open(f"/var/run/netns/{self.names[node]}", os.O_RDONLY)
        if ctypes.CDLL(None, use_errno=True).setns(handle, _CLONE_NEWNET):
            raise NotTried(f"setns: {os.strerror(ctypes.get_errno())}")
        os.close(handle)

    def cut(self, how: str) -> None:
        """Cut the cable: "link down", or "black hole", where packets leave and never arrive."""
        if how == "link down":
            command("ip", "-n", self.names[0], "link", "set", self._ends[0], "down")
            return
        for name, end, other in zip(self.names, self._ends, reversed(self.addresses), strict=True):
            wrong = ("lladdr", "02:00:00:00:00:99", "dev", end, "nud", "permanent")
            command("ip", "-n", name, "neigh", "replace", other, *wrong)

    def remove(self) -> None:
        for name in self.names:
            with suppress(NotTried):
                command("ip", "netns", "del", name)
