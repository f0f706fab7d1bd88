"""Folders of `ldm export --to safetensors` (export_safetensors.py): our own models come back bit for bit."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ldm.config.tree import current_plain
from ldm.errors import CheckpointError
from ldm.interop.models import Converted, Denoiser, Family, FirstStage, Origin, Request, node, shapes
from ldm.interop.sources import Source
from ldm.interop.tables import Entry, to_ours

AUTOENCODER, DIFFUSION = "ldm.AutoencoderKL", "ldm.LatentDiffusion"
"""`_class_name` of the folder's config.json."""
FORMAT = 1


def convert(source: Source, request: Request) -> Sequence[Converted]:
    """The autoencoder, or the diffusion model with the one that it came with."""
    facts = _facts(source)
    used = _used(facts)
    parts = to_ours(
        [Entry(name, (name,)) for name in used], source.tensors, used, f"{source.path} (ldm {facts['_class_name']})"
    ).weights
    origin = _origin(facts)
    own = facts["autoencoder"]
    first_stage = _first_stage(facts, parts, request, origin) if own is not None and own["parts"] else None
    if facts["_class_name"] == AUTOENCODER:
        assert first_stage is not None
        return [first_stage]
    latents, model = facts["latents"], facts["model"]
    denoiser = Denoiser(
        name=facts["name"],
        params=model,
        weights={key: one for key, one in parts.items() if key.startswith(("network.", "conditioner."))},
        average=None,
        mean=latents["mean"],
        std=latents["std"],
        size=tuple(latents["plan"]["shape"][1:]),
        origin=origin,
        first_stage=first_stage,
        pixels=own is None,
        latents=latents,
        objective=_part(parts, "objective"),
    )
    return [denoiser]


def _facts(source: Source) -> dict[str, Any]:
    facts = current_plain(dict(source.config), str(source.path / "config.json"))
    if facts.get("format") != FORMAT:
        raise CheckpointError(
            f"{source.path / 'config.json'}: format: expected {FORMAT}, found {facts.get('format')!r}: it was written "
            f"by another version of ldm"
        )
    wanted = {"name", "autoencoder", "license"} | ({"model", "latents"} if facts["_class_name"] == DIFFUSION else set())
    if missing := sorted(wanted - facts.keys()):
        raise CheckpointError(f"{source.path / 'config.json'}: expected the keys {', '.join(missing)}; get it again")
    return facts


def _used(facts: Mapping[str, Any]) -> dict[str, torch.Size]:
    """{name: shape} of every tensor of the model."""
    nodes = {f"autoencoder.{name}": made for name, made in (facts["autoencoder"] or {}).get("parts", {}).items()}
    if "model" in facts:
        nodes |= {name: facts["model"][name] for name in ("network", "conditioner", "objective")}
    return {f"{part}.{name}": shape for part, made in nodes.items() for name, shape in shapes(made).items()}


def _first_stage(facts: Mapping[str, Any], parts: Mapping[str, Tensor], request: Request, origin: Origin) -> FirstStage:
    own = facts["autoencoder"]
    loss = {"loss": node("autoencoder.losses.AutoencoderLoss", kl_weight=1e-6, learn_logvar=False)}
    weights = _part(parts, "autoencoder") | {"loss.logvar": torch.zeros(())}
    resolution = request.resolution or own["resolution"] or 256
    return FirstStage(facts["name"], own["parts"] | loss, weights, resolution, origin, own["statistics"])


def _part(parts: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key.removeprefix(f"{name}."): one for key, one in parts.items() if key.startswith(f"{name}.")}


def _origin(facts: Mapping[str, Any]) -> Origin:
    before = facts.get("origin")
    notes = [f"exported at step {facts.get('step')}, weights: {facts.get('weights')}"]
    notes += [f"before that: {before['family']}, {before['source']}"] if before else []
    return Origin("ldm export", license=facts["license"], notes=notes)


FAMILY = Family(
    name="ldm export",
    marks=((f"class {AUTOENCODER}",), (f"class {DIFFUSION}",)),
    convert=convert,
    takes=("autoencoder", "resolution"),
)
