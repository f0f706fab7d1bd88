"""Latent diffusion models in the names of CompVis' latent-diffusion, among them Stable Diffusion 1 and 2.

A file holds the UNet (`model.diffusion_model.`), its moving average (`model_ema.`, where it was kept), mostly the first
stage (`first_stage_model.`) and the encoder of conditions (`cond_stage_model.`), and the tables of the noise schedule.
It becomes a first stage's run and a model's, of which a transformer of texts or layouts and the projection of maps are
parts; CLIP lies in a folder of the run's.
Encoders of conditions that ldm does not have are kept as they are, in `conditioner.safetensors` of the run folder; what
they put out is then handed in ready-made (conditioners/given.py).
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from ldm.errors import ConfigError
from ldm.interop.compvis import first_stage as compvis_first_stage
from ldm.interop.compvis import text_transformer
from ldm.interop.compvis import unet as compvis_unet
from ldm.interop.compvis.conditioned import Conditioned
from ldm.interop.compvis.conditions import ENCODER, FIRST_STAGE, OTHER_ENCODERS, conditioned
from ldm.interop.compvis.description import Description, check_schedule, described, part
from ldm.interop.models import Denoiser, Family, FirstStage, Origin, Request, node, part_shapes
from ldm.interop.sources import Source
from ldm.interop.tables import Dropped, Entry, Fitted, to_ours, under

FAMILY_NAME = "CompVis latent diffusion"
NETWORK = "model.diffusion_model."
AVERAGE = "model_ema."
_LINEAGE = 4  # pixels to one of the latents in the models of small pictures, where no first stage says it
DROPPED = (
    *(
        Dropped(pattern, "the tables of the noise schedule, which are computed")
        for pattern in ("betas", "alphas_cumprod*", "sqrt_*", "log_one_minus_*", "posterior_*", "lvlb_weights")
    ),
    Dropped("scale_factor", "the scale of latents, which is in the manifest"),
    Dropped("logvar", "the training loss"),
    Dropped(f"{ENCODER}{text_transformer.UNUSED}", "the text transformer's prediction of words"),
    Dropped(f"{AVERAGE}decay", "the moving average's settings"),
    Dropped(f"{AVERAGE}num_updates", "the moving average's settings"),
)


def convert(source: Source, request: Request) -> Sequence[Denoiser]:
    """The model of a file, with its first stage if that is there.

    Raises:
        CheckpointError: tensors that do not fit.
        ConfigError: the YAML is of another model, or something is missing that tensors do not say.
    """
    network = source.part(NETWORK)
    unet = compvis_unet.architecture(network, _origin(source))
    linear = compvis_unet.is_linear(network)
    description = described(source, unet, linear=linear)
    unet |= description.heads()
    objective = description.objective()
    check_schedule(objective, source)
    scale = description.scale(source)
    first, size = _first_stage(source, request, description)
    factor = _LINEAGE if first is None else first.resolution // size
    reads = conditioned(source, request, description, unet, size, factor)
    made = node("diffusion.networks.unet.UNet", **{key: one for key, one in unet.items() if one is not None})
    by_head = not part(description.params, "unet_config").get("use_new_attention_order", False)
    table = under(compvis_unet.table(unet, linear=linear, by_head=by_head), "network.")
    raw, average = _weights(source, table, made, reads)
    state = {f"conditioner.{name}": one for name, one in reads.state.items()}
    params = {"network": made, "conditioner": reads.node, "objective": objective, "label_dropout": reads.label_dropout}
    names = [f"It has the shapes of {one.name}." for one in description.alike]
    return [
        Denoiser(
            name=source.name,
            params=params,
            weights=raw.weights | state,
            average=None if average is None else average | state,
            mean=[0.0] * unet["in_channels"],
            std=[1 / scale] * unet["in_channels"],
            size=(size, size),
            origin=Origin(FAMILY_NAME, dropped={**raw.dropped, **reads.dropped}, notes=[*names, *reads.notes]),
            first_stage=first,
            data=reads.data,
            write_files=reads.write,
        )
    ]


def _first_stage(source: Source, request: Request, description: Description) -> tuple[FirstStage | None, int]:
    """The first stage, and the side of its latents."""
    tensors = source.part(FIRST_STAGE)
    if tensors:
        if request.autoencoder is not None:
            raise ConfigError(f"{source.path}: holds its first stage; leave out --autoencoder")
        first = compvis_first_stage.first_stage(tensors, source, request)
        factor = 2 ** (len(first.params["encoder"]["params"]["channel_mult"]) - 1)
        if request.resolution is not None:
            if request.resolution % factor:
                raise ConfigError(f"--resolution: expected a multiple of {factor}, found {request.resolution}")
            return first, request.resolution // factor
    size = description.image_size()
    if size is None:
        raise ConfigError(
            f"{source.path}: model.params.image_size: nothing says how large its latents are; name the YAML that "
            f"belongs to the model: --config FILE" + (", or give --resolution PIXELS" if tensors else "")
        )
    return (replace(first, resolution=size * factor) if tensors else None), size


def _weights(
    source: Source, table: Sequence[Entry], made: Mapping[str, Any], reads: Conditioned
) -> tuple[Fitted, dict[str, Tensor] | None]:
    """The weights of the last step, and their moving average; None if the file has no average.

    The average's names are the raw names without their dots. Such a name does not show where the dots were, so
    each is derived from its raw name. The conditioner has no average of its own.
    """
    origin = _origin(source)
    elsewhere = (FIRST_STAGE, ENCODER, AVERAGE, *OTHER_ENCODERS)
    tensors = {name: one for name, one in source.tensors.items() if not name.startswith(elsewhere)}
    of_reads = under(reads.table, "conditioner.", ENCODER)
    tensors |= {name: one for name, one in source.tensors.items() if of_reads and name.startswith(ENCODER)}
    network = part_shapes({"network": made})
    wanted = network | {f"conditioner.{name}": shape for name, shape in reads.shapes.items()}
    raw = to_ours([*under(table, "", NETWORK), *of_reads], tensors, wanted, origin, DROPPED)

    averaged = {name: one for name, one in source.tensors.items() if name.startswith(AVERAGE)}
    flat = [replace(one, theirs=tuple(map(average_name, one.theirs))) for one in table]
    settings = {name for name in averaged if any(one.covers(name) for one in DROPPED)}
    raw.dropped.update(dict.fromkeys(["the moving average's settings"], len(settings)) if settings else {})
    if settings == averaged.keys():
        return raw, None
    fitted = to_ours(flat, averaged, network, f"{origin}, its moving average", DROPPED)
    return raw, raw.weights | fitted.weights


def average_name(name: str) -> str:
    """Of a parameter of the UNet in LitEma: the raw name without its dots."""
    return AVERAGE + f"{NETWORK.removeprefix('model.')}{name}".replace(".", "")


def _origin(source: Source) -> str:
    return f"{source.path} ({FAMILY_NAME})"


FAMILY = Family(
    name=FAMILY_NAME,
    marks=(
        (f"{NETWORK}input_blocks.0.0.weight", f"{NETWORK}middle_block.0.in_layers.0.weight", f"{NETWORK}out.2.weight"),
    ),
    convert=convert,
    takes=("autoencoder", "resolution", "text_encoder"),
)
