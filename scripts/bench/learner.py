"""A training of others in a process of its own, which draws samples after so many seconds of it.

Nothing here imports ldm, so that a process can hold another package of that name (sides/imports.py).
"""

import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from scripts.bench.child import Place

BATCH = 100
"""Samples that are drawn at once."""


class Learner(NamedTuple):
    """What a side has made before its first step.

    Attributes:
        parameters: trained weights of its network.
        images: of a step.
        step: takes one, of the whole training: batch, loss, gradients, optimizer, average.
        sample: class labels (N,) -> what it makes of them by its average, (N,C,H,W) float32.
    """

    parameters: int
    images: int
    step: Callable[[], None]
    sample: Callable[[Tensor], Tensor]


def learn(
    name: str, make: Callable[[Place], Learner], place: Place, marks: Sequence[float], labels: Tensor, folder: Path
) -> None:
    """The process: train until each mark, and write `<mark's number>.pt` with the samples that it makes then.

    Args:
        marks: seconds, increasing. What is needed to begin counts, sampling does not.
        labels: (N,) int64, of each sample its class.
    """
    begun = time.perf_counter()
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # what others print is not part of the table
    learner = make(place)
    spent, steps = time.perf_counter() - begun, 0
    columns = TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(name, total=marks[-1])
        for number, mark in enumerate(marks):
            while spent < mark:
                start = time.perf_counter()
                with place.precision():
                    learner.step()
                place.settle()
                spent += time.perf_counter() - start
                steps += 1
                bar.update(task, completed=spent, description=f"{name}, {steps} steps")
            bar.update(task, description=f"{name}, sampling")
            with torch.no_grad(), place.precision():
                parts = [learner.sample(part).float().cpu() for part in labels.to(place.device).split(BATCH)]
            found: dict[str, Any] = {"samples": torch.cat(parts), "images": steps * learner.images}
            torch.save({**found, "parameters": learner.parameters, "seconds": spent}, folder / f"{number}.pt")


def batches(number: int, size: int) -> Callable[[], Tensor]:
    """A function: the next `size` of `number` rows, in a new random order each epoch, of which a rest is left out."""
    order = torch.empty(0, dtype=torch.int64)

    def following() -> Tensor:
        nonlocal order
        if len(order) < size:
            order = torch.randperm(number)
        rows, order = order[:size], order[size:]
        return rows

    return following
