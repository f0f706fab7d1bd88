"""Train several stage-2 configurations on one autoencoder at equal compute, and let one classifier judge them all.

    python scripts/compare.py --autoencoder logs/<run> --minutes 8
    python scripts/compare.py --autoencoder logs/<run> --minutes 8 --jobs 2 --out comparison \\
        --variants configs/fashion_mnist/variants/flow.yaml configs/fashion_mnist/variants/edm.yaml

The base configuration, and each variant merged over it, gets the same time on as many cores: a short run of each, with
the machine to itself, says how many steps that is. Each is judged several times on its way. Writes comparison.json and
comparison.png, and prints a Markdown table. What is finished is not done again, so an interrupted comparison goes on.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ldm.runtime import threads

if __name__ == "__main__":
    threads.prepare()  # before torch is imported

import matplotlib
import matplotlib.pyplot as plt
import torch

from ldm import run_folder
from ldm.cli import program
from ldm.cli.options import Parser, finite, path, positive, split_overrides, whole_number
from ldm.data.sources.arrays import FashionMNIST
from ldm.errors import ConfigError, LdmError
from ldm.evaluation.report import Judge, markdown, samples
from ldm.files import write_text
from ldm.sampling.guidance import Guidance
from ldm.sampling.pipeline import Pipeline
from ldm.sampling.timesteps import default
from ldm.training.metrics_table import read_metrics

matplotlib.use("agg")

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs" / "fashion_mnist"
CALIBRATION = 60
"""Steps of the run that tells how fast a configuration is."""
SETTINGS = ("autoencoder", "base", "minutes", "jobs", "marks", "number", "guidance", "steps", "epochs", "overrides")
"""What decides the figures; recorded beside them."""
EPILOG = "Words of the form key=value override every configuration."


def train(variant: Path | None, folder: Path, steps: int, mark: int, options: Any) -> Path:
    """The run of `steps` steps in `folder`, saved every `mark` steps; continued where it was interrupted."""
    checkpoints = {
        "target": "ldm.training.callbacks.checkpoints.Checkpoints",
        "params": {"every": mark, "keep_every": mark},
    }
    overrides = {
        "data.params.autoencoder": options.autoencoder,
        "lightning.trainer.max_steps": steps,
        "lightning.trainer.val_check_interval": mark,
        "lightning.trainer.log_every_n_steps": 10,
        "lightning.logger": "null",
        "lightning.callbacks.images": "null",
        "lightning.callbacks.checkpoints": json.dumps(checkpoints),
    }
    files = [options.base] if variant is None else [options.base, variant]
    command = [sys.executable, ROOT / "main.py", "--resume", "auto", "--name", "run", "--logdir", folder]
    words = [f"{key}={value}" for key, value in overrides.items()]
    environment = os.environ | {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // options.jobs))}
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "log").open("a") as log:
        whole = [*command, "--base", *files, *words, *options.overrides]
        code = subprocess.run(whole, env=environment, stdout=log, stderr=subprocess.STDOUT).returncode
    made = run_folder.newest(folder, "run")
    if code or made is None:
        raise LdmError(f"{folder / 'log'}: main.py ended with exit code {code}, and says there why.")
    return made.path


def speed(made: Path) -> float:
    """Images a second: the best of what the run logged, since what else a machine does can only slow it down."""
    rows = read_metrics(made / "metrics.csv")
    speeds = [float(row["images_per_second"]) for row in rows if "images_per_second" in row]
    if not speeds:
        raise ConfigError(
            f"{made}: logged no images_per_second in {CALIBRATION} steps; leave the trainer's intervals alone"
        )
    return max(speeds)


def train_all(variants: dict[str, Path | None], options: Any) -> dict[str, tuple[Path, float, int]]:
    """By name: the run, its images a second, and the images of a step."""

    def calibrate(name: str) -> tuple[float, int]:
        made = train(variants[name], options.out / "speed" / name, CALIBRATION, CALIBRATION, options)
        # What cannot be judged in the end is refused before the long runs.
        pipeline = Pipeline.load(made, autoencoder=options.autoencoder)
        for scale in options.guidance:
            times = default(pipeline.objective, options.steps, pipeline.manifest.plan.shape)
            Guidance(scale).check(pipeline, True, times)
        return speed(made), json.loads((made / "configs" / "facts.json").read_text())["batch_size"]

    def complete(name: str) -> Path:
        images_per_second, batch = speeds[name]
        mark = max(1, round(60 * options.minutes * images_per_second / batch / options.marks))
        return train(variants[name], options.out / "runs" / name, mark * options.marks, mark, options)

    speeds = side_by_side(variants, calibrate, 1)
    made = side_by_side(variants, complete, options.jobs)
    return {name: (made[name], *speeds[name]) for name in variants}


def side_by_side(names: Iterable[str], work: Callable[[str], Any], jobs: int) -> dict[str, Any]:
    """{name: work(name)}, `jobs` at a time."""
    with ThreadPoolExecutor(jobs) as pool:
        return dict(zip(names, pool.map(work, names), strict=True))


def compare(options: Any) -> str:
    """Do it all; the table."""
    variants: dict[str, Path | None] = {options.base.stem: None, **{file.stem: file for file in options.variants}}
    if len(variants) <= len(options.variants):
        raise ConfigError(f"--variants: two of these files have one name: {' '.join(map(str, options.variants))}")
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "comparison.json"
    record = begun(file, {key: str(getattr(options, key)) for key in SETTINGS})
    trained = train_all(variants, options)
    judge: Judge | None = None
    for name, (made, images_per_second, batch) in trained.items():
        entry = record["configurations"].setdefault(name, {"marks": {}})
        for saved in sorted((made / "checkpoints").glob("step=*.ckpt")):
            if saved.name in entry["marks"]:
                continue
            pipeline = Pipeline.load(saved, autoencoder=options.autoencoder, device=options.device)
            plan = pipeline.manifest.plan
            if judge is None:
                pictures = FashionMNIST(), FashionMNIST(train=False)
                judge = Judge.trained(*pictures, plan.pixels["resolution"], plan.pixels["channels"], options.epochs)
            scores = {
                f"{scale:g}": judge(samples(pipeline, options.number, judge.classes, options.steps, scale))._asdict()
                for scale in options.guidance
            }
            entry["marks"][saved.name] = {"images": pipeline.origin["step"] * batch, "scores": scores}
            size = sum(parameter.numel() for parameter in pipeline.denoiser.parameters())
            entry |= {"parameters": size, "images_per_second": images_per_second}
            write_text(file, json.dumps(record, indent=1) + "\n")
    draw(record["configurations"], options.out / "comparison.png")
    return f"{table(record['configurations'])}\n\n{options.out / 'comparison.png'}"


def begun(file: Path, settings: dict[str, str]) -> dict[str, Any]:
    """The record in `file`, or a new one; ConfigError where what is there was made with other settings."""
    if not file.is_file():
        return {"settings": settings, "configurations": {}}
    record: dict[str, Any] = json.loads(file.read_text())
    there = record["settings"]
    if different := [
        f"--{key}: {there.get(key)} there, {now} now" for key, now in settings.items() if there.get(key) != now
    ]:
        raise ConfigError(f"{file}: holds a comparison of other settings ({'; '.join(different)}). Name another --out.")
    return record


def table(record: dict[str, Any]) -> str:
    """Markdown: each configuration's last mark, best distance without guidance first."""
    rows = []
    for name, entry in record.items():
        last = max(entry["marks"].values(), key=lambda mark: mark["images"])
        scores = [f"{score['accuracy']:.1%} / {score['distance']:.2f}" for score in last["scores"].values()]
        size = f"{entry['parameters'] / 1e6:.1f}"
        images = f"{last['images']:,}"
        order = next(iter(last["scores"].values()))["distance"]
        rows.append((order, [name, size, f"{entry['images_per_second']:.0f}", images, *scores]))
    scales = [f"guidance {scale}" for scale in next(iter(next(iter(record.values()))["marks"].values()))["scores"]]
    header = ["configuration", "parameters, M", "images/s", "images seen", *scales]
    return markdown(header, [row for _, row in sorted(rows)])


def draw(record: dict[str, Any], output: Path) -> None:
    """Fréchet distance and accuracy, without guidance, against the images seen."""
    figure, panels = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for name, entry in record.items():
        marks = sorted(entry["marks"].values(), key=lambda mark: mark["images"])
        scores = [next(iter(mark["scores"].values())) for mark in marks]
        images = [mark["images"] / 1000 for mark in marks]
        panels[0].plot(images, [score["distance"] for score in scores], marker=".", label=name)
        panels[1].plot(images, [100 * score["accuracy"] for score in scores], marker=".", label=name)
    panels[0].set(title="Fréchet distance to the test set (lower is better)", xlabel="thousand images", yscale="log")
    panels[1].set(title="classifier accuracy, %", xlabel="thousand images")
    for panel in panels:
        panel.grid(alpha=0.3)
    panels[1].legend(fontsize="small")
    figure.savefig(output, dpi=110)
    plt.close(figure)


def parse(argv: Sequence[str]) -> Any:
    parser = Parser(prog="compare.py", description="Compare configurations.", epilog=EPILOG, allow_abbrev=False)
    add = parser.add_argument
    add("--autoencoder", type=path, required=True, metavar="RUN", help="the first stage of all")
    add("--base", type=path, default=CONFIGS / "diffusion.yaml", help="(default: configs/fashion_mnist/diffusion.yaml)")
    add(
        "--variants",
        type=path,
        nargs="*",
        default=sorted((CONFIGS / "variants").glob("*.yaml")),
        help="merged over the base, each alone (default: configs/fashion_mnist/variants)",
    )
    add("--minutes", type=positive, default=8.0, help="of training, each (default: 8)")
    add("--jobs", type=whole_number, default=1, help="trained side by side, on a share of the cores each (default: 1)")
    add("--marks", type=whole_number, default=4, help="how often each is judged (default: 4)")
    add("--number", type=whole_number, default=100, help="images a class (default: 100)")
    add("--guidance", type=finite, nargs="+", default=[1.0, 2.0], help="scales to sample with (default: 1 2)")
    add("--steps", type=whole_number, default=30, help="of DDIM or Euler (default: 30)")
    add("--epochs", type=whole_number, default=4, help="of the classifier (default: 4)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="to sample on (default: cuda or cpu)")
    add("--out", type=path, default=Path("comparison"), help="folder (default: comparison)")
    overrides, words = split_overrides(argv)
    options = parser.parse_strictly(words)
    options.overrides = overrides
    return options


def main(argv: Sequence[str]) -> int:
    """Returns the exit code (ldm/errors.py)."""
    return program.answer(lambda: print(compare(parse(argv))))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
