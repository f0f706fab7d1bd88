"""Draw a run's curves: one panel a metric, training and validation together.

python scripts/plot_run.py logs/2026-11-22T09-00-00_faces            # writes metrics.png into the run folder
python scripts/plot_run.py RUN OTHER_RUN --only loss psnr -o compare.png
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from ldm.cli import program
from ldm.cli.options import Parser, called, path
from ldm.errors import ConfigError, DataError
from ldm.training.metrics_table import read_metrics

Curve = tuple[list[int], list[float]]
NOT_PLOTTED = {"step", "epoch", "time"}
COLUMNS = 3


def read_curves(run: Path) -> dict[str, Curve]:
    """{metric: (steps, values)} of a run folder or metrics.csv; the last row of a repeated step (a resumed run) counts.

    Raises:
        DataError: there is no metrics.csv, or nothing in it.
    """
    file = run if run.is_file() else run / "metrics.csv"
    if not file.is_file():
        raise DataError(f"{file}: no such file; expected a run folder, or the metrics.csv of one.")
    points: dict[str, dict[int, float]] = defaultdict(dict)
    for row in read_metrics(file):
        for name, text in row.items():
            if name not in NOT_PLOTTED:
                points[name][int(row["step"])] = float(text)
    curves = {name: (sorted(values), [values[step] for step in sorted(values)]) for name, values in points.items()}
    if not curves:
        raise DataError(f"{file}: nothing was logged yet.")
    return curves


def panels(curves: dict[str, Curve]) -> dict[str, dict[str, Curve]]:
    """{panel: {label: curve}}: `train/loss`, `val/loss` and `val/ema/loss` share the panel `loss`."""
    grouped: dict[str, dict[str, Curve]] = defaultdict(dict)
    for name in sorted(curves):
        label, _, panel = name.rpartition("/")
        grouped[panel][label or panel] = curves[name]
    return dict(sorted(grouped.items()))


def smooth(values: Sequence[float], width: int) -> list[float]:
    """An exponential average over about `width` values, without a bias towards its start; skips what is not finite."""
    keep = 1 - 1 / width
    total = weight = 0.0
    out = []
    for value in values:
        if math.isfinite(value):
            total, weight = keep * total + value, keep * weight + 1
        out.append(total / weight if weight else math.nan)
    return out


def draw_curve(axes: Axes, label: str, curve: Curve) -> None:
    """Draw a few points as they are, many as a faint line under their average."""
    steps, values = curve
    if len(steps) < 50:
        axes.plot(steps, values, label=label, marker="." if len(steps) < 20 else "")
        return
    (line,) = axes.plot(steps, smooth(values, len(values) // 25), label=label)
    axes.plot(steps, values, color=line.get_color(), alpha=0.25, linewidth=0.7, zorder=0)


def check_output(output: Path) -> None:
    """Raises ConfigError if no picture can be written to that path."""
    if not output.parent.is_dir():
        raise ConfigError(f"--output {output}: there is no folder {output.parent}; make it, or name another place.")
    kinds = plt.figure().canvas.get_supported_filetypes()
    plt.close()
    if output.suffix.removeprefix(".").lower() not in kinds:
        raise ConfigError(f"--output {output}: expected a name that ends in one of .{', .'.join(sorted(kinds))}.")


def called_apart(runs: Sequence[Path]) -> list[str]:
    """A name of each run: that of its folder, with as many folders above it as tell all of them apart."""
    folders = [(run.parent if run.is_file() else run).absolute() for run in runs]
    different = len({*folders})
    for depth in range(1, max(len(folder.parts) for folder in folders)):
        names = ["/".join(folder.parts[-depth:]) for folder in folders]
        if len({*names}) == different:
            return names
    return [str(folder) for folder in folders]


def plot(runs: Sequence[Path], output: Path, only: Sequence[str] = ()) -> None:
    """Write the curves of `runs` to the picture `output`; `only` names panels, all by default."""
    curves: dict[str, Curve] = {}
    names = called_apart(runs)
    for run, name in zip(runs, names, strict=True):
        # The run's name leads the label, so that panels() still finds the metric behind the last slash.
        prefix = f"{name} " if len(runs) > 1 else ""
        curves |= {prefix + metric: curve for metric, curve in read_curves(run).items()}
    known = panels(curves)
    if unknown := [name for name in only if name not in known]:
        raise DataError(f"No metric is called {' or '.join(unknown)}; there are: {', '.join(known)}.")
    drawn = {name: group for name, group in known.items() if not only or name in only}
    columns = min(COLUMNS, len(drawn))
    rows = math.ceil(len(drawn) / columns)
    figure, grid = plt.subplots(rows, columns, figsize=(5 * columns, 3.2 * rows), squeeze=False, layout="constrained")
    for axes in grid.flat[len(drawn) :]:
        axes.set_visible(False)
    for axes, (name, group) in zip(grid.flat, drawn.items(), strict=False):
        for label, curve in group.items():
            draw_curve(axes, label, curve)
        finite = [value for _, values in group.values() for value in values if math.isfinite(value)]
        if finite and min(finite) > 0 and max(finite) > 20 * min(finite):
            axes.set_yscale("log")
        axes.set(title=name, xlabel="step")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.suptitle(", ".join(names))
    figure.savefig(output, dpi=110)
    plt.close(figure)


def main(argv: Sequence[str]) -> int:
    """Returns the exit code (ldm/errors.py)."""
    parser = Parser(prog=called("plot_run.py", "plot"), description="Draw a run's curves to a PNG.", allow_abbrev=False)
    parser.add_argument("runs", nargs="+", type=path, metavar="RUN", help="run folder, or its metrics.csv")
    parser.add_argument("-o", "--output", type=path, help="the picture (default: metrics.png in the first run)")
    parser.add_argument("--only", nargs="+", default=[], metavar="METRIC", help="draw these panels alone")

    def work() -> None:
        options = parser.parse_strictly(argv)
        first: Path = options.runs[0]
        output: Path = options.output or (first.parent if first.is_file() else first) / "metrics.png"
        if options.output:
            check_output(output)
        plot(options.runs, output, options.only)
        print(output)

    return program.answer(work)
