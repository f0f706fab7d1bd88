"""Faults of pictures and labels."""

import shutil
import struct
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from scripts.faults.harness import Place, fault
from scripts.faults.processes import Wrong, demand, fork
from scripts.faults.runs import Run, demand_same, last_line
from scripts.faults.tiny import Tree, pictures, stage1, stage2, two_ranks


def _noise(side: int = 48) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)


def _cut(path: Path, share: float) -> None:
    Image.fromarray(_noise()).save(path)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


def _animated(path: Path) -> None:
    frames = [Image.fromarray(_noise()[:, :, ::order]) for order in (1, -1)]
    frames[0].save(path, save_all=True, append_images=frames[1:])


def _misnamed(path: Path) -> None:
    Image.fromarray(_noise()).save(path.with_suffix(".bmp"))
    path.with_suffix(".bmp").rename(path)


BROKEN: dict[str, Callable[[Path], object]] = {
    "cut.jpg": lambda path: _cut(path, 0.5),
    "cut.png": lambda path: _cut(path, 0.6),
    "empty.png": lambda path: path.write_bytes(b""),
    "page.jpg": lambda path: path.write_text("<html>404</html>"),
    "float.tiff": lambda path: Image.fromarray(np.ones((16, 16), np.float32)).save(path),
}
UNUSUAL: dict[str, Callable[[Path], object]] = {
    "deep.png": lambda path: Image.fromarray(np.full((48, 48), 40_000, np.uint16)).save(path),
    "cmyk.jpg": lambda path: Image.fromarray(_noise()).convert("CMYK").save(path),
    "animated.gif": _animated,
    "misnamed.png": _misnamed,
    "alpha.png": lambda path: Image.fromarray(_noise()).convert("RGBA").save(path),
    "palette.png": lambda path: Image.fromarray(_noise()).convert("P").save(path),
}


def _with(place: Place, files: dict[str, Callable[[Path], object]], **data: Any) -> tuple[Path, Tree]:
    """A folder of pictures with these among them, and stage 1 on it: two epochs."""
    lab = place.new("lab")
    pictures(lab / "pictures")
    for name, make in files.items():
        make(lab / "pictures" / "cats" / name)
    return lab / "pictures", stage1(lab, steps=8, every=1, keep=99, **data)


@fault(29, "damaged and unusual pictures")
def damaged(place: Place) -> str:
    """Cut, empty, mislabelled and floating-point files; 16-bit, CMYK, animated, misnamed, transparent and palette ones.

    Expected: a damaged file is named, and ends the run with 3 or, where a share of them is allowed, is replaced in the
    same way with 0 and 2 workers, on 2 ranks and after a resume; an unusual one is read.
    """
    for name, make in place.some(BROKEN.items(), quick=1):
        with place.trial(f"{name} refused"):
            _, tree = _with(place, {name: make}, max_broken=0.0)
            child = Run(place.new("run"), tree).start()
            code, text = child.wait(60), child.output()
            demand(code == 3 and name in text, f"exit code {code}: {last_line(text)}")
    for name, make in place.some(UNUSUAL.items(), quick=1):
        with place.trial(f"{name} read"):
            _, tree = _with(place, {name: make}, max_broken=0.0)
            Run(place.new("run"), tree).complete()
    _, tree = _with(place, BROKEN, max_broken=0.5)
    straight = Run(place.new("straight"), tree)
    with place.trial("replaced"):
        text = straight.complete().output()
        demand(all(name in text for name in BROKEN), "not all are named")
    with place.trial("the same with 2 workers"):
        run = Run(place.new("run"), tree)
        run.complete("data.params.num_workers=2")
        demand_same(run.final(), straight.final())
    with place.trial("the same after a resume"):
        run = straight.copy(place.new("resumed"), 3)
        run.complete()
        demand_same(run.final(), straight.final())
    with place.trial("the same on two ranks"):
        run = Run(place.new("two"), two_ranks(tree))
        run.complete(launcher="lightning")
        demand_same(run.final()["images_seen"], straight.final()["images_seen"], "the number of images seen")
    return "named; refused, replaced or read"


def _bomb(path: Path, side: int) -> None:
    """A white PNG of side x side pixels at one bit, written without ever holding it."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer, row = zlib.compressobj(9), b"\0" + b"\xff" * -(-side // 8)
    data = b"".join([packer.compress(row) for _ in range(side)]) + packer.flush()
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b""))


@fault(30, "decompression bomb")
def bombs(place: Place) -> str:
    """PNGs of 20,000 x 20,000, 13,300 x 13,300 and 7,100 x 7,100 pixels, of which the last is just above the limit.

    Expected: refused by their header, named with size and limit, code 3; reading takes less than 100 MB.
    """
    grown = 0.0
    for side in place.some((13_300, 20_000, 7_100), quick=1):
        with place.trial(f"{side} x {side}"):
            folder, tree = _with(place, {"bomb.png": lambda path, side=side: _bomb(path, side)}, max_broken=0.0)  # type: ignore[misc]
            weight = place.new("rss") / "megabytes"
            child = fork(partial(_weigh, folder / "cats" / "bomb.png", weight), place.folder / "log")
            demand(child.wait(60) == 0, f"reading it: {last_line(child.output())}")
            grown = max(grown, float(weight.read_text()))
            demand(grown < 100, f"took {grown:.0f} MB")
            child = Run(place.new("run"), tree).start()
            code, text = child.wait(60), child.output()
            demand(code == 3, f"exit code {code}: {last_line(text)}")
            pixels = str(side) in text or str(side * side) in text
            demand("bomb.png" in text and pixels and "limit" in text, f"it says: {last_line(text)}")
    return f"refused; {grown:.1f} MB at most"


def _weigh(path: Path, result: Path) -> None:
    """Write down by how many megabytes the process grows at most while it reads a picture that it has to refuse."""
    from ldm.data.decoding import read_image
    from ldm.errors import DataError

    def megabytes(key: str) -> float:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
        return float(line.split()[1]) / 1e3

    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    before = megabytes("VmRSS")
    try:
        read_image(path)
    except DataError:
        result.write_text(str(megabytes("VmHWM") - before))
        return
    raise Wrong("it was read")


@fault(31, "nothing to train on")
def nothing(place: Place) -> str:
    """No pictures, no folder, a single one that is held out, an empty validation folder; 3 pictures for batches of 6.

    Expected: code 3 with the numbers, and no run folder; three pictures are trained on, over and over.
    """
    empty, one, three = place.new("empty"), place.new("one"), place.new("three")
    pictures(one, 1)
    pictures(three, 3)
    folder = "{{target: ldm.data.sources.folder.ImageFolder, params: {{root: {}}}}}".format
    cases = {
        "empty": (f"data.params.train={folder(empty)}", "0 images"),
        "no folder": (f"data.params.train={folder(place.folder / 'none')}", "none"),
        "all held out": (f"data.params.train={folder(one)}", "of 1 items"),
        "empty validation": (f"data.params.validation={folder(empty)}", "0 images"),
    }
    for stage in place.some((stage1, stage2), quick=1):
        for name, (word, said) in place.some(cases.items(), quick=2):
            with place.trial(f"{stage.__name__}: {name}"):
                run = Run(place.new("run"), stage(place.lab))
                child = run.start(word, *(["data.params.num_validation=0"] if name == "empty validation" else []))
                code, text = child.wait(60), child.output()
                demand(code == 3 and said in text, f"exit code {code}: {last_line(text)}")
                demand(not run.logs.exists() or not any(run.logs.iterdir()), "it left a run folder")
    with place.trial("three pictures"):
        run = Run(place.new("run"), stage1(place.lab, steps=4))
        run.complete(f"data.params.train={folder(three)}", "data.params.num_validation=0")
        demand(run.final()["images_seen"] == 24, f"{run.final()['images_seen']} images were seen")
    return "refused, or trained on"


def _labels(change: Callable[[np.ndarray], np.ndarray], root: Path) -> None:
    """An idx data set (MNIST's format) of 20 pictures whose labels are changed."""
    images = np.random.default_rng(0).integers(0, 256, (20, 28, 28), dtype=np.uint8)
    labels = change(np.arange(20, dtype=np.uint8) % 10)
    for name, array in (("train-images-idx3-ubyte", images), ("train-labels-idx1-ubyte", labels)):
        sizes = struct.pack(f">{array.ndim}I", *array.shape)
        (root / name).write_bytes(bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes())


@fault(32, "missing, extra and impossible labels")
def labels(place: Place) -> str:
    """Fewer or more labels than pictures, a label beyond the classes, a model of fewer classes than the data, a class
    that appears after the cache was built.

    Expected: refused at the start with 2 or 3, naming item or class and the range; never an assertion on a device.
    """
    changes: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "missing": lambda found: found[:-1],
        "extra": lambda found: np.append(found, np.uint8(1)),
        "impossible": lambda found: np.where(np.arange(20) == 7, np.uint8(10), found),
    }
    for name, change in place.some(changes.items(), quick=1):
        with place.trial(name):
            root = place.new("idx")
            _labels(change, root)
            train = {"target": "ldm.data.sources.arrays.MNIST", "params": {"root": str(root)}}
            child = Run(place.new("run"), stage1(place.lab, train=train, channels=1)).start()
            code, text = child.wait(30), child.output()
            demand(code == 3 and "labels" in text, f"exit code {code}: {last_line(text)}")
    with place.trial("fewer classes in the model"):
        child = Run(place.new("run"), stage2(place.lab)).start("model.params.conditioner.params.num_classes=1")
        code, text = child.wait(30), child.output()
        demand(code in (2, 3) and "num_classes" in text, f"exit code {code}: {last_line(text)}")
    with place.trial("a new class"):
        lab = place.new("lab")
        for name in ("pictures", "autoencoder", "cache"):
            shutil.copytree(place.lab / name, lab / name)
        shutil.copytree(lab / "pictures" / "cats", lab / "pictures" / "birds")
        child = Run(place.new("run"), stage2(lab)).start()
        code, text = child.wait(30), child.output()
        demand(code == 3 and "class_names" in text, f"exit code {code}: {last_line(text)}")
    return "refused by name at the start"
