"""A model as a folder that diffusers loads and that makes the same pictures of the same noise: `--to diffusers`.

    FOLDER/model_index.json           the pipeline's class, and that of each part
    FOLDER/unet/ or transformer/      the denoiser; beside it scheduler/, vae/ or vqvae/, text_encoder/, tokenizer/
    FOLDER/pipeline.py                where no pipeline of the library is exact: carried_pipeline.py

A first stage alone is one model of the library: config.json and its weights.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm import files
from ldm.autoencoder.codec import AutoencoderCodec, Codec
from ldm.interop.diffusers_models.check import check_first_stage, check_pipeline
from ldm.interop.diffusers_models.conditions import (
    Conditions,
    as_layer,
    conditions,
    encoder_and_tokenizer,
    texts_as_encoded,
)
from ldm.interop.diffusers_models.config import Exported
from ldm.interop.diffusers_models.first_stage import Stage, first_stage, library_scales
from ldm.interop.diffusers_models.first_stage import exported as exported_first_stage
from ldm.interop.diffusers_models.networks import exported as exported_network
from ldm.interop.diffusers_models.regular import Regular, of_one_number
from ldm.interop.diffusers_models.schedulers import Scheduler, scheduler_of
from ldm.interop.exports.trained import Diffusion, Trained
from ldm.interop.exports.usage import Choices, Usage, optional_packages
from ldm.latents.manifest import Manifest
from ldm.sizes import as_resolution

WHERE = "--to diffusers"
CARRIED = Path(__file__).with_name("carried_pipeline.py")


@dataclass(frozen=True)
class Plan:
    """What a folder holds.

    Attributes:
        pipeline: class of the library; None: ours, which the folder carries.
        network, scheduler, first_stage: of the library; of a model of pixels there is no first stage.
        conditions: what the denoiser is conditioned on.
        settings: of our pipeline.
    """

    pipeline: str | None
    network: Exported
    scheduler: Scheduler
    first_stage: Exported | Any | None
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
        assert isinstance(model.codec, AutoencoderCodec)
        made = exported_first_stage(model.codec, Regular(model.codec.config), model.codec.statistics)
        loaded(made).save_pretrained(out)
        if choices.check:
            check_first_stage(model.codec, made.class_name, out)
        return Usage("diffusers", "\n".join([_FIRST_STAGE.format(name=made.class_name), _compared(choices)]))
    denoiser = model.diffusion.denoiser
    reading = {"network": denoiser["network"], "conditioner": texts_as_encoded(denoiser["conditioner"])}
    diffusion = replace(model.diffusion, denoiser=nn.ModuleDict(reading))
    plan = planned(model.codec, diffusion, model.params)
    _save(plan, out)
    if choices.check:
        check_pipeline(model.codec, diffusion, out)
    return Usage("diffusers", "\n".join([*_notes(plan), _compared(choices)]))


def planned(codec: Codec, diffusion: Diffusion, params: Mapping[str, Any]) -> Plan:
    """What becomes of each part, and which pipeline samples it exactly; ConfigError: a part has no counterpart.

    Args:
        params: of the model: nodes of its parts.
    """
    manifest, denoiser = diffusion.manifest, diffusion.denoiser
    scheduler = scheduler_of(diffusion.objective)
    given = conditions(denoiser["conditioner"], denoiser["network"])
    regular = of_one_number({"network": params["network"]})
    made = _network(regular.nodes["network"], denoiser["network"].state_dict(), given, manifest)
    stage = first_stage(codec, manifest, fold=False)
    pipeline = None
    if not regular.norm_groups and not stage.norm_groups and stage.patch_size == 1:
        pipeline = _of_library(made, scheduler, given, stage, codec, manifest)
    if pipeline is not None:
        stage = first_stage(codec, manifest, fold=True)
    part = "transformer" if made.class_name.startswith("DiT") else "unet"
    groups = {name: one.norm_groups for name, one in ((part, regular), ("vae", stage)) if one.norm_groups}
    settings = {
        "latents_mean": [*manifest.mean],
        "latents_std": [*manifest.std],
        "timestep_scale": scheduler.timestep_scale,
        "num_classes": given.num_classes,
        "class_tokens": given.tokens is not None,
        "class_names": manifest.plan.class_names,
        "max_length": None if given.text is None else given.text.max_length,
        "patch_size": stage.patch_size,
        "norm_groups": groups or None,
    }
    return Plan(pipeline, made, scheduler, stage.made, given, settings)


def _network(node: Mapping[str, Any], weights: Mapping[str, Tensor], given: Conditions, manifest: Manifest) -> Exported:
    _, height, width = manifest.plan.shape
    made = exported_network(node, weights, given.vectors, as_resolution((height, width)), WHERE)
    if given.tokens is None:
        return made
    config, tensors = as_layer(given.tokens)
    return Exported(made.class_name, {**made.config, **config}, {**made.tensors, **tensors})


def _of_library(
    network: Exported, scheduler: Scheduler, given: Conditions, stage: Stage, codec: Codec, manifest: Manifest
) -> str | None:
    """The library's own pipeline of such a model, if there is one that samples it exactly."""
    _, height, width = manifest.plan.shape
    if scheduler.name != "DDIMScheduler" or given.num_classes is not None or not library_scales(codec, manifest):
        return None
    if network.class_name == "UNet2DModel" and not stage.kind:
        return "DDIMPipeline"
    if network.class_name == "UNet2DModel":
        return "LDMPipeline" if height == width and stage.kind in ("AutoencoderKL", "VQModel") else None
    whole = not any(codec.down_factor * side % 8 for side in (height, width))  # as the pipeline demands
    return "StableDiffusionPipeline" if given.is_clip and stage.kind == "AutoencoderKL" and whole else None


def loaded(made: Exported | Any) -> Any:
    """The library's model with these tensors, which it checks against its own names and shapes; or one at hand."""
    if not isinstance(made, Exported):
        return made
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
    from ldm.interop.diffusers_models.carried_pipeline import LatentDiffusionPipeline

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
