"""Make a run folder of a foreign checkpoint, which then samples, resumes, fine-tunes and evaluates like any other run.

python scripts/convert.py sd-vae-ft-mse.safetensors                         # an autoencoder
python scripts/convert.py kl-f8.ckpt --config kl-f8.yaml                    # with the YAML that says its training
python scripts/convert.py taesd_encoder.pth                                 # and taesd_decoder.pth beside it
python scripts/convert.py celeba.ckpt --config celeba.yaml                  # a model with its first stage: two runs
python scripts/convert.py DiT-XL-2-256x256.pt --family dit --autoencoder logs/<run>     # a model without one
python scripts/convert.py /path/to/folder                                   # of diffusers: one model or a pipeline
"""

from collections.abc import Sequence
from pathlib import Path

from ldm.cli import options, program
from ldm.cli.options import Parser, called


def main(argv: Sequence[str]) -> int:
    """Returns the exit code (ldm/errors.py)."""
    parser = Parser(
        prog=called("convert.py", "convert"),
        description="Make a run folder of a foreign checkpoint. No code of the file is run.",
        allow_abbrev=False,
    )
    parser.add_argument("source", type=options.path, metavar="PATH", help="a file of weights, or a folder of diffusers")
    parser.add_argument("--config", type=options.path, metavar="FILE", help="the YAML or JSON that describes it")
    parser.add_argument(
        "--autoencoder", type=options.path, metavar="RUN", help="of a model without one; or diffusers' folder"
    )
    parser.add_argument("--resolution", type=options.whole_number, metavar="PIXELS", help="of the images")
    parser.add_argument("--statistics", type=options.path, metavar="FILE", help="the latents' mean and deviation")
    parser.add_argument("--text-encoder", type=options.path, metavar="DIR", help="of captions, or its tokenizer")
    parser.add_argument(
        "--picture-encoder", type=options.path, metavar="DIR", help="vision model of a model that reads pictures"
    )
    parser.add_argument("--family", metavar="WORD", help="dit or sit, whose files are alike; lightningdit")
    parser.add_argument("--license", metavar="TEXT", help="of the weights, for the note on where they come from")
    parser.add_argument("--name", help="of the run (default: the file's)")
    parser.add_argument("--logdir", type=options.path, default=Path("logs"), metavar="DIR", help="for the run folder")

    def work() -> None:
        chosen = parser.parse_strictly(argv)
        from ldm.interop import convert

        for line in convert.convert(
            chosen.source,
            convert.Request(
                *(chosen.autoencoder, chosen.resolution, chosen.statistics, chosen.text_encoder, chosen.family),
                picture_encoder=chosen.picture_encoder,
            ),
            config=chosen.config,
            license=chosen.license,
            name=chosen.name,
            logdir=chosen.logdir,
        ):
            print(line)

    return program.answer(work)
