"""Sides for tests of the processes in which they run: a process imports no more than this."""

from pathlib import Path

import torch

from scripts.bench.child import Built, Place, repeat


def counting(folder: Path, name: str, parameters: int, place: Place) -> Built:
    """Writes down each of its steps, in a file that all sides have."""

    def step() -> None:
        with (folder / "steps").open("a") as file:
            file.write(name)
        torch.mm(torch.ones(8, 8), torch.ones(8, 8))

    return Built(parameters, repeat(step, place))


def broken(place: Place) -> Built:
    raise ModuleNotFoundError("No module named 'taming'\nand more")
