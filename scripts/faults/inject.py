"""Hooks for a run's processes: what goes wrong inside of them. Each imports ldm where it is called, in that process."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scripts.faults.interpreter import Hook

Action = Callable[[Any, dict[str, Any]], None]
"""Called with the module and the batch."""


def before_each_step(action: Action) -> Hook:
    """`action` before every training step of stage 2."""

    def hook() -> None:
        from ldm.diffusion.module import LatentDiffusion

        module: Any = LatentDiffusion
        step = module.training_step

        def changed(self: Any, batch: Any, batch_idx: int) -> Any:
            action(self, batch)
            return step(self, batch, batch_idx)

        module.training_step = changed

    return hook


def slow_steps(seconds: float) -> Hook:
    """Each training step takes this much longer."""
    return before_each_step(lambda module, batch: time.sleep(seconds))


def after_backward(action: Callable[[Any], None]) -> Hook:
    """`action` of the module, with its gradients, before each optimizer step of stage 2."""

    def hook() -> None:
        from ldm.diffusion.module import LatentDiffusion

        module: Any = LatentDiffusion
        module.on_after_backward = action

    return hook


def slow_saves(seconds: float, begun: Path | None = None) -> Hook:
    """Every save takes this much longer in writing its file, and touches `begun` when it has written the first half."""

    def hook() -> None:
        import torch

        save = torch.save

        def slow(state: Any, file: Any, *args: Any, **options: Any) -> None:
            save(state, file, *args, **options)
            if begun is not None:
                begun.touch()
            end = time.monotonic() + seconds
            while time.monotonic() < end:  # a signal may cut a sleep short
                time.sleep(0.02)

        vars(torch)["save"] = slow

    return hook


def in_validation(action: Callable[[Any], None]) -> Hook:
    """`action` of the module before each validation batch of stage 2."""

    def hook() -> None:
        from ldm.diffusion.module import LatentDiffusion

        module: Any = LatentDiffusion
        step = module.validation_step

        def changed(self: Any, batch: Any, batch_idx: int) -> Any:
            action(self)
            return step(self, batch, batch_idx)

        module.validation_step = changed

    return hook


def diary(folder: Path) -> Hook:
    """Each process writes into a file of its own, a line a batch: step, rank, sample numbers, hash of what it sees."""

    def note(module: Any, batch: dict[str, Any]) -> None:
        from hashlib import sha256

        draws = batch["draws"]
        # A hash a row, so that the rows can be compared however they are shared out.
        for row, number in enumerate(draws.numbers):
            seen = batch["latent"][row].numpy().tobytes() + bytes(str(int(batch["class_label"][row])), "ascii")
            line = f"{module.trainer.global_step} {int(number)} {sha256(seen).hexdigest()[:16]}\n"
            with (folder / f"diary.{module.trainer.global_rank}").open("a") as file:
                file.write(line)

    return before_each_step(note)


def both(*hooks: Hook) -> Hook:
    """All of these."""

    def hook() -> None:
        for one in hooks:
            one()

    return hook


def environments_as_started() -> Hook:
    """The kernel shows of a fork the environment of what it was forked from; here ranks see each other's own."""

    def hook() -> None:
        import os

        from ldm.runtime import launcher

        vars(launcher)["_environment"] = lambda process: dict(os.environ)

    return hook
