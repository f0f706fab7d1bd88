"""What `ldm evaluate` measures, and what it is compared with, from the command line."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

from ldm import run_folder
from ldm.autoencoder.codec import Codec
from ldm.autoencoder.lpips import AlexNetLPIPS
from ldm.checkpoints import store
from ldm.cli.evaluate_options import OF_RECONSTRUCTIONS, check_metrics, is_configuration
from ldm.cli.sample import Recipe as CommandLine
from ldm.cli.sample import steered, steering
from ldm.cli.sample_options import chosen, described
from ldm.config.tree import current_plain
from ldm.errors import CheckpointError, ConfigError, LdmError
from ldm.evaluation.fidelity import RECONSTRUCTION, Fidelity
from ldm.evaluation.measure import METRICS, OF_ITEMS, ONE_BY_ONE
from ldm.evaluation.pictures import configured
from ldm.evaluation.pictures.base import Scattered
from ldm.evaluation.pictures.configured import NoSuchPart
from ldm.evaluation.pictures.items import Items
from ldm.evaluation.pictures.labels import ITEMS, Balanced, rule, usual
from ldm.evaluation.pictures.made import Generated, Recipe, Reconstructions
from ldm.evaluation.pictures.stored import DatasetPictures, opened
from ldm.evaluation.reference import PicturesReference, Reference, StatisticsReference, holds, holds_statistics
from ldm.evaluation.subject import Reconstructed, Subject
from ldm.latents.asked import DenseItems
from ldm.sampling import samplers, timesteps
from ldm.sampling.pipeline import Pipeline
from ldm.sampling.sample_folder import default_folder
from ldm.training.metrics_table import read_metrics

SAMPLES = 10_000
"""So many are made where nothing is said: enough to rank models, a fifth of what published tables have."""


def subject_of(options: Any, device: str) -> Subject:
    """What the command line asks to measure; everything is loaded, nothing computed.

    Raises:
        LdmError: it cannot be measured.
    """
    if options.run is None:
        check_metrics(options.metrics, "pictures", METRICS)
        return _stored(options)
    path = Path(run_folder.newest_run(options.run) if "*" in options.run else options.run).expanduser()
    if _kind(path) == "autoencoder":
        check_metrics(options.metrics, "reconstructions", OF_RECONSTRUCTIONS)
        return _reconstructions(options, path, device)
    check_metrics(options.metrics, "samples", OF_ITEMS)
    return _samples(options, path, device)


def reference_of(options: Any, subject: Subject) -> Reference:
    """What the command line, or else the subject itself, says that it is compared with."""
    if options.against is None or isinstance(subject, Reconstructed):
        assert subject.own_reference is not None  # pictures are refused without --against
        with _named_otherwise("--against"):
            return subject.own_reference()
    word, *overrides = options.against
    path = Path(os.path.expanduser(word))
    if is_configuration(word):
        found = configured.of_file(path, overrides, options.trust, options.part or "train")
        return PicturesReference(found.pictures, f"{path} ({found.part})", options.reference_images)
    if holds_statistics(path):
        needed = holds(path, "arr_0") and {*ONE_BY_ONE} & {*subject.metrics}
        sample = _pictures_reference(options, path, options.reference_images) if needed else None
        return StatisticsReference(path, sample)
    return _pictures_reference(options, path, options.reference_images)


def held_out_of(options: Any, subject: Subject) -> Reference | None:
    """Real pictures that are not in the reference: named, or the validation part where that is the training part."""
    if not {"fdr", "nearest"} & {*subject.metrics} or isinstance(subject, Reconstructed):
        return None
    if options.held_out is not None:
        return _pictures_reference(options, options.held_out)
    if options.part == "validation":
        return None
    if options.against is None:
        return None if subject.own_held_out is None else subject.own_held_out()
    word, *overrides = options.against
    if not is_configuration(word):
        return None
    with suppress(NoSuchPart):
        found = configured.of_file(Path(os.path.expanduser(word)), overrides, options.trust, "validation")
        return PicturesReference(found.pictures, f"{word} (validation)")
    return None


def _pictures_reference(options: Any, path: Path, number: int | None = None) -> PicturesReference:
    return PicturesReference(Scattered(opened(path, _resolution(options))), str(path), number)


@contextmanager
def _named_otherwise(flag: str) -> Iterator[None]:
    """Errors of a run's own data also say how to name another."""
    try:
        yield
    except LdmError as error:
        raise type(error)(f"{error}\nName another with {flag}.") from error


def _resolution(options: Any) -> Any:
    return None if options.resolution is None else tuple(options.resolution * 2)[:2]


def _kind(path: Path) -> str:
    """Of a run folder or a checkpoint: "autoencoder" or "diffusion"; read from any checkpoint, unverified."""
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    files = [path] if path.is_file() else sorted(folder.glob(f"*{store.SUFFIX}"))
    if not files:
        raise CheckpointError(f"{path}: no checkpoint; expected a run folder that has one, or a checkpoint, to measure")
    for file in files:
        try:
            return str(store.record(file).get("kind"))
        except CheckpointError:
            continue  # a damaged one is dealt with where it is loaded
    return "diffusion"


def _stored(options: Any) -> Subject:
    path: Path = options.pictures
    pictures = Scattered(opened(path, _resolution(options)), options.images)
    protocol = {"kind": "pictures", "images": len(pictures), "resolution": _resolution(options)}
    return Subject(
        name=str(path),
        kind="pictures",
        pictures=pictures,
        home=path.absolute().parent,
        words=[path.name.removesuffix(".npz"), str(len(pictures))],
        protocol=protocol,
        metrics=options.metrics or METRICS,
    )


def _training(file: Path, found: Mapping[str, Any]) -> dict[str, Any]:
    """How far the model of a checkpoint has come."""
    batch = (found.get("data") or {}).get("batch_size")
    step = int(found.get("step", 0))
    images = found.get("images_seen") or (None if batch is None else step * batch)
    table = file.parent.parent / "metrics.csv"
    each = images / step if images and step else batch  # of a step, on average: with buckets they may differ
    return {"checkpoint": str(file), "step": step, "images_seen": images, "hours": hours(table, step, each)}


def hours(table: Path, step: int, batch: float | None) -> float | None:
    """Of training up to a step, from the speeds that were logged; None: there are none."""
    if batch is None:
        return None
    rows = [(int(row["step"]), float(row["images_per_second"])) for row in read_metrics(table) if _has_speed(row)]
    before, seconds = 0, 0.0
    for at, speed in rows:
        if at <= step:
            seconds += (at - before) * batch / speed
            before = at
    return seconds / before * step / 3600 if before else None


def _has_speed(row: Mapping[str, str]) -> bool:
    return float(row.get("images_per_second", 0)) > 0


def _home(file: Path) -> Path:
    """Where the records of a checkpoint lie."""
    run = file.parent.parent if file.parent.name == "checkpoints" else file.parent
    return run / "evaluation"


def _data(config: Mapping[str, Any], file: Path) -> Mapping[str, Any]:
    """The section that says what a run was trained on."""
    if not config.get("data"):
        raise ConfigError(f"{file}: does not say which data it was trained on.")
    data: Mapping[str, Any] = config["data"]
    return data


def _average(config: Mapping[str, Any], raw: bool) -> Any:
    """The averaged weights' profile, as the configuration has it; None: the raw ones."""
    return None if raw else (config["model"]["params"].get("ema") or {}).get("params", {}).get("profile")


def _samples(options: Any, path: Path, device: str) -> Subject:
    sampler = chosen("sampler", samplers, options.sampler, options.trust)
    schedule = chosen("schedule", timesteps, options.schedule, options.trust)
    pipeline = Pipeline.load(
        path, ema=not options.raw, autoencoder=options.autoencoder, device=device, trust=options.trust
    )
    guidance, _, _ = steering(pipeline, options, device)
    settings = {
        "weights": pipeline.origin["weights"],
        "sampler": described(options.sampler[0], sampler),
        "schedule": described(options.schedule[0], schedule),
        **{key: getattr(options, key) for key in ("steps", "guidance")},
        **steered(options, CommandLine(sampler, schedule, guidance, None, None)),
    }
    times = schedule(pipeline.objective, options.steps, pipeline.manifest.plan.shape)
    guidance.check(pipeline, bool(pipeline.conditioner.keys), times)
    file = Path(pipeline.origin["checkpoint"])
    found = store.record(file)
    config = current_plain(found["config"], str(file))

    @cache  # to list a large folder takes a while
    def data_of(part: str) -> configured.Configured:
        pixels = pipeline.manifest.plan.pixels
        return configured.of_data(_data(config, file), options.trust, part, str(file), pixels)

    def pictures_of(part: str) -> DatasetPictures:
        return data_of(part).pictures

    def own(part: str, number: int | None) -> PicturesReference:
        return PicturesReference(pictures_of(part), f"its own data ({part})", number)

    chosen_by, reads = _labels(options, pipeline), pipeline.conditioner.keys
    items = None
    if chosen_by == ITEMS:
        asking = data_of(options.part or "train")
        dense = None if asking.dense is None else DenseItems.of(asking.dense, pipeline.manifest)
        items = Items(asking.pictures.dataset, reads, dense)
    trained_on = pictures_of("train").labels() if chosen_by == "proportional" else None
    labels_rule = Balanced() if items is not None else rule(chosen_by, trained_on)
    recipe = Recipe(sampler, options.steps, schedule, guidance, settings, labels_rule, items)
    pictures = Generated(pipeline, recipe, options.images or SAMPLES, options.seed)
    labels = recipe.asked if reads else None
    protocol = {
        "kind": "samples",
        "images": len(pictures),
        "first seed": options.seed,
        "labels": labels,
        "average": _average(config, options.raw),
        **settings,
    }
    words = [
        default_folder({**pipeline.origin, **settings}).name,
        *([chosen_by] if labels else []),
        str(len(pictures)),
    ]

    def held_out() -> Reference | None:
        with suppress(NoSuchPart):
            return own("validation", None)
        return None

    return Subject(
        name=str(_home(file).parent),
        kind="samples",
        pictures=pictures,
        home=_home(file),
        words=words,
        protocol=protocol,
        metrics=options.metrics or (METRICS if items is None or options.against is not None else OF_ITEMS),
        own_reference=lambda: own(options.part or "train", options.reference_images),
        own_held_out=held_out,
        training=_training(file, found),
        title="samples",
        asked=None if items is None else items.places(pictures.seeds),
    )


def _labels(options: Any, pipeline: Pipeline) -> str:
    """The rule of --labels, or the usual one of the model; ConfigError for one that it, or a metric, cannot have."""
    reads = pipeline.conditioner.keys
    found: str = options.labels or usual(reads)
    if found == ITEMS and not reads:
        raise ConfigError(f"--labels {ITEMS}: this model was trained without conditions; leave it out")
    if "retrieval" in (options.metrics or ()):
        if found != ITEMS:
            raise ConfigError(f"--metrics retrieval: samples have to be asked for by items; add --labels {ITEMS}")
        for flag in ("against", "reference_images"):
            if getattr(options, flag) is not None:
                name = flag.replace("_", "-")
                raise ConfigError(f"--metrics retrieval: searches among all items themselves; leave out --{name}")
    return found


def _reconstructions(options: Any, path: Path, device: str) -> Subject:
    codec = Codec.load(path, options.trust).to(device)
    file = Path(codec.path)
    found = store.record(file)
    config = current_plain(found["config"], str(file))
    if options.against is None:
        originals, part, _ = configured.of_data(_data(config, file), options.trust, options.part, str(file))
        name = f"its originals ({part})"
    elif is_configuration(options.against[0]):
        word, *overrides = options.against
        originals, part, _ = configured.of_file(Path(word).expanduser(), overrides, options.trust, options.part)
        name = f"{word} ({part})"
    else:
        raise ConfigError("--against: reconstructions are compared with their originals: name a configuration")
    number = min(options.images or len(originals), len(originals))
    if originals.channels != codec.in_channels:
        raise ConfigError(
            f"{name}: has pictures of {originals.channels} channels, the autoencoder reads {codec.in_channels}"
        )
    perceptual, notes = _perceptual(originals.shape, options.metrics)
    pictures = Reconstructions(codec, originals, number)
    protocol = {"kind": "reconstructions", "images": number, "part": part, "of": originals.description()["source"]}
    return Reconstructed(
        name=str(_home(file).parent),
        kind="reconstructions",
        pictures=pictures,
        home=_home(file),
        words=[f"step{found.get('step', 0)}-reconstructions", part, str(number)],
        protocol=protocol,
        metrics=options.metrics or RECONSTRUCTION,
        own_reference=lambda: PicturesReference(originals, name, number),
        training=_training(file, found),
        title="reconstructions",
        fidelity=Fidelity(codec, min(originals.shape[1:]), perceptual),
        notes=notes,
    )


def _perceptual(shape: tuple[int, int, int], metrics: Sequence[str] | None) -> tuple[dict[str, Any], list[str]]:
    """LPIPS by its name, if its weights are there and it fits; otherwise a note, or an error if it was asked for."""
    if metrics is not None and "lpips" not in metrics:
        return {}, []
    smallest = AlexNetLPIPS.TRUNK.smallest
    if shape[0] not in (1, 3) or min(shape[1:]) < smallest:
        reason = f"it compares pictures of 1 or 3 channels and {smallest} pixels or more on a side"
        if metrics is not None:
            raise ConfigError(f"--metrics lpips: {reason}; these have {shape[0]}, and {shape[1]} x {shape[2]} pixels")
        return {}, [f"LPIPS: left out: {reason}"]
    try:
        return {"LPIPS-AlexNet": AlexNetLPIPS()}, []
    except CheckpointError as error:
        if metrics is not None:
            raise
        return {}, [f"LPIPS: left out: {str(error).splitlines()[0]}"]
