"""Faults of the latent cache: damage, staleness, latents that do not fit, builders that are killed or not alone."""

import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ldm.errors import DataError
from ldm.latents.claims import read_sealed, seal
from ldm.latents.manifest import verify
from scripts.faults.harness import Place, fault
from scripts.faults.interpreter import ROOT, Hook, python
from scripts.faults.processes import Child, demand, fork, wait_until
from scripts.faults.runs import Run, last_line
from scripts.faults.tiny import Tree, pictures, stage1, stage2


def _files(cache: Path) -> dict[str, bytes]:
    """Content of a cache, but for its locks."""
    return {
        str(path.relative_to(cache)): path.read_bytes()
        for path in sorted(cache.rglob("*"))
        if path.is_file() and path.name != "claims"
    }


@fault(33, "bit rot in the cache")
def bit_rot(place: Place) -> str:
    """One random bit of a finished cache is flipped: `cache_latents.py --verify`, and a run that reads it.

    Expected: both name the damaged file; the run ends with 3 at the first read.
    """
    cache = Path(shutil.copytree(place.lab / "cache", place.folder / "cache"))
    for number in place.repeats(100, quick=30):
        with place.trial(f"flip {number}"):
            file, good = _flip_one(cache / "train", place.random)
            try:
                verify(cache / "train")
            except DataError as error:
                demand(file.name in str(error), f"the file is not named: {error}")
            else:
                demand(False, f"a flipped bit in {file.name} was not found")
            finally:
                file.write_bytes(good)
    for number in place.repeats(5, quick=1):
        with place.trial(f"run {number}"):
            file, good = _flip_one(cache / "train", place.random, "*.bin")
            child = Run(place.new("run"), stage2(place.lab, cache=str(cache))).start()
            code, text = child.wait(60), child.output()
            file.write_bytes(good)
            demand(code == 3 and file.name in text, f"exit code {code}: {last_line(text)}")
    return "found by verifying and by reading"


def _flip_one(folder: Path, draw: random.Random, pattern: str = "*.*") -> tuple[Path, bytes]:
    """Flip a bit, each of the folder's bits as likely as any other; the file, and what it held."""
    files = sorted(folder.glob(pattern))
    file = draw.choices(files, [file.stat().st_size for file in files])[0]
    good = file.read_bytes()
    hurt = bytearray(good)
    hurt[draw.randrange(len(hurt))] ^= 1 << draw.randrange(8)
    file.write_bytes(hurt)
    return file, good


def _edit_plan(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    """An edit of the plan in a cache's manifest, sealed again: a cache that was honestly made for something else."""

    def edit(lab: Path) -> None:
        for name in ("manifest.json", "plan.json"):
            path = lab / "cache" / "train" / name
            tree = read_sealed(path)
            change(tree["plan"] if name == "manifest.json" else tree)
            path.write_bytes(seal(tree))

    return edit


def _retrain(lab: Path) -> None:
    run = Run(lab / "retrained", stage1(lab, steps=5))
    run.complete()
    shutil.rmtree(lab / "autoencoder")
    shutil.copytree(run.folder.path, lab / "autoencoder")


def _add(lab: Path) -> None:
    shutil.copy(lab / "pictures" / "cats" / "0.png", lab / "pictures" / "cats" / "new.png")


STALE: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "autoencoder.weights": (_retrain, ()),
    "autoencoder.config": (
        _edit_plan(lambda plan: plan["autoencoder"]["config"]["encoder"]["params"].update(channels=32)),
        (),
    ),
    "pixels.resolution": (lambda lab: None, ("data.params.resolution=32",)),
    "pixels.interpolation": (
        lambda lab: None,
        (
            "data.params.transform={target: ldm.data.transforms.EvalTransform, "
            "params: {resolution: 16, interpolation: nearest}}",
        ),
    ),
    "pixels.crop": (_edit_plan(lambda plan: plan["pixels"].update(crop="random")), ()),
    "pixels.pixel_range": (_edit_plan(lambda plan: plan["pixels"].update(pixel_range=[0.0, 1.0])), ()),
    "dtype": (_edit_plan(lambda plan: plan.update(dtype="bfloat16")), ()),
    "num_items": (_add, ()),
    "source": (lambda lab: (lab / "pictures" / "cats" / "0.png").rename(lab / "pictures" / "cats" / "00.png"), ()),
    "class_names": (lambda lab: (lab / "pictures" / "cats").rename(lab / "pictures" / "kittens"), ()),
    "captions": (_edit_plan(lambda plan: plan.update(captions=True)), ()),
    "shape": (_edit_plan(lambda plan: plan.update(shape=[4, 8, 8])), ()),
}


@fault(34, "stale cache")
def stale(place: Place) -> str:
    """The cache that the configuration names was made with other weights, another autoencoder, other pixels (size,
    interpolation, crop, range), another type or shape, or of other pictures, classes or captions.

    Expected: code 3 before the first step, naming the fact, what is expected and what was found.
    """
    for key, (change, words) in place.some(STALE.items(), quick=2):
        with place.trial(key):
            lab = place.new("lab")
            for name in ("pictures", "autoencoder", "cache"):
                shutil.copytree(place.lab / name, lab / name)
            change(lab)
            run = Run(place.new("run"), stage2(lab))
            child = run.start(*words)
            code, text = child.wait(60), child.output()
            demand(code == 3, f"exit code {code}: {last_line(text)}")
            demand(f"{key}" in text and "expected" in text and "found" in text, f"it says: {text[-400:]}")
            demand(run.logs.is_dir() is False or run.step() == 0, "it trained")
    return "kinds refused by key"


@fault(35, "latents that do not fit the model")
def not_fitting(place: Place) -> str:
    """Channels, sizes and classes of the network that are not those of the latents, or of each other.

    Expected: code 2 before the first step, naming the key, and what the data says.
    """
    network = "model.params.network.params"
    cases = {
        f"{network}.in_channels=7": ("in_channels", "${data:channels}"),
        f"{network}.vector_channels=5": ("vector_channels",),
        f"{network}.heads=3": ("heads",),
        "model.params.conditioner.params.channels=5": ("channels",),
        "data.params.resolution=15": ("data.params.resolution", "2"),
        f"{network}.channel_mult=[1,1,1,1,1,1]": ("network",),
    }
    for word, said in place.some(cases.items(), quick=2):
        with place.trial(word):
            run = Run(place.new("run"), stage2(place.lab))
            child = run.start(word)
            code, text = child.wait(60), child.output()
            demand(code == 2, f"exit code {code}: {last_line(text)}")
            demand(all(part in text for part in said), f"it says: {text[-400:]}")
            demand(not run.logs.exists() or not any(run.logs.iterdir()), "it left a run folder")
    return "refused at the start"


def _builder(place: Place, tree: Tree, cache: Path, rank: int = 0, world: int = 1, hook: Hook | None = None) -> Child:
    """`cache_latents.py` on one rank of several."""
    run = Run(place.new("builder"), tree)
    line = ["--base", str(run.file), f"data.params.cache={cache}", "data.params.encode_batch_size=1"]
    environment = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)} if world > 1 else {}
    return fork(lambda: python(ROOT / "scripts" / "cache_latents.py", line, environment, hook), run.place / "log")


def _count_encodings(diary: Path) -> Hook:
    """A line for each batch that is encoded, which then takes 10 ms more."""

    def hook() -> None:
        from ldm.autoencoder.codec import Codec

        codec: Any = Codec
        encode = codec.encode

        def counted(self: Any, images: Any) -> Any:
            time.sleep(0.01)
            with diary.open("a") as file:
                file.write(f"{os.getpid()} {hash(images.numpy().tobytes())}\n")
            return encode(self, images)

        codec.encode = counted

    return hook


@fault(36, "cache build interrupted, shared, or both", limit=1800)
def builders(place: Place) -> str:
    """Builders (one, or two ranks) are killed at random moments and started again; two that know nothing of each other
    build one cache; of two ranks one is killed and not replaced.

    Expected: the bytes of a build in one go; two builders encode nothing twice.
    """
    lab = place.new("lab")
    pictures(lab / "pictures", 44)
    shutil.copytree(place.lab / "autoencoder", lab / "autoencoder")
    tree = stage2(lab)
    began = time.monotonic()
    _demand_built(_builder(place, tree, lab / "whole", hook=_count_encodings(place.folder / "whole")))
    took = time.monotonic() - began
    whole = _files(lab / "whole")
    kills = 0
    for number in place.repeats(50, quick=1):
        with place.trial(f"killed {number}"):
            cache, world = place.new("cache"), 1 + number % 2
            diary = _count_encodings(place.new("diary") / "diary")
            for _ in range(2):
                ranks = [_builder(place, tree, cache, rank, world, diary) for rank in range(world)]
                time.sleep(place.random.uniform(0.2, 1.0) * took)
                for rank in ranks:
                    rank.send(signal.SIGKILL)
                    kills += rank.wait(10) == -signal.SIGKILL
            _demand_built(_builder(place, tree, cache))
            demand(_files(cache) == whole, "the bytes differ")
    for number in place.repeats(5, quick=1):
        with place.trial(f"two builders {number}"):
            cache, lines = place.new("cache"), place.new("diary") / "diary"
            for builder in [_builder(place, tree, cache, hook=_count_encodings(lines)) for _ in range(2)]:
                _demand_built(builder)
            demand(_files(cache) == whole, "the bytes differ")
            encoded = len(lines.read_text().splitlines())
            demand(encoded == 2 * 40 + 4, f"{encoded} encodings of 40 pictures in two orientations, and of 4 in one")
        with place.trial(f"a rank lost {number}"):
            _lose_a_rank(place, tree, whole)
    return f"{kills} kills; the same bytes, nothing encoded twice"


def _lose_a_rank(place: Place, tree: Tree, whole: dict[str, bytes]) -> None:
    """One of two ranks dies early; the other has to do its share, too."""
    cache = place.new("cache")
    hook = _count_encodings(place.new("diary") / "diary")
    ranks = [_builder(place, tree, cache, rank, 2, hook) for rank in range(2)]
    wait_until(lambda: any(cache.rglob("shard-*.json")), 30)
    ranks[place.random.randint(0, 1)].send(signal.SIGKILL)
    codes = sorted(rank.wait(60) for rank in ranks)
    demand(codes == [-signal.SIGKILL, 0], f"exit codes {codes}")
    demand(_files(cache) == whole, "the bytes differ")


def _demand_built(child: Child) -> None:
    code = child.wait(120)
    demand(code == 0, f"the builder ended with {code}: {last_line(child.output())}")
