"""Build the latent caches that a stage-2 configuration reads, with captions and features, or check them byte by byte.

python scripts/cache_latents.py --base configs/diffusion/imagenet_f8_class.yaml [data.params.cache=FOLDER]
torchrun --nproc-per-node 8 scripts/cache_latents.py --base configs/diffusion/imagenet_f8_class.yaml
python scripts/cache_latents.py --verify cache/*

A build that was killed continues where it stopped, and any number of processes, on any machines that share the folder,
may work on one cache. Training builds missing caches itself: this script does so beforehand, or elsewhere.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from ldm.cli import program
from ldm.cli.options import Parser, called, path, split_overrides
from ldm.errors import ConfigError, LdmError
from ldm.runtime import signals


def build(base: Sequence[Path], overrides: Sequence[str], trust: Sequence[str]) -> None:
    """Build the caches of the configuration's data module, and print where they are.

    Latents that the configuration's network cannot take are refused before any of them is made.
    """
    from ldm.config.load import build, load

    loaded = load(base, overrides, trust)
    loaded.check()
    # Imported here, so that a mistake on the command line is answered before torch and Lightning are loaded.
    from ldm.diffusion.module import LatentDiffusion
    from ldm.latents.datamodule import LatentDataModule
    from ldm.runtime import distributed
    from ldm.training import dry_run

    data = build(loaded.resolved()["data"], trust, key="data")
    if not isinstance(data, LatentDataModule):
        wanted, found = (f"{kind.__module__}.{kind.__qualname__}" for kind in (LatentDataModule, type(data)))
        raise ConfigError(f"data.target: expected {wanted}, found {found}: only stage 2 reads a latent cache.")
    data.trust = trust
    facts = data.facts()
    loaded.check(facts)
    tree = loaded.resolved(facts)
    if isinstance(outline := dry_run.meta_model(tree, trust), LatentDiffusion):
        for batch in data.meta_batches():
            dry_run.check_fit(outline, tree, facts, batch, loaded.origin)
    data.prepare_data()
    data.setup()
    if distributed.is_main():
        for line in data.described():
            print(line)


def verify(folder: Path) -> None:
    """Check every byte of a cache, or of a part of one, and print that it is sound."""
    from ldm.latents.parts import verify
    from ldm.runtime.progress import shown

    with shown(str(folder)) as progress:

        def show(done: int, total: int) -> None:
            signals.stop_if_asked()
            progress(done, total)

        manifest = verify(folder, show)
    print(f"{folder}: sound, {manifest.num_items} items")


def verify_all(folders: Sequence[Path]) -> int:
    """Check every cache, even if an earlier one is damaged; returns the exit code."""
    code = 0
    for folder in folders:
        try:
            verify(folder)
        except LdmError as error:
            print(f"error: {error}", file=sys.stderr)
            code = error.exit_code
    return code


def main(argv: Sequence[str]) -> int:
    """Returns the exit code (ldm/errors.py)."""
    parser = Parser(
        prog=called("cache_latents.py", "cache"), description="Build or check latent caches.", allow_abbrev=False
    )
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("-b", "--base", nargs="+", type=path, metavar="YAML", help="stage-2 configuration")
    task.add_argument("--verify", nargs="+", type=path, metavar="FOLDER", help="caches to check byte by byte")
    parser.add_argument("--trust", nargs="+", default=[], metavar="PACKAGE", help="packages that targets may name")

    def work() -> int | None:
        overrides, words = split_overrides(argv)
        options = parser.parse_strictly(words)
        if options.verify:
            return verify_all(options.verify)
        build(options.base, overrides, options.trust)
        return None

    return program.answer(work)
