"""Make pictures with a trained diffusion model.

    python scripts/sample.py -r logs/<run>                                  # 8 of every class
    python scripts/sample.py -r logs/<run> --classes 3 dress --steps 30 --guidance 2
    python scripts/sample.py -r 'logs/*_my_diffusion' -n 100 --npz          # newest run that matches; for evaluation
    python scripts/sample.py -r logs/<run> --guidance 2 --guide logs/<smaller run> --interval 0.2 3
    python scripts/sample.py -r logs/<run> --guidance 10 --guidance-channels 3 --schedule shifted shift=3.3333333
    python scripts/sample.py -r logs/<run> --sampler heun s_churn=40 --schedule karras rho=5
    python scripts/sample.py -r logs/<run> --precision auto                 # in bf16 where that is native
    python scripts/sample.py -r logs/<run with an adapter> --lora-scale 0.7 # 0: its base
    python scripts/sample.py -r logs/<run> --lora FOLDER                    # an adapter as peft saves it
    python scripts/sample.py -r logs/<run> --prompt "red heart" "a cat" --guidance 4 --negative "a dog"
    python scripts/sample.py -r logs/<run> --prompts-file prompts.txt --size 48 64   # one a line; height, width
    python scripts/sample.py -r logs/<run> --conditions wanted.json         # [{"class_label": 3}, ...]
    python scripts/sample.py -r logs/<run> --image photo.png --strength 0.5 # image to image
    python scripts/sample.py -r logs/<run> --image photo.png --mask m.png   # what is white in m.png is painted anew
    python scripts/sample.py -r logs/<run> --image photo.png --mask m.png --resamplings 10  # agrees better
    python scripts/sample.py -r logs/<run of small pictures> --image a.png b.png   # super-resolution, a row each
    python scripts/sample.py -r logs/<run of small pictures> --image small.png --noise-level 0.2   # hides its faults
    python scripts/sample.py -r logs/<run of small pictures> --image large.png --tile 256   # of any size, in tiles
    python scripts/sample.py -r logs/<run of maps> --map map.png            # the class of each pixel
    python scripts/sample.py -r logs/<run of layouts> --layout boxes.json   # [{"class": "cat", "box": [0, 0, 0.5, 1]}]

Writes a PNG for each picture, and samples.json: what was used, and every picture in the folder. Of this call's pictures
also grid.png (a row a condition) and, asked to, samples.npz (arr_0: (N,H,W,3) uint8, condition by condition; arr_1:
(N,) classes; names: of their files). Of pictures with 2, 5 or more channels a PNG shows the channels side by side and a
.npy beside it holds them; samples.npz has as many, and --image takes such a file. A picture depends on its seed and
condition alone, so a run that was interrupted, or is repeated with a larger -n, makes only what is missing; a folder
with pictures of other settings is left alone.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm import run_folder
from ldm.autoencoder.tiling import Tiling
from ldm.cli import program
from ldm.cli.devices import Precision, usable
from ldm.cli.large_options import tile_settings, tiling
from ldm.cli.repaint_options import repaint_settings, resampled
from ldm.cli.sample_conditions import requested
from ldm.cli.sample_dense import begun_with
from ldm.cli.sample_options import chosen, described, parse
from ldm.files import published
from ldm.images import picture
from ldm.interop import lora, lora_files
from ldm.runtime import signals
from ldm.sampling import samplers, shown, timesteps
from ldm.sampling.conditions import Condition
from ldm.sampling.dense_files import known, natural_size, read
from ldm.sampling.generate import Sample, check, generate
from ldm.sampling.guidance import Guidance
from ldm.sampling.img2img import InitImage
from ldm.sampling.pipeline import Pipeline
from ldm.sampling.precision import computing_in
from ldm.sampling.sample_folder import Order, claim, default_folder, prefix, record, save, save_arrays, sheet
from ldm.sampling.samplers import Sampler
from ldm.sampling.timesteps import TimestepSchedule
from ldm.sizes import Size


@dataclass(frozen=True)
class Recipe:
    """How the command line has pictures made."""

    sampler: Sampler
    schedule: TimestepSchedule
    guidance: Guidance
    init_image: InitImage | None
    size: Size | None
    tile: Tiling | None = None


def sample(options: Any) -> list[Path]:
    """Do what the command line asks for; returns the files to look at."""
    device = usable(options.device)
    sampler, schedule = named_functions(options)
    pipeline = Pipeline.load(
        run_folder.named(options.run),
        ema=not options.raw,
        autoencoder=options.autoencoder,
        device=device,
        trust=options.trust,
    )
    adapter = with_adapter(pipeline, options)
    precision = Precision.of(options, device)
    pipeline = computing_in(pipeline, precision.compute)
    names = pipeline.manifest.plan.class_names
    conditions = requested(pipeline, options)
    seeds = [*dict.fromkeys(options.seeds or range(options.seed, options.seed + options.number))]
    orders = [Order(condition, seed) for condition in conditions for seed in seeds]
    guidance, init_image, size = steering(pipeline, options, device, conditions)
    tile = tiling(options, pipeline.codec.down_factor)
    recipe = Recipe(resampled(sampler, options, init_image), schedule, guidance, init_image, size, tile)
    settings = {
        **pipeline.origin,
        "sampler": described(options.sampler[0], sampler),
        "schedule": described(options.schedule[0], schedule),
        **{key: getattr(options, key) for key in ("steps", "guidance")},
        **steered(options, recipe),
        **adapter,
        **precision.settings,
    }
    times = schedule(pipeline.objective, options.steps, pipeline.latent_shape(recipe.size, recipe.tile))
    # Both refuse what cannot be, before anything is written.
    arrays = read_once(pipeline, conditions, recipe.size)
    first = [Order(condition, 0) for condition in conditions]
    check(pipeline, [0] * len(first), asked(first, arrays), times, recipe.guidance, recipe.size)
    folder: Path = options.out or default_folder(settings)
    claim(folder, settings, names, orders)
    missing = [order for order in orders if not (folder / order.file).is_file()]
    try:
        if missing:
            make(pipeline, missing, folder, options, recipe, arrays)
    finally:  # also of an interrupted call: what it made is there
        record(folder, settings, names)
    written = [folder / "grid.png"]
    with published(written[0], durable=False) as file:
        beside = [
            shown.conditions(given, pipeline.image_size(recipe.size), pipeline.dense) for given in arrays.values()
        ]
        picture(sheet(folder, conditions, seeds, names, beside)).save(file, format="png")
    if options.npz:
        written.append(save_arrays(folder, orders))
    print(f"{len(orders)} pictures in {folder}")
    return written


def named_functions(options: Any) -> tuple[Sampler, TimestepSchedule]:
    """The sampler and the schedule that the command line names."""
    sampler = chosen("sampler", samplers, options.sampler, options.trust)
    return sampler, chosen("schedule", timesteps, options.schedule, options.trust)


def read_once(pipeline: Pipeline, conditions: Sequence[Condition | None], size: Size | None) -> dict[str, Condition]:
    """The conditions with arrays in place of the files that they name, by the prefix of their samples' files."""
    return {prefix(one): read(pipeline, one, size) for one in conditions if one is not None}


def asked(orders: Sequence[Order], arrays: Mapping[str, Condition]) -> list[Condition] | None:
    """The condition of each order, with `arrays`; None for a model without."""
    return [arrays[prefix(order.condition)] for order in orders if order.condition is not None] or None


def steering(
    pipeline: Pipeline, options: Any, device: str, conditions: Sequence[Condition | None] = ()
) -> tuple[Guidance, InitImage | None, Size | None]:
    """What the command line says of guidance, of a picture to begin with, and of the size.

    Args:
        conditions: of plain values; small pictures among them say the size, where the command line does not.
    """
    guide = None
    if options.guide is not None:
        guide = Pipeline.load(
            run_folder.named(options.guide),
            ema=not options.raw,
            autoencoder=options.autoencoder,
            device=device,
            trust=options.trust,
            compute=pipeline.compute,
        )
    low, high = options.interval
    negative = None if options.negative is None else {"caption": options.negative}
    guidance = Guidance(
        options.guidance, options.rescale, (low, high), guide, channels=options.guidance_channels, negative=negative
    )
    size = None if options.size is None else (options.size[0], options.size[-1])
    if size is None:
        natural = natural_size(pipeline, [condition for condition in conditions if condition is not None])
        size = None if natural == pipeline.image_size() else natural
    begun = begun_with(pipeline, options)
    if begun is None:
        return guidance, None, size
    image, mask = begun
    strength = options.strength if options.strength is not None else 0.6 if mask is None else 1.0
    return guidance, InitImage.read(pipeline.manifest, image, strength, mask, size), size


def steered(options: Any, recipe: Recipe) -> dict[str, Any]:
    """The settings of steering that were asked for, in plain values; files by name and hash."""
    settings: dict[str, Any] = {}
    if options.rescale:
        settings["rescale"] = options.rescale
    if options.guidance_channels is not None:
        settings["guidance_channels"] = options.guidance_channels
    if options.interval != [0.0, math.inf]:
        settings["interval"] = options.interval
    if options.negative is not None:
        settings["negative"] = options.negative
    if recipe.size is not None:
        settings["size"] = [*recipe.size]
    if recipe.guidance.guide is not None:
        settings["guide"] = "{checkpoint} step {step} {weights}".format_map(recipe.guidance.guide.origin)
    settings |= tile_settings(recipe.tile) | repaint_settings(recipe.sampler)
    if recipe.init_image is not None:
        settings |= {"image": known(options.image[0]), "strength": recipe.init_image.strength}
        if recipe.init_image.mask is not None:
            settings["mask"] = known(options.mask[0])
    return settings


def with_adapter(pipeline: Pipeline, options: Any) -> dict[str, Any]:
    """Do what the command line says of an adapter; the settings of it."""
    settings: dict[str, Any] = {}
    network = pipeline.denoiser.get_submodule("network")
    if options.lora is not None:
        read = lora_files.read(options.lora)
        lora_files.attach(pipeline.denoiser, read)
        settings["lora"] = read.record()
    if options.lora_scale is not None:
        lora.set_scale(network, options.lora_scale)
        settings["lora_scale"] = options.lora_scale
    return settings


def make(
    pipeline: Pipeline,
    missing: Sequence[Order],
    folder: Path,
    options: Any,
    recipe: Recipe,
    arrays: Mapping[str, Condition],
) -> None:
    """Make the missing pictures, each written as soon as its batch is done."""
    for made in samples(pipeline, missing, options, recipe, arrays, progress=True):
        save(folder, made)
        signals.stop_if_asked()


def samples(
    pipeline: Pipeline,
    orders: Sequence[Order],
    options: Any,
    recipe: Recipe,
    arrays: Mapping[str, Condition],
    progress: bool = False,
) -> Iterator[Sample]:
    """The pictures of these orders, whose conditions are of plain values; `arrays` are these as `read_once` says."""
    made = generate(
        pipeline,
        [order.seed for order in orders],
        asked(orders, arrays),
        sampler=recipe.sampler,
        steps=options.steps,
        schedule=recipe.schedule,
        guidance=recipe.guidance,
        init_image=recipe.init_image,
        size=recipe.size,
        tile=recipe.tile,
        batch_size=options.batch_size,
        progress=progress,
    )
    return (Sample(order.seed, order.condition, one.image) for order, one in zip(orders, made, strict=True))


def main(argv: Sequence[str]) -> int:
    """Returns the exit code (ldm/errors.py)."""
    memory = "Lower --batch-size, make large pictures in tiles (--tile), or take --precision bf16-mixed."
    return program.answer(lambda: print(*sample(parse(argv)), sep="\n"), memory=memory)
