"""Train an autoencoder (stage 1) or a diffusion model on its latents (stage 2).

    python main.py --base configs/quickstart/autoencoder.yaml
    python main.py --base configs/quickstart/diffusion.yaml data.params.batch_size=64
    python main.py --resume logs/2026-11-22T09-00-00_emoji_diffusion lightning.trainer.max_steps=20000

Exit codes are listed in ldm/errors.py. Torch and Lightning are imported late, so that a mistake is reported at once.
"""

import os
import pdb
import sys
import traceback
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any

from ldm import files, run_folder
from ldm.cli import program
from ldm.cli.options import parse
from ldm.config import randomness
from ldm.config.load import Config, build
from ldm.errors import CheckpointError, ConfigError
from ldm.run_folder import RunFolder
from ldm.runtime import signals
from ldm.training import resume
from ldm.training.options import Options

if TYPE_CHECKING:
    from ldm.training.init_from import Weights


def main(argv: Sequence[str]) -> int:
    """Returns the exit code."""
    debug = "-d" in argv or "--debug" in argv
    try:
        return program.answer(lambda: work(parse(argv)), examine if debug else None)
    except Exception:
        if debug:
            examine()
        raise


def examine() -> None:
    """Print the traceback, and in a terminal start the debugger where the error was raised."""
    traceback.print_exc()
    if sys.stdin.isatty():
        pdb.post_mortem()


def work(options: Options) -> int:
    """From the command line to a finished run, or whatever else was requested."""
    if os.environ.get("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"):
        raise CheckpointError("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD is set: it lets a checkpoint run code. Unset it.")
    start = resume.start(options)
    signals.stop_if_asked()
    start.config.check()
    steps = max_steps(start.config)
    if not options.train and start.is_new:
        raise ConfigError("Without training there is nothing to validate: name a run or a checkpoint with --resume.")
    for note in start.notes:
        print(note)
    if start.folder and options.train and not options.dry_run and finished(start, steps):
        print(
            f"{start.folder.path}: nothing to do, {steps} steps are done. Raise lightning.trainer.max_steps to go on."
        )
        return 0
    if not options.dry_run:
        files.check_writable(start.folder.path if start.folder else options.logdir)
    signals.stop_if_asked()
    data, tree, facts = prepare(start, options)
    settle_precision(start, tree)
    signals.stop_if_asked()
    resume.check_facts(start, facts, options.allow_change)
    from ldm.training import dry_run, init_from, rehearsal, trainer
    from ldm.training.callbacks.model_files import model_files

    outline, batches = dry_run.meta_model(tree, options.trust), data.meta_batches()
    for batch in batches:
        dry_run.check_fit(outline, tree, facts, batch, start.config.origin)
    rehearsal.check(outline, tree, facts, batches[0], start.config.origin, start.config.trust)
    trainer.make_trainer(tree, data, outline, trust=options.trust)
    weights = init_from.prepare(tree, outline, data, facts) if start.has_no_checkpoint() else None
    if weights is None and start.has_no_checkpoint():
        model_files(outline)  # nothing else will bring them
    if options.dry_run:
        print(dry_run.report(outline, tree, facts, *batches))
        return 0
    return train(options, start, tree, data, facts, weights)


def max_steps(config: Config) -> int:
    """The run's length, the one thing under `lightning` that has no default."""
    trainer = (config.resolved().get("lightning") or {}).get("trainer") or {}
    steps = trainer.get("max_steps")
    if not isinstance(steps, int) or steps < 1:
        raise ConfigError(f"lightning.trainer.max_steps: expected a number of optimizer steps, found {steps}.")
    return steps


def finished(start: resume.Start, steps: int) -> bool:
    """Whether the run to resume has reached `steps`; False if a checkpoint was named: it may be an older one."""
    state = start.folder.read_state() if start.folder else None
    return start.checkpoint is None and state is not None and state.status == "finished" and state.step >= steps


def prepare(start: resume.Start, options: Options) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """The data module, the configuration with every reference filled in, and the facts of the data."""
    data = build(start.config.resolved()["data"], options.trust, key="data")
    data.trust = options.trust
    facts = data.facts()
    start.config.check(facts)  # again, now that the facts are filled in
    tree = start.config.resolved(facts)
    data.randomness = randomness.chosen(tree, options.trust)
    if options.scale_lr and start.is_new:
        for optimizer in ("optimizer", "discriminator_optimizer"):
            params = (tree["model"]["params"].get(optimizer) or {}).get("params", {})
            if "lr" in params:
                params["lr"] *= facts["batch_size"]
                print(f"scaled: model.params.{optimizer}.params.lr to {params['lr']:g}")
    return data, tree, facts


def settle_precision(start: resume.Start, tree: dict[str, Any]) -> None:
    """Replace the precision `auto`, and print by what and why."""
    from ldm.runtime import distributed, precision

    notes = precision.settle(tree["lightning"]["trainer"], is_new=start.is_new)
    if distributed.is_main():
        for note in notes:
            print(note)


def train(
    options: Options,
    start: resume.Start,
    tree: dict[str, Any],
    data: Any,
    facts: dict[str, Any],
    weights: "Weights | None",
) -> int:
    """Build the model, claim the run folder, and train (from these weights, if the run is new) or validate."""
    from ldm.runtime import distributed
    from ldm.training import defaults, fit, trainer
    from ldm.training.callbacks.first_step import FirstStep
    from ldm.training.loggers import end

    with fit.explained(), ExitStack() as held:
        model = trainer.build_model(tree, options.trust)
        signals.stop_if_asked()
        folder, first_step = start.folder, FirstStep()
        if folder is not None:
            # A run keeps the configuration that it has made steps with, until it has made one with another.
            first_step = FirstStep(partial(resume.save, folder, start.source, tree, facts))
        elif distributed.is_main():
            folder = run_folder.create(options.logdir, start.name, options.postfix)
            used = (lambda: first_step.made) if options.train else folder.has_results
            held.enter_context(run_folder.removed_if_unused(folder, used))
            resume.save(folder, start.source, tree, facts)
        else:
            folder = RunFolder(options.logdir)  # the other ranks write nothing, so theirs need not exist
        if distributed.is_main():
            held.enter_context(folder.owned())
            if options.train:
                files.check_space(folder.checkpoints, fit.space_needed(model))
        callbacks = [first_step, *defaults.make_callbacks(tree, folder, model, facts, options.trust)]
        # A validation without training has no row in the metrics file.
        loggers = defaults.make_loggers(tree, folder, options.project, options.trust) if options.train else []
        held.callback(lambda: None if first_step.made else end(loggers))
        lightning = trainer.make_trainer(tree, data, model, callbacks, loggers, options.trust, folder.path)
        signals.stop_if_asked()
        if not options.train:
            fit.validate(lightning, model, data, folder, start.checkpoint)
            return 0
        state = fit.run(lightning, model, data, folder, start.checkpoint, start.verified, start.is_new, weights)
        if lightning.is_global_zero:
            print(f"{folder.path}: {state.status} at step {state.step} {state.reason}".rstrip())
        return state.exit_code or 0
