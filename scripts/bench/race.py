"""Time to quality: FashionMNIST by ldm, both stages as a user trains them, and by others for several times as long.

One classifier (ldm/evaluation/report.py) judges the samples of all, made without guidance by equally many DDIM steps.
What is finished is kept, so a command that was interrupted goes on, with the training that it was in from the start.
"""

import json
import multiprocessing
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldm.config.load import build, load
from ldm.data.sources.arrays import FashionMNIST
from ldm.errors import ConfigError, LdmError
from ldm.evaluation.report import BATCH, Judge, Pictures, Report, Score, markdown, of_each_class, read, samples
from ldm.files import write_text
from ldm.images import to_uint8
from ldm.latents.datamodule import LatentDataModule
from ldm.run_folder import RunFolder
from ldm.sampling.pipeline import Pipeline
from scripts.bench.child import Place
from scripts.bench.hardware import hardware
from scripts.bench.learner import Learner, learn
from scripts.bench.quality import ROOT, train_stage
from scripts.bench.sides import compvis, huggingface

PICTURES, LATENTS = "pictures.pt", "latents.pt"


@dataclass(frozen=True)
class Rival:
    """Another training.

    Args:
        on_latents: of our cache; its time then begins with that of our first stage and cache.
    """

    name: str
    make: Callable[[Place], Learner]
    on_latents: bool


class Reached(NamedTuple):
    """Samples, one class after another, after so many minutes; what was not counted is None."""

    name: str
    minutes: float
    pictures: Pictures
    images: int | None = None
    parameters: int | None = None

    def described(self) -> dict[str, Any]:
        """All but the pictures."""
        return {key: value for key, value in self._asdict().items() if key != "pictures"}


def race(options: Any) -> str:
    """The table of `bench race`; also writes race.json and race.png."""
    folder = options.out
    folder.mkdir(parents=True, exist_ok=True)
    record = begun(options, folder / "race.json")
    trained(options, record, folder / "race.json")
    pipeline = Pipeline.load(Path(record["diffusion"]), device=options.device)
    pixels, classes = pipeline.manifest.plan.pixels, pipeline.num_classes or 0
    known = FashionMNIST()
    if not (folder / PICTURES).is_file():
        torch.save(read(known, pixels["resolution"], pixels["channels"])._asdict(), folder / PICTURES)
    if not (folder / LATENTS).is_file():
        torch.save(standardized(Path(record["diffusion"])), folder / LATENTS)

    minutes = record["minutes"]
    whole, before = sum(minutes.values()), minutes["autoencoder"] + minutes["cache"]
    found = [Reached("ldm", whole, samples(pipeline, options.number, classes, options.steps, 1.0))]
    labels = torch.arange(classes).repeat_interleave(options.number)
    for rival in rivals(options, folder):
        ahead = before if rival.on_latents else 0.0
        marks = [whole * each - ahead for each in record["settings"]["times"]]
        for mark in run(rival, marks, labels, folder, options.device):
            made = pictures(mark["samples"], labels, pipeline if rival.on_latents else None)
            found.append(Reached(rival.name, ahead + mark["seconds"] / 60, made, mark["images"], mark["parameters"]))

    judge = Judge.trained(known, FashionMNIST(train=False), pixels["resolution"], pixels["channels"], options.epochs)
    real = of_each_class(judge.unseen, options.number, classes)
    scores = [judge(real), *(judge(one.pictures) for one in found)]
    rows = [one.described() | score._asdict() for one, score in zip(found, scores[1:], strict=True)]
    about = {"hardware": hardware(options.device), "precision": precision(Path(record["diffusion"]))}
    record |= {**about, "real": scores[0]._asdict(), "rows": rows}
    write_text(folder / "race.json", json.dumps(record, indent=1) + "\n")
    last = {one.name: one.pictures for one in found}  # of each training those of its last mark
    Image.fromarray(Report({"real": real, **last}, {}, 0.0).sheet()).save(folder / "race.png")
    how = f"{options.number} images a class, DDIM {options.steps}, without guidance"
    how += f"; ldm trains in {about['precision']}, as its configuration has it, others in float32, as theirs do"
    return f"{about['hardware']}; {how}\n\n{table(found, scores)}\n\n{folder / 'race.json'}, {folder / 'race.png'}"


def begun(options: Any, file: Path) -> dict[str, Any]:
    """The record in `file`, or a new one; ConfigError where what is there was begun with other settings."""
    settings: dict[str, Any] = {"number": options.number, "steps": options.steps, "times": sorted(options.times)}
    settings["overrides"] = [*options.overrides]
    if not file.is_file():
        return {"settings": settings, "minutes": {}}
    record: dict[str, Any] = json.loads(file.read_text())
    if different := [key for key, value in settings.items() if record["settings"][key] != value]:
        raise ConfigError(f"{file}: holds a race with other {' and '.join(different)}. Name another --out.")
    return record


def trained(options: Any, record: dict[str, Any], file: Path) -> None:
    """Train both stages; the record then has their runs, and the "minutes" of each and of the cache."""

    def timed(name: str, work: Callable[[], Path | None]) -> None:
        if name in record["minutes"]:
            return
        start = time.perf_counter()
        if (run := work()) is not None:
            record[name] = str(run)
        record["minutes"][name] = (time.perf_counter() - start) / 60
        write_text(file, json.dumps(record, indent=1) + "\n")

    timed("autoencoder", lambda: train_stage("autoencoder", options))
    given = f"data.params.autoencoder={record['autoencoder']}"
    timed("cache", lambda: cached(given, *options.overrides))
    timed("diffusion", lambda: train_stage("diffusion", options, given))


def cached(*overrides: str) -> None:
    """Build the cache of configs/fashion_mnist/diffusion.yaml."""
    config = ROOT / "configs" / "fashion_mnist" / "diffusion.yaml"
    words = [word for word in overrides if word.startswith("data.")]
    command: list[str | Path] = [sys.executable, ROOT / "scripts" / "cache_latents.py", "--base", config, *words]
    if code := subprocess.run(command).returncode:
        sys.exit(code)


def precision(run: Path) -> str:
    """That a run trained in, in Lightning's words."""
    return str(load([RunFolder(run).config_file]).resolved()["lightning"]["trainer"]["precision"])


def standardized(run: Path) -> dict[str, Tensor]:
    """What the second stage learned: "mean" and "std" (N,c,h,w) float32 of its standardized latents, "labels" (N,)."""
    data = build(load([RunFolder(run).config_file]).resolved()["data"], (), key="data")
    if not isinstance(data, LatentDataModule):
        raise ConfigError(f"{run}: expected a second stage, found one that reads {type(data).__name__}")
    data.prepare_data()
    data.setup()
    (cache,) = data.caches["train"]
    moments, labels = cache.gather(np.arange(len(cache)), np.zeros(len(cache), bool))
    mean, std = torch.from_numpy(moments).float().unbind(1)
    origin = data.manifest.standardize(torch.zeros_like(std[:1]))
    return {
        "mean": data.manifest.standardize(mean),
        "std": data.manifest.standardize(std) - origin,
        "labels": torch.from_numpy(labels),
    }


def rivals(options: Any, folder: Path) -> list[Rival]:
    """Those that the command line has the code of; the smallest first."""
    networks = {"a network of our width": (64, 64), "its script's network": huggingface.SCRIPT}
    found = [
        Rival(
            f"diffusers on pixels, {which}",
            partial(huggingface.learner, folder / PICTURES, channels, options.steps),
            on_latents=False,
        )
        for which, channels in networks.items()
    ]
    if options.compvis:
        make = partial(compvis.learner, options.compvis, folder / LATENTS, options.steps)
        found.insert(0, Rival("CompVis on our latents", make, on_latents=True))
    return found


def run(rival: Rival, marks: Sequence[float], labels: Tensor, folder: Path, device: str) -> list[dict[str, Any]]:
    """Train it until the last mark, in minutes, unless that was done; what it has written at each.

    Raises:
        LdmError: its process ended before that; why is on the terminal.
    """
    own = folder / "".join(letter if letter.isalnum() else "_" for letter in rival.name)
    files = [own / f"{number}.pt" for number in range(len(marks))]
    if not all(file.is_file() for file in files):
        own.mkdir(exist_ok=True)
        context = multiprocessing.get_context("spawn")
        seconds = [60 * mark for mark in marks]
        arguments = (rival.name, rival.make, Place(device, False), seconds, labels, own)
        process = context.Process(target=learn, args=arguments, daemon=True)
        process.start()
        process.join()
        if process.exitcode:
            raise LdmError(f"{rival.name}: its process ended with exit code {process.exitcode}, and says above why")
    return [torch.load(file) for file in files]


def pictures(made: Tensor, labels: Tensor, decoder: Pipeline | None) -> Pictures:
    """Of (N,C,H,W) pixels, or of (N,c,h,w) standardized latents of a pipeline that decodes them."""
    if decoder is not None:
        parts = [decoder.codec.decode(decoder.manifest.unstandardize(part)).cpu() for part in made.split(BATCH)]
        made = torch.cat(parts)
    return Pictures(to_uint8(made.clamp(-1, 1)), labels)


def table(found: Sequence[Reached], scores: Sequence[Score]) -> str:
    """Markdown; the first score is that of real pictures, the first training is ours."""
    header = ["training", "minutes", "times ours", "weights, M", "images seen", "accuracy", "Fréchet distance"]
    judged = [[f"{score.accuracy:.1%}", f"{score.distance:.2f}"] for score in scores]
    rows = [["real pictures", "", "", "", "", *judged[0]]]
    for one, cells in zip(found, judged[1:], strict=True):
        weights = "" if one.parameters is None else f"{one.parameters / 1e6:.1f}"
        images = "" if one.images is None else f"{one.images:,}"
        rows.append([one.name, f"{one.minutes:.1f}", f"{one.minutes / found[0].minutes:.2f}", weights, images, *cells])
    return markdown(header, rows)
