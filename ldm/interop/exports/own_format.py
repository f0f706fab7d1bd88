"""Folders of `ldm export --to safetensors` (safetensors_format.py): our own models come back bit for bit."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ldm.config.load import build
from ldm.config.tree import current_plain
from ldm.diffusion.conditioners.text import FrozenText, TextEncoder
from ldm.errors import CheckpointError, ConfigError
from ldm.interop.models import Converted, Denoiser, Family, FirstStage, Origin, Request, node, part_shapes
from ldm.interop.sources import Source
from ldm.interop.tables import Entry, to_ours

AUTOENCODER, DIFFUSION = "ldm.AutoencoderKL", "ldm.LatentDiffusion"
"""`_class_name` of the folder's config.json."""
FORMAT = 1
_TEXT = [f"{kind.__module__}.{kind.__qualname__}" for kind in (FrozenText, TextEncoder)]


def convert(source: Source, request: Request) -> Sequence[Converted]:
    """The autoencoder, or the diffusion model with the one that it came with."""
    facts = _facts(source)
    _check_request(source, facts, request)
    parts = _parts(source, facts)
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


def text_encoders(tree: Any) -> Iterator[dict[str, Any]]:
    """The parameters of each FrozenText and TextEncoder among nodes; the folder `encoder` is not exported."""
    if isinstance(tree, dict):
        if tree.get("target") in _TEXT:
            yield tree["params"]
        tree = [*tree.values()]
    for one in tree if isinstance(tree, list) else ():
        yield from text_encoders(one)


def _check_request(source: Source, facts: Mapping[str, Any], request: Request) -> None:
    """ConfigError unless what lies outside of the folder is named, and nothing that lies in it; places the first."""
    texts = [*text_encoders(facts.get("model"))]
    if texts and request.text_encoder is None:
        raise ConfigError(
            f"{source.path}: its captions are read by a text encoder, which is not in it. Name the folder of the one "
            f"that it was trained with: --text-encoder DIR"
        )
    if request.text_encoder is not None and not texts:
        raise ConfigError(f"{source.path}: reads no captions; leave out --text-encoder")
    if request.autoencoder is not None and (facts["autoencoder"] or {}).get("parts"):
        raise ConfigError(f"{source.path}: holds its first stage; leave out --autoencoder")
    for params in texts:
        params["encoder"] = str(request.text_encoder)


def _parts(source: Source, facts: Mapping[str, Any]) -> dict[str, Tensor]:
    """Every tensor of the model, strictly, and the hash of its text encoder, if it has one.

    Raises:
        CheckpointError: they do not fit, or it is another text encoder.
    """
    wanted = _used(facts)
    hashes = {name: one for name, one in source.tensors.items() if name in wanted and _is_hash(name, one)}
    tensors = {name: one for name, one in source.tensors.items() if name not in hashes}
    used = {name: shape for name, shape in wanted.items() if name not in hashes}
    origin = f"{source.path} (ldm {facts['_class_name']})"
    parts = {**to_ours([Entry(name, (name,)) for name in used], tensors, used, origin).weights, **hashes}
    if hashes:  # compared with that of the encoder that is there
        conditioner: nn.Module = build(facts["model"]["conditioner"])
        conditioner.load_state_dict(_part(parts, "conditioner"))
    return parts


def _is_hash(name: str, tensor: Tensor) -> bool:
    """Of a text encoder (ldm/diffusion/conditioners/text.py), the only extra state of a part of a model."""
    return name.startswith("conditioner.") and name.endswith("_extra_state") and tensor.dtype == torch.uint8


def _used(facts: Mapping[str, Any]) -> dict[str, torch.Size]:
    """{name: shape} of every tensor of the model."""
    nodes = {f"autoencoder.{name}": made for name, made in (facts["autoencoder"] or {}).get("parts", {}).items()}
    if "model" in facts:
        nodes |= {name: facts["model"][name] for name in ("network", "conditioner", "objective")}
    return part_shapes(nodes)


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
    takes=("autoencoder", "resolution", "text_encoder"),
)
