"""Make pictures with a trained diffusion model.

    python scripts/sample.py -r logs/<run>                                  # 8 of every class
    python scripts/sample.py -r logs/<run> --classes 3 dress --steps 30 --guidance 2
    python scripts/sample.py -r 'logs/*_my_diffusion' -n 100 --npz          # newest run that matches; for evaluation
    python scripts/sample.py -r logs/<run> --guidance 2 --guide logs/<smaller run> --interval 0.2 3
    python scripts/sample.py -r logs/<run> --guidance 10 --guidance-channels 3 --schedule shifted --shift 3.3333333
    python scripts/sample.py -r logs/<run> --image photo.png --strength 0.5 # image to image
    python scripts/sample.py -r logs/<run> --image photo.png --mask m.png   # what is white in m.png is painted anew

Writes a PNG for each picture, and samples.json: what was used, and every picture in the folder. Of this call's pictures
also grid.png (a row a class) and, asked to, samples.npz (arr_0: (N,H,W,3) uint8, class by class; names: of their
files). Of pictures with 2, 5 or more channels a PNG shows the channels side by side and a .npy beside it holds them;
samples.npz has as many, and --image takes such a file.
A picture depends on its seed and class alone, so a run that was interrupted, or is repeated with a larger -n, makes
only what is missing; a folder with pictures of other settings is left alone.
"""

import math
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from ldm.cli import program
from ldm.cli.options import Parser, called, finite, path, positive, ratio, seed, share, some_share, whole_number
from ldm.errors import ConfigError
from ldm.files import published
from ldm.images import picture
from ldm.run_folder import newest_run
from ldm.runtime import signals
from ldm.sampling.generate import Sampler, check, generate
from ldm.sampling.guidance import Guidance
from ldm.sampling.img2img import InitImage
from ldm.sampling.pipeline import Pipeline
from ldm.sampling.sample_folder import Order, claim, default_folder, record, save, save_arrays, sheet
from ldm.sampling.samplers import ancestral, ddim, dpm_solver, heun, unipc
from ldm.sampling.timesteps import CompVis, Default, Karras, Power, Shift, TimestepSchedule

SAMPLERS: dict[str, Sampler] = {
    "ddim": ddim,
    "euler": ddim,
    "ancestral": ancestral,
    "heun": heun,
    "dpm": dpm_solver,
    "dpm-sde": partial(dpm_solver, eta=1.0),
    "unipc": unipc,
}
WITH_ETA: dict[str, Callable[..., torch.Tensor]] = {"ddim": ddim, "euler": ddim, "dpm": dpm_solver}
SCHEDULES: dict[str, Callable[[Pipeline], TimestepSchedule]] = {
    "default": lambda pipeline: Default(),
    "uniform": lambda pipeline: Power(1),
    "quadratic": lambda pipeline: Power(2),
    "shifted": lambda pipeline: Shift(math.sqrt(math.prod(pipeline.manifest.plan.shape) / 4096)),
    "karras": lambda pipeline: Karras(),
    "compvis": lambda pipeline: CompVis(),
}


def parse(argv: Sequence[str]) -> Any:
    """The command line; ConfigError for a wrong one."""
    parser = Parser(
        prog=called("sample.py", "sample"),
        description="Make pictures with a trained diffusion model.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "-r",
        "--run",
        required=True,
        metavar="RUN",
        help="run folder, checkpoint, or a quoted glob (its newest run)",
    )
    add("--classes", nargs="+", metavar="CLASS", help="numbers or names (default: all)")
    add("-n", "--number", type=whole_number, default=8, help="pictures a class (default: 8)")
    add("--seed", type=seed, default=0, help="of the first picture, counted up from there (default: 0)")
    add("--seeds", nargs="+", type=seed, metavar="SEED", help="these seeds instead of -n and --seed")
    add(
        "--steps",
        type=whole_number,
        default=50,
        help="of the sampler, a network call each, heun two (default: 50)",
    )
    add("--sampler", choices=SAMPLERS, default="ddim", help="(default: ddim, which is Euler's for EDM and flows)")
    add(
        "--schedule",
        choices=SCHEDULES,
        default="default",
        help="where the steps lie (default: as the objective has them)",
    )
    add("--eta", type=share, default=0.0, help="fresh noise on the way, ddim or dpm: 0 none (default) ... 1 all")
    add("--shift", type=positive, metavar="S", help="with --schedule shifted: by S instead, above 1 towards noise")
    add("--guidance", type=finite, default=1.0, help="classifier-free guidance scale; 1 (default): none")
    add("--rescale", type=share, default=0.0, help="0 (default) ... 1: keep large scales from burning pictures out")
    add(
        "--interval",
        type=ratio,
        nargs=2,
        default=[0.0, math.inf],
        metavar=("LOW", "HIGH"),
        help="guide between these ratios sigma / alpha alone (default: everywhere)",
    )
    add("--guidance-channels", type=whole_number, metavar="C", help="guide the first C of the latents (default: all)")
    add("--guide", metavar="RUN", help="guide away from this smaller or less trained model (autoguidance)")
    add("--image", type=path, metavar="FILE", help="begin with this picture instead of noise alone")
    add(
        "--strength",
        type=some_share,
        help="of --image, above 0 to 1: how much of it is lost (default: 0.6; with --mask 1)",
    )
    add("--mask", type=path, metavar="FILE", help="with --image: paint anew what is white in this picture")
    add("--raw", action="store_true", help="the weights of the last step instead of their running average")
    add("--autoencoder", type=path, metavar="RUN", help="stage-1 run or checkpoint, if it has moved")
    add("--batch-size", type=whole_number, default=64, help="pictures made at once; changes speed alone (default: 64)")
    add("--device", help="such as cuda or cpu (default: cuda where there is one)")
    add("--out", type=path, metavar="FOLDER", help="(default: <run>/samples/<settings>)")
    add("--npz", action="store_true", help="also write samples.npz")
    add("--trust", action="append", default=[], metavar="PACKAGE", help="let the checkpoint build objects of it")
    options = parser.parse_strictly(argv)
    _check_together(options)
    return options


def _check_together(options: Any) -> None:
    """ConfigError for flags that contradict one another."""
    if options.eta and options.sampler not in WITH_ETA:
        raise ConfigError(
            f"--eta {options.eta:g}: expected a sampler of {', '.join(WITH_ETA)}, found --sampler {options.sampler}."
        )
    for flag in ("mask", "strength"):
        if options.image is None and getattr(options, flag) is not None:
            raise ConfigError(f"--{flag} {getattr(options, flag)}: belongs to --image FILE, which is missing.")
    if options.shift is not None and options.schedule != "shifted":
        raise ConfigError(
            f"--shift {options.shift:g}: belongs to --schedule shifted, found --schedule {options.schedule}."
        )
    idle = {"rescale": 0.0, "interval": [0.0, math.inf], "guidance_channels": None, "guide": None}
    for key, value in idle.items():
        if options.guidance == 1 and getattr(options, key) != value:
            flag = key.replace("_", "-")
            raise ConfigError(f"--{flag}: does nothing at --guidance 1, which is no guidance; name a scale.")
    low, high = options.interval
    if low >= high:
        raise ConfigError(f"--interval {low:g} {high:g}: expected LOW < HIGH, as ratios sigma / alpha.")


def chosen_classes(words: Sequence[str] | None, number: int | None, names: Sequence[str] | None) -> list[int | None]:
    """What --classes means for a model of `number` classes; [None] for one without.

    Raises:
        ConfigError: naming the nearest class.
    """
    if number is None:
        if words:
            raise ConfigError(f"--classes {' '.join(words)}: this model was trained without classes; leave it out.")
        return [None]
    if words is None:
        return [*range(number)]
    known = {name.casefold(): label for label, name in enumerate(names or ())}
    chosen: dict[int | None, None] = {}
    for word in words:
        label = int(word) if word.isdecimal() else known.get(word.casefold())
        if label is None or label >= number:
            near = get_close_matches(word.casefold(), known, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"there are: {', '.join(names or ()) or 'no names'}."
            raise ConfigError(f"--classes {word}: expected a number from 0 to {number - 1} or a name; {hint}")
        chosen[label] = None
    return [*chosen]


def sample(options: Any) -> list[Path]:
    """Do what the command line asks for; returns the files to look at."""
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    pipeline = Pipeline.load(
        _found(options.run), ema=not options.raw, autoencoder=options.autoencoder, device=device, trust=options.trust
    )
    names = pipeline.manifest.plan.class_names
    labels = chosen_classes(options.classes, pipeline.num_classes, names)
    seeds = [*dict.fromkeys(options.seeds or range(options.seed, options.seed + options.number))]
    orders = [Order(label, seed) for label in labels for seed in seeds]
    guidance, init_image = steering(pipeline, options, device)
    chosen = ("sampler", "schedule", "steps", "eta", "guidance")
    settings = {
        **pipeline.origin,
        **{key: getattr(options, key) for key in chosen},
        **steered(options, guidance, init_image),
    }
    times = schedule(pipeline, options)(pipeline.objective, options.steps)
    # Both refuse what cannot be, before anything is written.
    check(pipeline, [order.seed for order in orders], classes(orders), times, guidance)
    folder: Path = options.out or default_folder(settings)
    claim(folder, settings, names)
    missing = [order for order in orders if not (folder / order.file).is_file()]
    try:
        if missing:
            make(pipeline, missing, folder, options, guidance, init_image)
    finally:  # also of an interrupted call: what it made is there
        record(folder, settings, names)
    written = [folder / "grid.png"]
    with published(written[0], durable=False) as file:
        picture(sheet(folder, labels, seeds)).save(file, format="png")
    if options.npz:
        written.append(save_arrays(folder, orders))
    print(f"{len(orders)} pictures in {folder}")
    return written


def schedule(pipeline: Pipeline, options: Any) -> TimestepSchedule:
    """Where the command line has the steps."""
    return SCHEDULES[options.schedule](pipeline) if options.shift is None else Shift(options.shift)


def classes(orders: Sequence[Order]) -> list[int] | None:
    """Of each order; None for a model without."""
    return [order.label for order in orders if order.label is not None] or None


def _found(run: str) -> Path | str:
    return newest_run(run) if "*" in run else run


def steering(pipeline: Pipeline, options: Any, device: str) -> tuple[Guidance, InitImage | None]:
    """What the command line says of guidance, and of a picture to begin with."""
    guide = None
    if options.guide is not None:
        guide = Pipeline.load(
            _found(options.guide),
            ema=not options.raw,
            autoencoder=options.autoencoder,
            device=device,
            trust=options.trust,
        )
    low, high = options.interval
    guidance = Guidance(options.guidance, options.rescale, (low, high), guide, channels=options.guidance_channels)
    if options.image is None:
        return guidance, None
    strength = options.strength if options.strength is not None else 0.6 if options.mask is None else 1.0
    return guidance, InitImage.read(pipeline.manifest, options.image, strength, options.mask)


def steered(options: Any, guidance: Guidance, init_image: InitImage | None) -> dict[str, Any]:
    """The settings of schedule and steering that were asked for, in plain values; files by name and hash."""
    settings: dict[str, Any] = {}
    if options.shift is not None:
        settings["shift"] = options.shift
    if options.rescale:
        settings["rescale"] = options.rescale
    if options.guidance_channels is not None:
        settings["guidance_channels"] = options.guidance_channels
    if options.interval != [0.0, math.inf]:
        settings["interval"] = options.interval
    if guidance.guide is not None:
        settings["guide"] = "{checkpoint} step {step} {weights}".format_map(guidance.guide.origin)
    if init_image is not None:
        settings |= {"image": _known(options.image), "strength": init_image.strength}
    if options.mask is not None:
        settings["mask"] = _known(options.mask)
    return settings


def _known(file: Path) -> dict[str, str]:
    return {"file": str(file), "sha256": sha256(file.read_bytes()).hexdigest()}


def make(
    pipeline: Pipeline,
    missing: Sequence[Order],
    folder: Path,
    options: Any,
    guidance: Guidance,
    init_image: InitImage | None,
) -> None:
    """Make the missing pictures, each written as soon as its batch is done."""
    samples = generate(
        pipeline,
        [order.seed for order in missing],
        classes(missing),
        sampler=partial(WITH_ETA[options.sampler], eta=options.eta) if options.eta else SAMPLERS[options.sampler],
        steps=options.steps,
        schedule=schedule(pipeline, options),
        guidance=guidance,
        init_image=init_image,
        batch_size=options.batch_size,
        progress=True,
    )
    for made in samples:
        save(folder, made)
        signals.stop_if_asked()


def main(argv: Sequence[str]) -> int:
    """Returns the exit code (ldm/errors.py)."""
    return program.answer(lambda: print(*sample(parse(argv)), sep="\n"))
