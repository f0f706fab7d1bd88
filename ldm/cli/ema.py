"""Reconstruct running averages of widths that were not kept in training, from snapshots of those that were.

    python scripts/reconstruct_ema.py -r logs/<run> --std 0.03 0.075 0.15
    python scripts/sample.py -r 'logs/<run>/averages/std=0.075_step=00010000.ckpt'

A run keeps snapshots where its configuration has power-function averages and the callback that writes them:

    model.params.ema.params: {profile: {target: ldm.optim.ema.PowerFunction, params: {std: 0.05}},
                               extra: [{target: ldm.optim.ema.PowerFunction, params: {std: 0.1}}]}
    lightning.callbacks.averages: {target: ldm.training.callbacks.ema_snapshots.EMASnapshots, params: {every: 1000}}

The width is the relative standard deviation of the weights' shares over the training so far (Karras et al. 2024,
"EDM2").
"""

from collections.abc import Sequence
from pathlib import Path

from ldm.cli import program
from ldm.cli.options import Parser, called, path, whole_number, width
from ldm.errors import ConfigError


def main(argv: Sequence[str]) -> int:
    """Returns the exit code (ldm/errors.py)."""
    parser = Parser(
        prog=called("reconstruct_ema.py", "ema"),
        description="Reconstruct running averages of other widths.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("-r", "--run", required=True, type=path, metavar="RUN", help="run folder")
    add("--std", required=True, nargs="+", type=width, help="relative standard deviations, above 0 and below 0.288")
    add("--step", type=whole_number, help="step of the snapshot at which the average ends (default: the latest)")

    def work() -> None:
        options = parser.parse_strictly(argv)
        # Imported here, so that a mistake on the command line is answered before torch and Lightning are loaded.
        from ldm.training.callbacks.ema_snapshots import snapshots

        files = up_to(snapshots(options.run), options.step)
        for std in options.std:
            print(write(options.run, files, std))

    return program.answer(work)


def up_to(files: Sequence[Path], step: int | None) -> list[Path]:
    """The snapshots up to `step`, which must be one of them."""
    if step is None:
        return [*files]
    steps = [int(file.stem.removeprefix("step=")) for file in files]
    if step not in steps:
        raise ConfigError(f"--step {step}: there is no snapshot of it; there are {', '.join(map(str, steps))}.")
    return [*files[: steps.index(step) + 1]]


def write(run: Path, files: Sequence[Path], std: float) -> Path:
    """A checkpoint to sample from, with this average in place of the run's own; its path."""
    from ldm.checkpoints import store
    from ldm.training.callbacks.ema_snapshots import FOLDER, reconstruct

    verified = store.verify(run)
    state, source = store.load(verified), verified.path
    record = store.facts(state, "diffusion", source)
    average = reconstruct(files, std)
    weights = {name: value for name, value in state["state_dict"].items() if name.startswith("objective.")}
    weights |= {f"ema.average.{name}": value for name, value in average.items()}
    step = int(files[-1].stem.removeprefix("step="))
    file = run / FOLDER / f"std={std:g}_step={step:08d}{store.SUFFIX}"
    record = {**record, "step": step, "average": {"std": std, "snapshots": len(files)}}
    store.save(file, {"state_dict": weights, "ldm": record})
    return file
