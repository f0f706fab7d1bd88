"""A first stage of diffusers in, a pipeline of diffusers out, trained on emoji in between: the same pictures there.

python scripts/roundtrip.py                                  (make roundtrip: some minutes) from random weights
python scripts/roundtrip.py --first-stage /path/to/sd-vae    from an autoencoder that diffusers has saved

    roundtrip/first_stage      an AutoencoderKL as diffusers saves it, unless one is named
    -> ldm convert             logs/<time>_roundtrip_first_stage
    -> ldm train, init_from    logs/<time>_roundtrip_autoencoder, which goes on from its weights
    -> ldm train               the cache of its latents, and logs/<time>_roundtrip_diffusion
    -> ldm export              roundtrip/pipeline, which needs diffusers, not ldm
    -> roundtrip/pictures.png  a class each: of ldm above, of diffusers below, from the same noise

Each step is a command that is printed; what is done is not done again.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ldm.cli import options, program
from ldm.cli.options import Parser
from ldm.config.load import to_yaml
from ldm.config.yaml_text import read
from ldm.errors import ConfigError, LdmError, NumericError
from ldm.run_folder import RunFolder, newest_run

ROOT = Path("roundtrip")
STEPS = 50
GUIDANCE = 2.0


def first_stage(folder: Path) -> None:
    """Save an AutoencoderKL of random weights, for pictures of 32 px: f4, 4 channels, 0.6M parameters."""
    try:
        import diffusers
        import torch
    except ImportError as error:
        raise ConfigError("the round trip needs diffusers: pip install -e .[interop]") from error
    torch.manual_seed(0)
    model = diffusers.AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3,
        block_out_channels=[32, 64, 64],
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=16,
        sample_size=32,
    )
    aside = folder.with_name(f"{folder.name}.tmp")  # of a call that was interrupted there may be a part
    model.save_pretrained(aside)
    aside.rename(folder)


def fine_tuning(converted: Path) -> dict[str, Any]:
    """The quickstart's first stage with the converted one's networks and weights."""
    config = read(Path("configs/quickstart/autoencoder.yaml")).plain()
    theirs = read(converted / "configs" / "config.yaml").plain()["model"]["params"]
    config["model"]["params"] |= {part: theirs[part] for part in ("encoder", "decoder")}
    # The loss keeps its own log-variance, which starts anew.
    return config | {"init_from": {"run": str(converted), "parts": ["encoder", "decoder"]}}


def do(*words: str) -> None:
    """Run one of ldm's programs, printed as it would be typed; LdmError if it fails."""
    print(f"\n$ python {' '.join(words)}", flush=True)
    code = subprocess.run([sys.executable, *words]).returncode
    if code:
        raise LdmError(f"`python {' '.join(words)}` ended with {code}; run the same again, it goes on where it was")


def trained(name: str) -> Path | None:
    """The newest run of that name; None: there is none."""
    try:
        return Path(newest_run(f"logs/*_{name}"))
    except ConfigError:
        return None


def compared(run: Path, folder: Path, sheet: Path) -> int:
    """Draw both sides' pictures of the same noise, a class each; the number of values (of 0 to 255) that differ.

    Raises:
        NumericError: one differs by more than the last digit of rounding.
    """
    import diffusers
    from PIL import Image

    from ldm.randomness import Draws
    from ldm.sampling.generate import SEED
    from ldm.sampling.guidance import Guidance
    from ldm.sampling.pipeline import Pipeline

    ours = Pipeline.load(run)
    labels = range(ours.num_classes or 0)
    noise = Draws(SEED, labels, len(labels), normals=ours.normals).normal("noise", ours.manifest.plan.shape)
    made = ours.generate(
        labels, [{"class_label": label} for label in labels], steps=STEPS, guidance=Guidance(scale=GUIDANCE)
    )
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    theirs = diffusers.DiffusionPipeline.from_pretrained(folder, trust_remote_code=True, local_files_only=True)
    theirs.set_progress_bar_config(disable=True)
    also = theirs(class_labels=[*labels], latents=noise, guidance_scale=GUIDANCE, num_inference_steps=STEPS).images
    rows = [np.concatenate([np.asarray(image) for image in images], axis=1) for images in (made, also)]
    Image.fromarray(np.concatenate(rows).repeat(2, 0).repeat(2, 1)).save(sheet)
    difference = np.abs(rows[0].astype(int) - rows[1].astype(int))
    if difference.max() > 1:
        raise NumericError(f"{sheet}: pictures of the same noise differ by up to {difference.max()} of 255")
    return int((difference > 0).sum())


def main(argv: Sequence[str]) -> int:
    """Returns the exit code (ldm/errors.py)."""
    parser = Parser(prog="roundtrip.py", description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("--first-stage", type=options.path, metavar="FOLDER", help="an autoencoder of diffusers")
    parser.add_argument("--steps", type=options.whole_number, nargs=2, default=[800, 1000], metavar="N", help="of both")

    def work() -> None:
        chosen = parser.parse_strictly(argv)
        foreign = chosen.first_stage or ROOT / "first_stage"
        ROOT.mkdir(exist_ok=True)
        if chosen.first_stage is None and not foreign.is_dir():
            first_stage(foreign)
        if not foreign.is_dir():
            raise ConfigError(f"--first-stage {foreign}: no such folder; expected an AutoencoderKL of diffusers")
        if trained("roundtrip_first_stage") is None:
            do("scripts/convert.py", str(foreign), "--name", "roundtrip_first_stage", "--resolution", "32")
        converted = trained("roundtrip_first_stage")
        assert converted is not None
        source = json.loads(RunFolder(converted).origin_file.read_text(encoding="utf-8"))["source"]
        if source != foreign.name:
            raise ConfigError(f"{converted}: was made of {source}, not of {foreign}; move logs/*_roundtrip_* away")
        (ROOT / "autoencoder.yaml").write_text(to_yaml(fine_tuning(converted)))
        lengths = [f"lightning.trainer.max_steps={steps}" for steps in chosen.steps]
        do("main.py", *named("roundtrip_autoencoder", ROOT / "autoencoder.yaml"), lengths[0])
        latents = "data.params.autoencoder=${newest:logs/*_roundtrip_autoencoder}"
        do("main.py", *named("roundtrip_diffusion", Path("configs/quickstart/diffusion.yaml")), latents, lengths[1])
        run = trained("roundtrip_diffusion")
        assert run is not None
        do("scripts/export.py", str(run), "--to", "diffusers", "--out", str(ROOT / "pipeline"), "--force")
        sheet = ROOT / "pictures.png"
        differing = compared(run, ROOT / "pipeline", sheet)
        print(f"\n{sheet}: ldm above, diffusers below; {differing} values differ, none by more than 1 of 255")

    return program.answer(work)


def named(name: str, config: Path) -> list[str]:
    return ["--resume", "auto", "--name", name, "--base", str(config)]


if __name__ == "__main__":
    program.run(lambda: main(sys.argv[1:]))
