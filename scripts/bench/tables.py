"""A comparison as JSON, for programs, and as Markdown, for the page."""

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from ldm.evaluation.report import markdown
from ldm.files import write_text
from ldm.runtime.precision import computes_bf16
from scripts.bench.child import Place
from scripts.bench.contest import WARM_UP, Case, Measured, Side, contest
from scripts.bench.hardware import hardware, machine
from scripts.bench.sides import peak

_COLUMNS = ["step", "precision", "side", "ms (min to max)", "times ldm", "images/s"]
_RESOURCES = ["GFLOP", "GFLOP/s", "of the peak", "peak memory, MB", "parameters, M"]
NAMES = {False: "fp32", True: "bf16"}


@dataclass(frozen=True)
class Finished:
    """A case that was measured, each side in each precision: first ours, last the matrix product."""

    case: Case
    found: list[Measured]

    def of(self, side: Side, bf16: bool) -> Measured | None:
        return next((one for one in self.found if (one.side, one.bf16) == (side.name, bf16)), None)


def places(device: str) -> tuple[list[Place], list[str]]:
    """float32, and bfloat16 where the device computes it natively; otherwise a note that says why not."""
    native, reason = computes_bf16(device.split(":")[0])
    both = [Place(device, False), *([Place(device, True)] if native else [])]
    return both, [] if native else [f"without bf16: {reason}"]


def compared(cases: Sequence[Case], options: Any, size: int, notes: Sequence[str]) -> str:
    """Measure the cases, write `<out>/<what>.json` and `.md`, and return the latter.

    Args:
        size: side of the matrices whose product is measured beside them, as the most that the machine can do.
        notes: for below the table.
    """
    where, without = places(options.device)
    notes = [*notes, *without]
    product = Side(f"matrix product, {size}", partial(peak.product, size))
    finished = []
    for case in cases:
        beside = replace(case, sides=[*case.sides, product])
        found, failures = contest(beside, where, options.repeats)
        finished.append(Finished(beside, found))
        notes += failures
    records = [
        {"name": one.case.name, "images": one.case.images, "sides": [asdict(side) for side in one.found]}
        for one in finished
    ]
    return written(options, records, table(finished), notes)


def written(options: Any, records: Sequence[dict[str, Any]], text: str, notes: Sequence[str]) -> str:
    """Both files of a table; returns the Markdown, and where the files are."""
    record = {
        "table": options.what,
        "tiny": options.tiny,
        "machine": machine(options.device),
        "repeats": options.repeats,
        "warm_up": WARM_UP,
        "cases": [*records],
        "notes": [*notes],
    }
    line = f"{hardware(options.device)}; medians of {options.repeats}"
    page = "\n".join([line, "", text, "", *(f"- {note}" for note in notes)]).rstrip() + "\n"
    return saved(options, record, page)


def saved(options: Any, record: dict[str, Any], page: str) -> str:
    """Write `<out>/<what>.json` and `.md`; returns the latter, and where the files are."""
    files = [options.out / f"{options.what}{suffix}" for suffix in (".json", ".md")]
    options.out.mkdir(parents=True, exist_ok=True)
    for file, content in zip(files, (json.dumps(record, indent=1) + "\n", page), strict=True):
        write_text(Path(file), content)
    return f"{page}\n{files[0]}, {files[1]}"


def table(finished: Sequence[Finished]) -> str:
    """A row for each side of each case in each precision. `times ldm`: how many times as long as ours at the same."""
    bf16 = any(one.bf16 for case in finished for one in case.found)
    inside = any(any(one.inside) for case in finished for one in case.found)
    more = [*(["times ldm in bf16"] if bf16 else []), *(["outside the networks"] if inside else [])]
    rows = [_row(one, measured, bf16, inside) for one in finished for measured in one.found]
    return markdown([*_COLUMNS, *more, *_RESOURCES], rows)


def _row(case: Finished, one: Measured, bf16: bool, inside: bool) -> list[str]:
    ours, product = case.case.sides[0], case.case.sides[-1]
    is_product = one.side == product.name
    precisions = [one.bf16, *([True] if bf16 else [])]
    ratios = ["" if is_product else _ratio(one, case.of(ours, precision)) for precision in precisions]
    rate, best = _speed(one), case.of(product, one.bf16)
    around = [f"{outside(one):.1%}" if any(one.inside) else ""] if inside else []
    return [
        *(case.case.name, NAMES[one.bf16], one.side, spread(one.seconds), ratios[0]),
        "" if is_product else f"{case.case.images / one.median:.3g}",
        *(*ratios[1:], *around, f"{one.flops / 1e9:.4g}", f"{rate / 1e9:.0f}"),
        "" if best is None else f"{rate / _speed(best):.0%}",
        f"{one.peak_bytes / 2**20:.0f}",
        "" if is_product else f"{one.parameters / 1e6:.3f}",
    ]


def outside(one: Measured) -> float:
    """The share of the steps that its networks did not take."""
    return 1 - sum(one.inside) / sum(one.seconds)


def _ratio(one: Measured, ours: Measured | None) -> str:
    return "" if ours is None else f"{one.median / ours.median:.2f}"


def _speed(one: Measured) -> float:
    return one.flops / one.median


def spread(seconds: Sequence[float]) -> str:
    """Milliseconds: median, least and most."""
    median = statistics.median(seconds)
    middle, least, most = (
        f"{value * 1e3:{'.1f' if median < 0.1 else '.0f'}}" for value in (median, min(seconds), max(seconds))
    )
    return f"{middle} ({least} to {most})"
