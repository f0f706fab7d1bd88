"""FashionMNIST from nothing: train both stages, sample, and let a classifier judge (ldm/evaluation/report.py).

The Fréchet distance in the classifier's own features is not the FID.
"""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from PIL import Image

from ldm import run_folder
from ldm.data.sources.arrays import FashionMNIST
from ldm.evaluation.report import compare
from ldm.files import write_text
from ldm.sampling.pipeline import Pipeline
from scripts.bench.hardware import hardware

ROOT = Path(__file__).resolve().parents[2]


def train(options: Any) -> Path:
    """Train the stages that are not given, by main.py as a user would; the folder of the second."""
    autoencoder = options.autoencoder or train_stage("autoencoder", options)
    return train_stage("diffusion", options, f"data.params.autoencoder={autoencoder}")


def train_stage(stage: str, options: Any, *overrides: str) -> Path:
    """Train configs/fashion_mnist/<stage>.yaml; the run's folder."""
    config = ROOT / "configs" / "fashion_mnist" / f"{stage}.yaml"
    command: list[str | Path] = [sys.executable, ROOT / "main.py", "--base", config]
    code = subprocess.run([*command, "--logdir", options.logdir, *options.overrides, *overrides]).returncode
    folder = run_folder.newest(options.logdir, f"fashion_mnist_{stage}")
    if code or folder is None:
        sys.exit(code or 1)  # main.py has said why
    return folder.path


def quality(options: Any) -> str:
    """The table of `bench quality`; also writes quality.json and pictures.png."""
    started = time.perf_counter()
    diffusion = options.diffusion or train(options)
    trained = time.perf_counter()
    pipeline = Pipeline.load(diffusion, autoencoder=options.autoencoder, device=options.device)
    data = FashionMNIST(), FashionMNIST(train=False)
    report = compare(pipeline, *data, options.number, options.epochs, options.guidance, options.steps)
    folder = options.out or Path(diffusion) / "quality"
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(report.sheet()).save(folder / "pictures.png")
    record = {
        "hardware": hardware(options.device),
        **pipeline.origin,
        "images_a_class": options.number,
        "sampler_steps": options.steps,
        "classifier_test_accuracy": report.test_accuracy,
        "rows": {name: row._asdict() for name, row in report.scores.items()},
        "minutes": {"training": (trained - started) / 60, "judging": (time.perf_counter() - trained) / 60},
    }
    write_text(folder / "quality.json", json.dumps(record, indent=1) + "\n")
    about = f"{record['hardware']}; {options.number} images a class, DDIM {options.steps}; {record['checkpoint']}"
    return f"{about}\n\n{report.markdown()}\n\n{folder / 'pictures.png'}"
