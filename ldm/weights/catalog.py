"""Every file of trained weights that ldm can use and did not train: what it is, where it comes from, how to tell it.

Nothing is downloaded while something runs. A file is looked for where it was named, in ldm's own cache, and in the
caches of the libraries that use it as well; `ldm weights` says which are there, and how to get the others.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class WeightFile:
    """One file.

    Attributes:
        name: what it is called on command lines and in configurations.
        file: its name on disk.
        use: what it is for, in a few words.
        source: where to get it: an address, or a package.
        sha256: of its bytes, 64 hex digits or, where only the file's own name tells, the first ones.
        size: in bytes.
        license: of the weights.
    """

    name: str
    file: str
    use: str
    source: str
    sha256: str
    size: int
    license: str


_HUB = "https://download.pytorch.org/models"

FILES = {
    entry.name: entry
    for entry in (
        WeightFile(
            "vgg16",
            "vgg16-397923af.pth",
            "LPIPS, features",
            f"{_HUB}/vgg16-397923af.pth",
            "397923af",
            553_433_881,
            "BSD-3-Clause",
        ),
    )
}
"""By name."""
