"""The model card, README.md: what a run says of itself. What it does not say is called unknown."""

import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ldm import files
from ldm.interop.exports.trained import Trained
from ldm.interop.exports.usage import Choices, Usage
from ldm.runtime.versions import versions

NAME = "README.md"
UNKNOWN = "unknown"
_SIGNATURE = "This card was written from the run by `ldm export`; what that does not say is unknown."
PICTURES = "pictures"
"""The folder for sheets beside the card."""
_SHEETS = 3
"""Sheets of a run that are copied, of each of its kinds the newest."""

# What the pictures of our own data sources are, and their license.
_SOURCES = {
    "ldm.data.sources.openmoji.OpenMoji": ("OpenMoji, designed by OpenMoji (https://openmoji.org)", "CC BY-SA 4.0"),
    "ldm.data.sources.fluent_emoji.FluentEmoji": ("Fluent Emoji 3D by Microsoft", "MIT"),
    "ldm.data.sources.arrays.FashionMNIST": ("Fashion-MNIST by Zalando SE", "MIT"),
}
# Those of the hub's names for licenses that weights and pictures are commonly under; any other is `other` there.
_LICENSES = (
    *("apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "cc0-1.0", "gpl-3.0", "agpl-3.0", "mpl-2.0", "unlicense"),
    *("cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nd-4.0", "cc-by-nc-sa-4.0", "cc-by-nc-nd-4.0"),
    *("openrail", "openrail++", "creativeml-openrail-m", "bigscience-openrail-m", UNKNOWN),
)


def write(model: Trained, choices: Choices, usage: Usage, out: Path) -> None:
    """Write `README.md` and, if they are wanted, the sheets that it shows."""
    from huggingface_hub import ModelCard, ModelCardData

    records = evaluations(model)
    shown = _copied(model, records, out) if choices.pictures else []
    results = _results(model, records)
    data = ModelCardData(
        **_license(model.license(choices)),
        library_name=usage.library,
        pipeline_tag=_task(model),
        tags=["ldm", "autoencoder"] if model.diffusion is None else ["ldm", "latent-diffusion"],
        model_name=model.run.name if results else None,
        eval_results=results or None,
    )
    text = "\n\n".join(part for part in _parts(model, choices, usage, records, shown) if part)
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}\n")
    files.write_text(out / NAME, str(card))


def written_by_us(folder: Path) -> bool:
    """Whether a folder has such a card."""
    with suppress(OSError, ValueError):
        return _SIGNATURE in (folder / NAME).read_text(encoding="utf-8")
    return False


def evaluations(model: Trained) -> list[dict[str, Any]]:
    """The records of `ldm evaluate` that are of this checkpoint and these weights, the newest last."""
    found = []
    for file in sorted((model.run.path / "evaluation").glob("*.json")):
        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):  # of another program
            record = json.loads(file.read_text())
            same = record["subject"]["training"]["step"] == model.record.get("step")
            weights = record["protocol"].get("weights", "raw")  # a reconstruction's are the only ones
            if same and weights == model.weights and record["values"]:
                found.append(record)
    return sorted(found, key=lambda record: str(record.get("date", "")))


def _parts(
    model: Trained, choices: Choices, usage: Usage, records: Sequence[Mapping[str, Any]], shown: Sequence[str]
) -> Iterator[str]:
    what = "An autoencoder, the first stage of latent diffusion" if model.diffusion is None else "A diffusion model"
    yield f"# {model.run.name}"
    made = "converted for" if model.record.get("origin") and not model.record.get("step") else "trained with"
    yield f"{what}, {made} ldm. {_SIGNATURE}"
    yield f"## Model\n\n{_table(_model(model))}"
    yield f"## Data\n\n{_table(_data(model, choices))}"
    yield f"## Training\n\n{_table(_training(model))}"
    yield f"## Evaluation\n\n{_evaluation(records)}"
    if shown:
        pictures = "\n\n".join(f"![{Path(name).stem}]({name})" for name in shown)
        yield f"## Pictures\n\nMade in training and evaluation, not chosen.\n\n{pictures}"
    yield f"## How to load it\n\n{usage.text}"
    yield f"## License\n\n{_table(_licenses(model, choices))}"
    yield f"## Versions\n\n{_table(_versions(model))}"


def _model(model: Trained) -> dict[str, str]:
    rows = {}
    for part, module in model.modules.items():
        count = sum(parameter.numel() for parameter in module.parameters())
        own = model.params[part]["target"] if part in model.params else ", ".join(_targets(model.codec.config))
        rows[part] = f"`{own or 'none: the latents are the pictures'}`, {count:,} parameters"
    codec = model.codec
    if codec.size is not None:
        rows["pictures"] = f"{codec.size[0]} x {codec.size[1]} pixels, {codec.in_channels} channels"
    rows["latents"] = f"{codec.latent_channels} channels, 1 / {codec.down_factor} of each side"
    if model.diffusion is not None:
        plan = model.diffusion.manifest.plan
        rows["latents"] = " x ".join(map(str, plan.shape)) + " (channels, height, width)"
        if plan.num_classes:
            rows["classes"] = f"{plan.num_classes}: {', '.join((plan.class_names or [UNKNOWN])[:50])}"
        rows["weights"] = {"ema": "the moving average", "raw": "those of the last step"}[model.weights]
    return rows


def _targets(config: Mapping[str, Any]) -> list[str]:
    nodes = [config] if "target" in config else config.values()
    return [str(made["target"]) for made in nodes if isinstance(made, Mapping) and "target" in made]


def _data(model: Trained, choices: Choices) -> dict[str, str]:
    if model.record.get("origin") and not model.record.get("step"):  # the run's own data is a place to train it on
        return {"source": f"{UNKNOWN}: the weights were converted", "license": choices.data_license or UNKNOWN}
    target = str(((model.config.get("data") or {}).get("params") or {}).get("train", {}).get("target", UNKNOWN))
    name, license = _SOURCES.get(target, (UNKNOWN, UNKNOWN))
    pictures = (model.record.get("data") or {}).get("num_items")
    return {
        "source": f"{name} (read by `{target}`)",
        "license": choices.data_license or license,
        "training pictures": f"{pictures:,}" if pictures else UNKNOWN,
    }


def _training(model: Trained) -> dict[str, str]:
    record, params = model.record, model.params
    batch = (record.get("data") or {}).get("batch_size")
    images = record.get("images_seen") or (record["step"] * batch if batch and "step" in record else None)
    trainer = (model.config.get("lightning") or {}).get("trainer") or {}
    rows = {
        "steps": f"{record['step']:,}" if "step" in record else UNKNOWN,
        "images seen": f"{images:,}" if images else UNKNOWN,
        "batch": f"{batch:,}" if batch else UNKNOWN,
        "hours": f"{model.hours:.2g}" if model.hours else UNKNOWN,
        "optimizer": f"`{(params.get('optimizer') or {}).get('target', UNKNOWN)}`",
        "precision": str(trainer.get("precision", UNKNOWN)),
    }
    if origin := record.get("origin"):
        rows["converted from"] = f"{origin['source']} ({origin['family']}); these figures are of what followed"
    return rows


def _evaluation(records: Sequence[Mapping[str, Any]]) -> str:
    if not records:
        return "Not measured: there is no record of `ldm evaluate` for this checkpoint."
    lines = ["| metric | value | error | features | against | pictures |", "|---|---|---|---|---|---|"]
    for record in records:
        for one in record["values"]:
            error = UNKNOWN if one.get("error") is None else f"{one['error']:.2g}"
            cells = (one["metric"], f"{one['value']:.4g}", error, one.get("features") or "", _against(record))
            lines.append(f"| {' | '.join(cells)} | {record['protocol'].get('images', UNKNOWN)} |")
    for record in records:
        settings = {key: record["protocol"].get(key) for key in ("kind", "sampler", "steps", "schedule", "guidance")}
        said = ", ".join(f"{key} {value}" for key, value in settings.items() if value is not None)
        lines.append(f"\nMeasured {record.get('date') or UNKNOWN}: {said}.")
    return "\n".join(lines)


def _against(record: Mapping[str, Any]) -> str:
    """The reference's name, without the folders of the machine."""
    return Path(str((record["protocol"].get("reference") or {}).get("name", UNKNOWN))).name


def _results(model: Trained, records: Sequence[Mapping[str, Any]]) -> list[Any]:
    from huggingface_hub import EvalResult

    return [
        EvalResult(
            task_type=_task(model) or "image-to-image",
            dataset_type="images",
            dataset_name=_against(record),
            metric_type=str(one["metric"]).lower(),
            metric_name=one["metric"],
            metric_value=one["value"],
        )
        for record in records
        for one in record["values"]
    ]


def _licenses(model: Trained, choices: Choices) -> dict[str, str]:
    rows = {"weights": model.license(choices), "data": _data(model, choices)["license"]}
    if model.diffusion is not None and (origin := model.codec_record().get("origin")):
        rows["autoencoder"] = f"{origin['license']} (converted from {origin['source']}, {origin['family']})"
    return rows


def _versions(model: Trained) -> dict[str, str]:
    trained, now = model.record.get("versions") or {}, versions()
    return {
        name: f"{trained.get(name, UNKNOWN)} in training, {now.get(name, UNKNOWN)} for this export"
        for name in {**now, **trained}
    }


def _license(text: str) -> dict[str, Any]:
    """The front matter's keys: the hub takes its own names for licenses alone, and others under a name."""
    known = re.sub(r"[\s_]+", "-", text.strip().lower())
    return {"license": known} if known in _LICENSES else {"license": "other", "license_name": known}


def _task(model: Trained) -> str | None:
    """What the hub calls what the model does; None: it has no name for it."""
    if model.diffusion is None:
        return None
    keys = getattr(model.diffusion.denoiser["conditioner"], "keys", ())
    return "text-to-image" if "caption" in keys else "unconditional-image-generation"


def _copied(model: Trained, records: Sequence[Mapping[str, Any]], out: Path) -> list[str]:
    """Sheets of the run up to this checkpoint and of its evaluations, copied; their names, from the card on."""
    newest: dict[str, Path] = {}
    for file in sorted(model.run.images.glob("val/*.png")) or sorted(model.run.images.glob("train/*.png")):
        found = re.fullmatch(r"(.+)_(\d{8})", file.stem)
        if found and int(found[2]) <= int(model.record.get("step", 0)):
            newest[found[1]] = file
    sheets = [*newest.values()][:_SHEETS]
    measured = (record.get("sheets", {}).get("pictures") for record in records)
    sheets += [model.run.path / "evaluation" / Path(str(name)).name for name in measured if name]
    sheets = [sheet for sheet in sheets if sheet.is_file()]
    if sheets:
        (out / PICTURES).mkdir()
    return [str(Path(shutil.copy(sheet, out / PICTURES)).relative_to(out)) for sheet in sheets]


def _table(rows: Mapping[str, str]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {_cell(value)} |" for name, value in rows.items())])


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
