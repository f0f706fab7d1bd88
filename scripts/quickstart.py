"""The end of `make quickstart`: where the pictures are, how they should look, and what to try next.

python scripts/quickstart.py emoji
python scripts/quickstart.py own_holiday --pictures /path/to/holiday
"""

import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from ldm.cli import program
from ldm.cli.options import Parser, path
from ldm.config.yaml_text import read
from ldm.errors import DataError
from ldm.run_folder import newest_run

DIFFUSION = "configs/quickstart/diffusion.yaml"
OWN = "configs/quickstart/own_pictures.yaml"
EMOJI_LOOK = (
    "Faces, people, animals, cars, symbols and flags should be easy to recognize, and so should most hands and some "
    "fruit. Among places, clocks are recognizable; activities and objects rarely show more than colors and outlines."
)
OWN_LOOK = (
    "Expect colors and layout rather than detail: the pictures are 32 px wide and the model has trained for minutes. "
    "From a few dozen pictures it learns these by heart; thousands teach it more."
)


def ending(name: str, pictures: Path | None) -> str:
    """What to say about the newest runs `<name>_autoencoder` and `<name>_diffusion` in logs/.

    Args:
        name: emoji, or of the run on one's own pictures.
        pictures: the folder of these; None: emoji.

    Raises:
        ConfigError, DataError: a run, or a picture of it, is missing.
    """
    autoencoder, diffusion = (Path(newest_run(f"logs/*_{name}_{stage}")) for stage in ("autoencoder", "diffusion"))
    lines = [
        "",
        f"Reconstructions of pictures that were not trained on:  {_newest(autoencoder, 'images/val/*.png')}",
        "  Top row: the originals. The second row should look like the first one, a little softer. (Below: the",
        "  difference, gray where there is none, and what the decoder makes of noise.)",
        f"Samples, a row a class:  {_newest(diffusion, 'samples/*/grid.png')}",
        f"  {EMOJI_LOOK if pictures is None else OWN_LOOK}",
        f"Curves:  {autoencoder}/metrics.csv and {diffusion}/metrics.csv, drawn by scripts/plot_run.py",
        "",
        "What to try next:",
    ]
    return "\n".join(lines + [f"  {what:<22}{command}" for what, command in further(name, pictures, diffusion)])


def further(name: str, pictures: Path | None, diffusion: Path) -> list[tuple[str, str]]:
    """(what it is for, the command), each ready to be pasted into a shell."""
    python = os.path.relpath(sys.executable) if Path(sys.executable).is_relative_to(Path.cwd()) else sys.executable
    own = [] if pictures is None else [OWN, f"data.params.train.params.root={pictures}"]
    latents = [f"data.params.autoencoder=${{newest:logs/*_{name}_autoencoder}}", "data.params.flip=true"]
    own += [] if pictures is None else latents
    steps = 4 * read(diffusion / "configs" / "config.yaml").plain()["lightning"]["trainer"]["max_steps"]
    longer = [python, "main.py", "--base", DIFFUSION, *own, "--name", f"{name}_longer"]
    sample = [python, "scripts/sample.py", "-r", f"logs/*_{name}_diffusion"]
    classes = json.loads((diffusion / "configs" / "facts.json").read_text())["num_classes"]
    guided = [*sample, "--guidance", "4"] if classes else [*sample, "-n", "64"]
    return [
        ("your own pictures", "make quickstart PICTURES=/path/to/images"),
        ("four times the steps", shlex.join([*longer, f"lightning.trainer.max_steps={steps}"])),
        ("other guidance" if classes else "more samples", shlex.join(guided)),
    ]


def _newest(run: Path, pattern: str) -> Path:
    found = sorted(run.glob(pattern), key=lambda path: path.stat().st_mtime)
    if not found:
        raise DataError(f"{run / pattern}: no such picture; run `make quickstart` again, it goes on where it was")
    return found[-1]


def main(argv: Sequence[str]) -> int:
    """Returns the exit code (ldm/errors.py)."""
    parser = Parser(prog="quickstart.py", description="Say where the quickstart's pictures are, and what to try next.")
    parser.add_argument("name", help="of the runs: emoji, or own_<folder>")
    parser.add_argument("--pictures", type=path, metavar="FOLDER", help="that they were trained on, instead of emoji")

    def work() -> None:
        options = parser.parse_strictly(argv)
        print(ending(options.name, options.pictures))

    return program.answer(work)


if __name__ == "__main__":
    program.run(lambda: main(sys.argv[1:]))
