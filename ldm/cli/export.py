"""Write a trained model as a folder that others load, with a model card, and upload it where that is asked for.

python scripts/export.py logs/<run> --to safetensors --out FOLDER    # weights and configuration
python scripts/export.py logs/<run> --to diffusers --out FOLDER      # a pipeline that makes the same pictures
python scripts/export.py logs/<run> --to onnx --out FOLDER           # decoder and denoiser, for onnxruntime
python scripts/export.py logs/<run> --to lora --out FOLDER           # an adapter alone
python scripts/export.py logs/<run> --to merged --out logs/<merged>  # a run folder, the adapter in its weights
python scripts/export.py FOLDER --push NAME/REPOSITORY               # upload such a folder to the Hugging Face Hub
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.cli import options, program
from ldm.cli.options import Parser, called

if TYPE_CHECKING:
    from ldm.interop.exports.trained import Trained

FORMATS = (
    "safetensors (weights and configuration), diffusers (a pipeline, or an autoencoder), onnx or torch (decoder and "
    "denoiser as programs); of a run with an adapter also lora (the adapter alone) or merged (a run folder without one)"
)
"""What --to takes, in words: a wrong flag is answered before torch is loaded."""


def parse(argv: Sequence[str]) -> Any:
    """The command line; ConfigError names the flag that is wrong."""
    parser = Parser(
        prog=called("export.py", "export"),
        description="Write a trained model as a folder that others load, with a model card.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    what = "run folder, checkpoint, or a quoted glob (its newest run); with --push alone, a folder written before"
    add("run", metavar="RUN", help=what)
    add("--to", metavar="FORMAT", help=FORMATS)
    add("--out", type=options.path, metavar="FOLDER", help="to be written")
    add("--force", action="store_true", help="replace the folder, if it is there")
    add("--raw", action="store_true", help="the weights of the last step instead of their running average")
    add("--autoencoder", type=options.path, metavar="RUN", help="stage-1 run or checkpoint, if it has moved")
    add("--license", metavar="TEXT", help="of the weights, for the model card, such as mit or cc-by-4.0")
    add("--data-license", metavar="TEXT", help="of the pictures that it was trained on, for the model card")
    add("--no-pictures", action="store_true", help="no sheets of the run in the card; some show pictures of the data")
    add("--no-check", action="store_true", help="diffusers: do not compare the folder's picture with the model's")
    add(
        "--push",
        metavar="REPO",
        help="upload the folder to this repository of the Hugging Face Hub, for EVERYONE to see",
    )
    add("--private", action="store_true", help="with --push: a repository that others cannot see")
    add("--trust", action="append", default=[], metavar="PACKAGE", help="let the checkpoint use objects of it")
    chosen = parser.parse_strictly(argv)
    if (chosen.to is None) != (chosen.out is None) or (chosen.to is None and chosen.push is None):
        parser.error("--to FORMAT and --out FOLDER: both are needed, but for --push REPO of a folder written before")
    written_before = ("run", "push", "private")
    idle = [name for name, value in vars(chosen).items() if name not in written_before and value]
    if chosen.to is None and idle:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in idle)
        parser.error(f"{flags}: decides how a folder is written, and without --to FORMAT one is uploaded as it is")
    if chosen.private and chosen.push is None:
        parser.error("--private: belongs to --push REPO, which is missing")
    return chosen


def opened(options: Any) -> "Trained":
    """The model that the command line names."""
    from ldm.autoencoder.codec import Codec
    from ldm.checkpoints import store
    from ldm.cli.evaluate_run import hours
    from ldm.config.tree import current_plain
    from ldm.interop.exports.trained import Diffusion, Trained
    from ldm.run_folder import named
    from ldm.sampling.pipeline import Pipeline

    file = store.verify(named(options.run)).path
    record = store.record(file)
    facts = file, record, current_plain(record.get("config"), str(file))
    batch = (record.get("data") or {}).get("batch_size")
    time = hours(file.parent.parent / "metrics.csv", int(record.get("step", 0)), batch)
    if record.get("kind") == "autoencoder":
        return Trained(*facts, Codec.load(file, options.trust), hours=time)
    pipeline = Pipeline.load(file, ema=not options.raw, autoencoder=options.autoencoder, trust=options.trust)
    weights = pipeline.origin["weights"]
    diffusion = Diffusion(pipeline.denoiser, pipeline.objective, pipeline.manifest, weights)
    return Trained(*facts, pipeline.codec, diffusion, time)


def written(options: Any) -> Path:
    """Write the folder that is asked for, and list it; without --to it is there."""
    from ldm.interop.exports import export, hub

    if options.to is None:
        folder = Path(options.run).expanduser()
        hub.check_folder(folder)
        print(*export.listed(folder), sep="\n")
        return folder
    export.check(options.to, options.out, options.force)
    choices = export.Choices(options.license, options.data_license, not options.no_pictures, not options.no_check)
    for line in export.export(opened(options), options.to, options.out, choices, force=options.force):
        print(line)
    return Path(options.out)


def main(argv: Sequence[str]) -> int:
    """Returns the exit code (ldm/errors.py)."""

    def work() -> None:
        chosen = parse(argv)
        from ldm.interop.exports import hub

        if chosen.push is None:
            written(chosen)
            return
        hub.check(chosen.push)
        folder = written(chosen)
        print(hub.announced(chosen.push, chosen.private), flush=True)
        print(hub.upload(folder, chosen.push, chosen.private))

    return program.answer(work)
