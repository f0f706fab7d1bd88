"""Samples of a stage-2 run as `ldm evaluate` measures them."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from ldm.autoencoder.metrics import SMALLEST_FOR_SSIM
from ldm.checkpoints import store
from ldm.cli import evaluate_judges, evaluate_run
from ldm.cli.devices import Precision
from ldm.cli.evaluate_options import check_metrics
from ldm.cli.sample import Recipe as CommandLine
from ldm.cli.sample import named_functions, steered, steering
from ldm.cli.sample_options import described
from ldm.config.tree import current_plain
from ldm.errors import ConfigError
from ldm.evaluation.features.judge_file import KINDS
from ldm.evaluation.followed import JUDGED, Measure, measures_of, metrics_of, task_of
from ldm.evaluation.measure import METRICS, OF_ITEMS
from ldm.evaluation.pictures import configured
from ldm.evaluation.pictures.configured import NoSuchPart
from ldm.evaluation.pictures.items import Items
from ldm.evaluation.pictures.labels import ITEMS, rule, usual
from ldm.evaluation.pictures.made import Generated, Recipe
from ldm.evaluation.reference import PicturesReference, Reference
from ldm.evaluation.subject import Asked, Subject
from ldm.latents.asked import DenseItems
from ldm.sampling.pipeline import Pipeline
from ldm.sampling.sample_folder import default_folder

SAMPLES = 10_000
"""So many are made where nothing is said: enough to rank models, a fifth of what published tables have."""


def samples(options: Any, path: Path, device: str) -> Subject:
    """What the command line asks to measure of a stage-2 run; everything is loaded, nothing computed.

    Raises:
        LdmError: it cannot be measured.
    """
    precision = Precision.of(options, device)
    pipeline = Pipeline.load(
        path,
        ema=not options.raw,
        autoencoder=options.autoencoder,
        device=device,
        trust=options.trust,
        compute=precision.compute,
    )
    sampling = _sampling(options, pipeline, device, precision)
    data, reads, chosen_by = _OwnData(options, pipeline), pipeline.conditioner.keys, _labels(options, pipeline)
    recipe = _asked_for(options, pipeline, sampling, data, chosen_by)
    pictures = Generated(pipeline, recipe, options.images or SAMPLES, options.seed)
    labels, of_task = recipe.asked if reads else None, metrics_of(reads)
    # Items that a model was not trained on ask for samples, and these are compared with what it was trained on.
    part = "train" if of_task else options.part or "train"
    metrics = _metrics(options, reads, recipe.items is not None and options.part in (None, part))
    kind: Callable[..., Subject] = Subject
    judges = evaluate_judges.judges(options, pictures, device)
    if of_task:
        measures, notes = _measures(options, pictures, judges, device)
        kind = partial(Asked, task=task_of(reads), measures=measures, notes=notes)
    home = evaluate_run.home(data.file)
    return kind(
        name=str(home.parent),
        kind="samples",
        pictures=pictures,
        home=home,
        words=[
            default_folder({**pipeline.origin, **recipe.settings}).name,
            *([chosen_by] if labels else []),
            str(len(pictures)),
        ],
        protocol={
            "kind": "samples",
            "images": len(pictures),
            "first seed": options.seed,
            "labels": labels,
            "average": _average(data.config, options.raw),
            **recipe.settings,
            **({"judges": {key: one.judge.weights for key, one in judges.items()}} if judges else {}),
        },
        metrics=metrics,
        own_reference=lambda: data.reference(part, options.reference_images),
        own_held_out=data.held_out if part == "train" else None,
        training=evaluate_run.training(data.file, data.record),
        title="samples",
        asked=recipe.items.places(pictures.seeds) if recipe.items is not None and "retrieval" in metrics else None,
    )


def _sampling(options: Any, pipeline: Pipeline, device: str, precision: Precision) -> Recipe:
    """How samples are made; what they are asked for by is not said yet."""
    sampler, schedule = named_functions(options)
    guidance, _, _ = steering(pipeline, options, device)
    settings = {
        **{key: value for key, value in pipeline.origin.items() if key in ("weights", "autoencoder")},
        "sampler": described(options.sampler[0], sampler),
        "schedule": described(options.schedule[0], schedule),
        **{key: getattr(options, key) for key in ("steps", "guidance")},
        **steered(options, CommandLine(sampler, schedule, guidance, None, None)),
        **precision.settings,
    }
    times = schedule(pipeline.objective, options.steps, pipeline.manifest.plan.shape)
    guidance.check(pipeline, bool(pipeline.conditioner.keys), times)
    return Recipe(sampler, options.steps, schedule, guidance, settings)


class _OwnData:
    """What a run was trained on, part by part."""

    def __init__(self, options: Any, pipeline: Pipeline) -> None:
        self.file = Path(pipeline.origin["checkpoint"])
        self.record = store.record(self.file)
        self.config: Mapping[str, Any] = current_plain(self.record["config"], str(self.file))
        self.part = cache(self._part)  # to list a large folder takes a while
        self._trust, self._pixels = options.trust, pipeline.manifest.plan.pixels

    def _part(self, part: str) -> configured.Configured:
        section = evaluate_run.data(self.config, self.file)
        return configured.of_data(section, self._trust, part, str(self.file), self._pixels)

    def reference(self, part: str, number: int | None = None) -> PicturesReference:
        return PicturesReference(self.part(part).pictures, f"its own data ({part})", number)

    def held_out(self) -> Reference | None:
        with suppress(NoSuchPart):
            return self.reference("validation")
        return None


def _asked_for(options: Any, pipeline: Pipeline, sampling: Recipe, data: _OwnData, chosen_by: str) -> Recipe:
    """The recipe with the items, or the rule, that samples are asked for by."""
    if chosen_by == ITEMS:
        asking = data.part(options.part or "train")
        dense = None if asking.dense is None else DenseItems.of(asking.dense, pipeline.manifest)
        return replace(sampling, items=Items(asking.pictures.dataset, pipeline.conditioner.keys, dense))
    trained_on = data.part("train").pictures.labels() if chosen_by == "proportional" else None
    return replace(sampling, labels=rule(chosen_by, trained_on))


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


def _metrics(options: Any, reads: Sequence[str], by_own_items: bool) -> Sequence[str]:
    """Those that are asked for, or all that samples of the model have; ConfigError for others.

    Args:
        reads: the keys that the model reads.
        by_own_items: whether samples are asked for by the items that they are compared with.
    """
    of_task = metrics_of(reads)
    if options.metrics is None:
        return (*(OF_ITEMS if by_own_items and options.against is None else METRICS), *of_task)
    what = f"samples of a model that reads {', '.join(reads)}" if of_task else "samples"
    check_metrics(options.metrics, what, (*OF_ITEMS, *of_task))
    if "retrieval" in options.metrics and not by_own_items:
        raise ConfigError("--metrics retrieval: searches among the training pictures; leave out --part validation")
    metrics: Sequence[str] = options.metrics
    return metrics


def _measures(
    options: Any, pictures: Generated, judges: Mapping[str, Measure], device: str
) -> tuple[list[Measure], list[str]]:
    """How samples and what they were asked by are measured, and notes on what is left out.

    Args:
        judges: by the key of a condition that they look for, of `JUDGED`.
    """
    reads, size = pictures.pipeline.conditioner.keys, min(pictures.shape[1:])
    metrics = [name for name in metrics_of(reads) if options.metrics is None or name in options.metrics]
    networks, notes = evaluate_run.perceptual(pictures.shape, metrics if options.metrics else None)
    reasons = {key: KINDS[key].wanted for key in JUDGED if key not in judges}
    if size < SMALLEST_FOR_SSIM:
        reasons["ssim"] = f"it needs pictures of {SMALLEST_FOR_SSIM} pixels or more on a side, and these have {size}"
    for name in metrics:
        if name in reasons:
            if options.metrics is not None:
                raise ConfigError(f"--metrics {name}: {reasons[name]}")
            notes.append(f"{name}: left out: {reasons[name]}")
    taken = [name for name in metrics if name not in reasons and (name != "lpips" or networks)]
    asking = pictures.recipe.items
    return measures_of(reads, taken, networks, judges, device, None if asking is None else len(asking)), notes


def _average(config: Mapping[str, Any], raw: bool) -> Any:
    """The averaged weights' profile, as the configuration has it; None: the raw ones."""
    return None if raw else (config["model"]["params"].get("ema") or {}).get("params", {}).get("profile")
