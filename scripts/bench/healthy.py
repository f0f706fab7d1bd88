"""The runs and pictures of docs/healthy.md, made anew: a healthy run of each stage, and one of each typical failure.

The commands are read from the page, in its order. docs/healthy/ keeps each run's metrics, which the tests replay.
"""

import csv
import io
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from PIL import Image

from ldm import run_folder
from ldm.cli.plot import Curve, draw_curve, read_curves
from ldm.files import write_text
from ldm.run_folder import RunFolder
from ldm.training.metrics_table import read_metrics

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "healthy.md"
FOLDER = ROOT / "docs" / "healthy"
TIMED = ("images_per_second", "data_wait")
ROW = 66  # pixels of a row, and of a column, of the sheets that runs write: 64 and a gap (ldm/images.py)
COLUMNS = 6


class Figure(NamedTuple):
    """A picture of the page: a run's curves and sheet, and those of one that went well.

    `panels` are metrics, those of one panel joined by a blank.
    """

    beside: str
    panels: tuple[str, ...]


FIGURES = {
    "healthy_autoencoder": Figure(
        "healthy_autoencoder", ("val/psnr", "val/kl", "val/latent_std", "train/discriminator")
    ),
    "healthy_diffusion": Figure("healthy_diffusion", ("val/loss val/loss_ema", "train/gradient", "val/latent_std")),
    "kl_too_high": Figure("healthy_autoencoder", ("val/psnr", "val/kl", "val/dead_channels")),
    "kl_too_low": Figure("large_steps", ("val/psnr", "val/kl", "val/latent_std")),
    "discriminator_too_strong": Figure(
        "healthy_autoencoder", ("val/psnr", "train/discriminator", "train/logits_real train/logits_fake")
    ),
    "learning_rate_too_high": Figure("healthy_diffusion", ("val/loss", "train/loss", "train/gradient")),
    "average_too_long": Figure("healthy_diffusion", ("val/loss val/loss_ema", "train/loss")),
}


def healthy(options: Any) -> str:
    """Train what `--logdir` does not hold finished, then draw; a line a file."""
    runs = {name: finished(name, words, options.logdir) for name, words in commands().items()}
    for name, run in runs.items():
        write_text(FOLDER / f"{name}.csv", kept(run))
    for name, figure in FIGURES.items():
        both = {name.replace("_", " "): runs[name], figure.beside.replace("_", " "): runs[figure.beside]}
        draw(figure.panels, both, FOLDER / f"{name}.png")
    made = sorted([*FOLDER.glob("*.csv"), *FOLDER.glob("*.png")])
    return "\n".join(f"{file.relative_to(ROOT)}: {file.stat().st_size / 1024:.0f} KB" for file in made)


def commands() -> dict[str, list[str]]:
    """Of the page, in order: a run's name -> the words after `main.py`."""
    lines = re.findall(r"^python main\.py (--base .*)$", re.sub(r"\\\n\s*", "", PAGE.read_text()), re.MULTILINE)
    return {words[words.index("--name") + 1]: words for words in map(shlex.split, lines)}


def finished(name: str, words: list[str], logdir: Path) -> RunFolder:
    """The newest run of that name, trained now unless it has finished; what it prints goes to `<logdir>/<name>.log`."""
    run = run_folder.newest(logdir, name)
    state = run.read_state() if run else None
    if run is not None and state is not None and state.status == "finished":
        return run
    logdir.mkdir(parents=True, exist_ok=True)
    output = logdir / f"{name}.log"
    with output.open("w") as log:
        command: list[str | Path] = [sys.executable, ROOT / "main.py", *words, "--logdir", logdir]
        code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT).returncode
    run = run_folder.newest(logdir, name)
    if code or run is None:
        sys.exit(f"{output}: main.py ended with exit code {code}, and says there why.")
    return run


def kept(run: RunFolder) -> str:
    """The run's metrics.csv without what depends on the machine's speed."""
    rows = read_metrics(run.metrics_file)
    names = dict.fromkeys(name for row in rows for name in row if name not in TIMED)
    text = io.StringIO()
    table = csv.DictWriter(text, [*names], extrasaction="ignore", lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    return text.getvalue()


def draw(panels: tuple[str, ...], runs: Mapping[str, RunFolder], output: Path) -> None:
    """Write the PNG of one or two runs: curves above, sheets below, pixel for pixel."""
    curves = {name: read_curves(run.path) for name, run in runs.items()}
    rows = sheet(runs)
    pixels = np.concatenate([*rows.values()])
    high, wide = pixels.shape[:2]
    width, height = 900, 240 + high
    page = plt.figure(figsize=(width / 100, height / 100))
    above = page.add_gridspec(1, len(panels), left=0.05, right=0.99, top=1 - 25 / height, bottom=(high + 35) / height)
    for place, panel in enumerate(panels):
        draw_panel(page.add_subplot(above[place]), panel.split(), curves)
    axes = page.add_axes((180 / width, 0, wide / width, high / height))
    axes.imshow(pixels, interpolation="none")
    axes.set_xticks([])
    axes.set_yticks([ROW * (place + 0.5) for place in range(len(rows))], [*rows], fontsize=7)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    page.savefig(buffer := io.BytesIO(), dpi=100)
    plt.close(page)
    Image.open(buffer).convert("RGB").save(output, optimize=True)


def draw_panel(axes: Axes, metrics: list[str], curves: Mapping[str, Mapping[str, Curve]]) -> None:
    """Each metric of each run; those that a run does not have are left out."""
    for name, of_run in curves.items():
        for metric in metrics:
            if metric in of_run:
                draw_curve(axes, f"{name}, {metric}" if len(metrics) > 1 else name, of_run[metric])
    axes.set_title(", ".join(metrics), fontsize=8)
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.3)
    if len(curves) * len(metrics) > 1:
        axes.legend(fontsize=5.5)


def sheet(runs: Mapping[str, RunFolder]) -> dict[str, np.ndarray]:
    """Rows to look at, by what they show, each (ROW, W, 3) uint8.

    Stage 1: pictures, each run's reconstructions of them, and what each makes of noise. Stage 2: samples of two
    classes.
    """
    last = {name: max(run.images.glob("val/*.png")) for name, run in runs.items()}
    pixels = {name: np.asarray(Image.open(file).convert("RGB"))[:, : ROW * COLUMNS] for name, file in last.items()}
    if all(file.name.startswith("samples") for file in last.values()):
        return {
            f"{name}\nclass {row}": whole[ROW * row : ROW * (row + 1)]
            for name, whole in pixels.items()
            for row in (0, 1)
        }
    rows = {"input": next(iter(pixels.values()))[:ROW]}
    for row, what in ((1, "reconstruction"), (3, "prior")):
        rows |= {f"{name}\n{what}": whole[ROW * row : ROW * (row + 1)] for name, whole in pixels.items()}
    return rows
