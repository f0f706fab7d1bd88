"""Folders of `ldm export --to safetensors` (safetensors_format.py): our own models come back bit for bit."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ldm.config.load import build
from ldm.config.tree import current_plain
from ldm.diffusion.conditioners.pictures import PictureEncoder
from ldm.diffusion.conditioners.text import FrozenText, TextEncoder
from ldm.errors import CheckpointError, ConfigError
from ldm.interop.models import Converted, Denoiser, Family, FirstStage, Origin, Request, node, part_shapes
from ldm.interop.sources import Source
from ldm.interop.tables import Entry, to_ours

AUTOENCODER, DIFFUSION = "ldm.AutoencoderKL", "ldm.LatentDiffusion"
"""`_class_name` of the folder's config.json."""
FORMAT = 1


@dataclass(frozen=True)
class Elsewhere:
    """Trained encoders that a model reads and that are not exported: where they lie is named where it comes in.

    Attributes:
        kinds: the classes whose parameter `encoder` is their folder.
        request: what names the folder, as in Request.
        reading: what they read, for messages.
        what: they are, for messages.
    """

    kinds: tuple[type, ...]
    request: str
    reading: str
    what: str

    @property
    def flag(self) -> str:
        """Of `ldm convert`."""
        return f"--{self.request.replace('_', '-')}"

    def among(self, tree: Any) -> Iterator[dict[str, Any]]:
        """The parameters of each of them among nodes."""
        if isinstance(tree, dict):
            if tree.get("target") in [f"{kind.__module__}.{kind.__qualname__}" for kind in self.kinds]:
                yield tree["params"]
            tree = [*tree.values()]
        for one in tree if isinstance(tree, list) else ():
            yield from self.among(one)


ELSEWHERE = (
    Elsewhere((FrozenText, TextEncoder), "text_encoder", "captions", "text encoder"),
    Elsewhere((PictureEncoder,), "picture_encoder", "pictures", "vision model"),
)


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
        randomness=facts.get("randomness", {}),
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


def _check_request(source: Source, facts: Mapping[str, Any], request: Request) -> None:
    """ConfigError unless what lies outside of the folder is named, and nothing that lies in it; places the first."""
    for one in ELSEWHERE:
        found, given = [*one.among(facts.get("model"))], getattr(request, one.request)
        if found and given is None:
            raise ConfigError(
                f"{source.path}: its {one.reading} are read by a {one.what}, which is not in it. Name the folder of "
                f"the one that it was trained with: {one.flag} DIR"
            )
        if given is not None and not found:
            raise ConfigError(f"{source.path}: reads no {one.reading}; leave out {one.flag}")
        for params in found:
            params["encoder"] = str(given)
    if request.autoencoder is not None and (facts["autoencoder"] or {}).get("parts"):
        raise ConfigError(f"{source.path}: holds its first stage; leave out --autoencoder")


def _parts(source: Source, facts: Mapping[str, Any]) -> dict[str, Tensor]:
    """Every tensor of the model, strictly, and the hashes of encoders that lie elsewhere.

    Raises:
        CheckpointError: they do not fit, or one is another encoder.
    """
    wanted = _used(facts)
    hashes = {name: one for name, one in source.tensors.items() if name in wanted and _is_hash(name, one)}
    tensors = {name: one for name, one in source.tensors.items() if name not in hashes}
    used = {name: shape for name, shape in wanted.items() if name not in hashes}
    origin = f"{source.path} (ldm {facts['_class_name']})"
    parts = {**to_ours([Entry(name, (name,)) for name in used], tensors, used, origin).weights, **hashes}
    if hashes:  # compared with those of the encoders that are there
        conditioner: nn.Module = build(facts["model"]["conditioner"])
        conditioner.load_state_dict(_part(parts, "conditioner"))
    return parts


def _is_hash(name: str, tensor: Tensor) -> bool:
    """Of an encoder that lies elsewhere (ldm/diffusion/conditioners/frozen.py)."""
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
    takes=("autoencoder", "resolution", *(one.request for one in ELSEWHERE)),
)
