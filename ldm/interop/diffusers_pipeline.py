"""A model as a folder that diffusers loads and that makes the same pictures of the same noise: `--to diffusers`.

    FOLDER/model_index.json           the pipeline's class, and that of each part
    FOLDER/unet/ or transformer/      the denoiser; beside it scheduler/, vae/ or vqvae/, text_encoder/, tokenizer/
    FOLDER/pipeline.py                where no pipeline of the library is exact: carried_pipeline.py

A first stage alone is one model of the library: config.json and its weights.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm import files
from ldm.autoencoder.codec import Codec
from ldm.interop import diffusers_autoencoder
from ldm.interop.diffusers_check import check_first_stage, check_pipeline
from ldm.interop.diffusers_conditions import Conditions, as_layer, conditions, encoder_and_tokenizer
from ldm.interop.diffusers_config import Exported
from ldm.interop.diffusers_networks import exported as exported_network
from ldm.interop.diffusers_schedulers import Scheduler, scheduler_of
from ldm.interop.trained import Diffusion, Trained
from ldm.interop.usage import Choices, Usage, optional_packages
from ldm.latents.manifest import Manifest
from ldm.sizes import as_resolution

WHERE = "--to diffusers"
CARRIED = Path(__file__).with_name("carried_pipeline.py")


@dataclass(frozen=True)
class Plan:
    """What a folder holds.

    Attributes:
        pipeline: class of the library; None: ours, which the folder carries.
        network, scheduler, first_stage: models of the library; of a model of pixels there is no first stage.
        conditions: what the denoiser is conditioned on.
        settings: of our pipeline.
    """

    pipeline: str | None
    network: Exported
    scheduler: Scheduler
    first_stage: Exported | None
    conditions: Conditions
    settings: Mapping[str, Any]


def write(model: Trained, out: Path, choices: Choices) -> Usage:
    """The folder, which is then loaded and compared with the model, unless that is switched off.

    Raises:
        ConfigError: the library, or a counterpart in it, is missing.
        NumericError: the folder does not make the pictures that the model makes.
    """
    with optional_packages(WHERE):
        import diffusers  # noqa: F401
        import transformers  # noqa: F401
    if model.diffusion is None:
        made = _first_stage(model.codec, model.codec.statistics)
        loaded(made).save_pretrained(out)
        if choices.check:
            check_first_stage(model.codec, made.class_name, out)
        return Usage("diffusers", "\n".join([_FIRST_STAGE.format(name=made.class_name), _compared(choices)]))
    plan = planned(model.codec, model.diffusion, model.params)
    _save(plan, out)
    if choices.check:
        check_pipeline(model.codec, model.diffusion, out)
    return Usage("diffusers", "\n".join([*_notes(plan), _compared(choices)]))


def planned(codec: Codec, diffusion: Diffusion, params: Mapping[str, Any]) -> Plan:
    """What becomes of each part, and which pipeline samples it exactly; ConfigError: a part has no counterpart.

    Args:
        params: of the model: nodes of its parts.
    """
    manifest, denoiser = diffusion.manifest, diffusion.denoiser
    scheduler = scheduler_of(diffusion.objective)
    given = conditions(denoiser["conditioner"], denoiser["network"])
    made = _network(params["network"], denoiser["network"].state_dict(), given, manifest)
    pipeline = _of_library(made, scheduler, given, codec, manifest)
    scale = {"mean": manifest.mean, "std": manifest.std}
    if not codec.config:
        first_stage = None
    elif pipeline is not None and not _is_scaled_alike(manifest):
        first_stage = _first_stage(codec, None, _folded(codec.state_dict(), manifest))
    elif codec.quantizer is not None and not _is_scaled_alike(manifest):
        first_stage = _first_stage(codec, None)
    else:
        first_stage = _first_stage(codec, scale)
    settings = {
        "latents_mean": [*manifest.mean],
        "latents_std": [*manifest.std],
        "timestep_scale": scheduler.timestep_scale,
        "num_classes": given.num_classes,
        "class_tokens": given.tokens is not None,
        "class_names": manifest.plan.class_names,
        "max_length": None if given.text is None else given.text.max_length,
    }
    return Plan(pipeline, made, scheduler, first_stage, given, settings)


def _network(node: Mapping[str, Any], weights: Mapping[str, Tensor], given: Conditions, manifest: Manifest) -> Exported:
    _, height, width = manifest.plan.shape
    made = exported_network(node, weights, given.vectors, as_resolution((height, width)), WHERE)
    if given.tokens is None:
        return made
    config, tensors = as_layer(given.tokens)
    return Exported(made.class_name, {**made.config, **config}, {**made.tensors, **tensors})


def _first_stage(
    codec: Codec, scale: Mapping[str, Any] | None, weights: Mapping[str, Tensor] | None = None
) -> Exported:
    height, width = codec.size or (256, 256)
    return diffusers_autoencoder.exported(
        codec.config,
        codec.state_dict() if weights is None else weights,
        max(height, width),
        None if scale is None else scale["mean"],
        None if scale is None else scale["std"],
        WHERE,
    )


def _of_library(
    network: Exported, scheduler: Scheduler, given: Conditions, codec: Codec, manifest: Manifest
) -> str | None:
    """The library's own pipeline of such a model, if there is one that samples it exactly."""
    _, height, width = manifest.plan.shape
    unscaled = {*manifest.mean} == {0.0} and {*manifest.std} == {1.0}
    # Of a codebook, latents that are scaled by channel have other nearest codes: no fold is exact.
    scales = codec.quantizer is None or _is_scaled_alike(manifest)
    if scheduler.name != "DDIMScheduler" or given.num_classes is not None:
        return None
    if network.class_name == "UNet2DModel" and not codec.config:
        return "DDIMPipeline" if unscaled else None
    if network.class_name == "UNet2DModel":
        return "LDMPipeline" if scales and height == width else None
    if given.text is None or not codec.config or codec.quantizer is not None:
        return None
    sides = codec.down_factor * height, codec.down_factor * width
    return "StableDiffusionPipeline" if given.is_clip and not any(side % 8 for side in sides) else None


def _is_scaled_alike(manifest: Manifest) -> bool:
    """Whether one factor takes the decoder's latents to the denoiser's."""
    return {*manifest.mean} == {0.0} and len({*manifest.std}) == 1


def _folded(weights: Mapping[str, Tensor], manifest: Manifest) -> dict[str, Tensor]:
    """The first stage of standardized latents: its last and first 1x1 convolutions take over mean and std, exactly.

    The log-variance that the encoder gives, too, becomes that of the standardized latents.
    """
    mean, std = (torch.tensor(values, dtype=torch.float64) for values in (manifest.mean, manifest.std))
    folded = {name: tensor.double() for name, tensor in weights.items() if "quant_conv." in name}
    weight, bias = folded["decoder.post_quant_conv.weight"], folded["decoder.post_quant_conv.bias"]
    folded["decoder.post_quant_conv.bias"] = bias + weight[:, :, 0, 0] @ mean
    folded["decoder.post_quant_conv.weight"] = weight * std[:, None, None]
    scale = torch.cat([std, torch.ones_like(std)])
    shift = torch.cat([mean / std, 2 * std.log()])
    folded["encoder.quant_conv.weight"] = folded["encoder.quant_conv.weight"] / scale[:, None, None, None]
    folded["encoder.quant_conv.bias"] = folded["encoder.quant_conv.bias"] / scale - shift
    return {**weights, **{name: tensor.float() for name, tensor in folded.items()}}


def loaded(made: Exported) -> Any:
    """The library's model with these tensors, which it checks against its own names and shapes."""
    import diffusers

    with torch.device("meta"):
        module = getattr(diffusers, made.class_name).from_config(made.config)
    module.load_state_dict(made.tensors, assign=True)
    return module.eval()


def _save(plan: Plan, out: Path) -> None:
    import diffusers

    parts = {"scheduler": getattr(diffusers, plan.scheduler.name)(**plan.scheduler.config)}
    parts["transformer" if plan.network.class_name.startswith("DiT") else "unet"] = loaded(plan.network)
    if plan.first_stage is not None:
        parts["vqvae" if plan.pipeline == "LDMPipeline" else "vae"] = loaded(plan.first_stage)
    if plan.conditions.text is not None:
        parts["text_encoder"], parts["tokenizer"] = encoder_and_tokenizer(plan.conditions.text)
    if plan.pipeline is not None:
        nothing = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        more = nothing if plan.pipeline == "StableDiffusionPipeline" else {}
        getattr(diffusers, plan.pipeline)(**parts, **more).save_pretrained(out)
        return
    from ldm.interop.carried_pipeline import LatentDiffusionPipeline

    LatentDiffusionPipeline(**parts, **plan.settings).save_pretrained(out)
    shutil.copyfile(CARRIED, out / "pipeline.py")
    index = json.loads((out / "model_index.json").read_text())
    index["_class_name"] = ["pipeline", LatentDiffusionPipeline.__name__]
    files.write_text(out / "model_index.json", json.dumps(index, indent=2) + "\n")


def _notes(plan: Plan) -> list[str]:
    """How the folder is loaded, for the model card."""
    text, classes = plan.conditions.text is not None, bool(plan.conditions.num_classes)
    given = ['prompt="..."'] * text + ["class_labels=[0]"] * classes + ["guidance_scale=2.0"] * (text or classes)
    trust = "" if plan.pipeline is not None else ", trust_remote_code=True"
    notes = [_PIPELINE.format(trust=trust, call=", ".join(given))]
    if plan.pipeline is None:
        notes.append(_CARRIED)
    if plan.scheduler.name == "DDIMScheduler":
        notes.append(_DIVISOR.format(levels=plan.scheduler.config["num_train_timesteps"]))
    return notes


def _compared(choices: Choices) -> str:
    return _SAME if choices.check else _UNCHECKED


_FIRST_STAGE = """\
```python
from diffusers import {name}

autoencoder = {name}.from_pretrained("FOLDER")
```
"""
_PIPELINE = """\
```python
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("FOLDER"{trust})
image = pipeline({call}).images[0]
```
"""
_CARRIED = """\
No pipeline of the library samples this model exactly, so the folder has its own, `pipeline.py`: read it before you
trust it.
"""
_DIVISOR = """\
Its steps are those of `ldm sample` if their number divides {levels}: of others, DDIMScheduler does not step from one of
its times to the next.
"""
_SAME = "It was loaded and compared with the model in fp32 when it was written: the same picture of the same noise.\n"
_UNCHECKED = "It was not compared with the model when it was written (`--no-check`).\n"
