"""Write a trained model as a folder that others load, with a model card, and upload it where that is asked for.

python scripts/export.py logs/<run> --to safetensors --out FOLDER    # weights and configuration
python scripts/export.py logs/<run> --to onnx --out FOLDER           # decoder and denoiser, for onnxruntime
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.cli import options, program
from ldm.cli.options import Parser, called

if TYPE_CHECKING:
    from ldm.interop.trained import Trained

FORMATS = "safetensors (weights and configuration), onnx or torch (decoder and denoiser as programs)"
"""What --to takes, in words: a wrong flag is answered before torch is loaded."""


def parse(argv: Sequence[str]) -> Any:
    """The command line; ConfigError names the flag that is wrong."""
    parser = Parser(
        prog=called("export.py", "export"),
        description="Write a trained model as a folder that others load, with a model card.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("run", metavar="RUN", help="run folder, checkpoint, or a quoted glob (its newest run)")
    add("--to", required=True, metavar="FORMAT", help=FORMATS)
    add("--out", type=options.path, required=True, metavar="FOLDER", help="to be written")
    add("--force", action="store_true", help="replace the folder, if it is there")
    add("--raw", action="store_true", help="the weights of the last step instead of their running average")
    add("--autoencoder", type=options.path, metavar="RUN", help="stage-1 run or checkpoint, if it has moved")
    add("--license", metavar="TEXT", help="of the weights, for the model card, such as mit or cc-by-4.0")
    add("--data-license", metavar="TEXT", help="of the pictures that it was trained on, for the model card")
    add("--no-pictures", action="store_true", help="no sheets of the run in the card; some show pictures of the data")
    add("--trust", action="append", default=[], metavar="PACKAGE", help="let the checkpoint use objects of it")
    return parser.parse_strictly(argv)


def opened(options: Any) -> "Trained":
    """The model that the command line names."""
    from ldm.autoencoder.codec import Codec
    from ldm.checkpoints import store
    from ldm.cli.evaluate_subject import hours
    from ldm.config.tree import current_plain
    from ldm.interop.trained import Diffusion, Trained
    from ldm.run_folder import newest_run
    from ldm.sampling.pipeline import Pipeline

    path = Path(newest_run(options.run) if "*" in options.run else options.run)
    file = store.verify(path).path
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


def main(argv: Sequence[str]) -> int:
    """Returns the exit code (ldm/errors.py)."""

    def work() -> None:
        chosen = parse(argv)
        from ldm.interop import export

        export.check(chosen.to, chosen.out, chosen.force)
        choices = export.Choices(chosen.license, chosen.data_license, not chosen.no_pictures)
        for line in export.export(opened(chosen), chosen.to, chosen.out, choices, force=chosen.force):
            print(line)

    return program.answer(work)
