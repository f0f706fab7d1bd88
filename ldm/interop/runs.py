"""A converted model as a run folder like any other: it is sampled, resumed, fine-tuned, cached and evaluated.

logs/<time>_<name>/
    checkpoints/step=0.ckpt     the weights, sealed, with the facts that every checkpoint has, and `origin`
    configs/config.yaml         the architecture read off the file, and a plain training of it
    origin.json                 where it comes from: file, hash, family, license, what was left out
"""

import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm import files, run_folder
from ldm.autoencoder.codec import Codec
from ldm.checkpoints import store
from ldm.config.load import build, to_yaml
from ldm.config.randomness import STANDARD
from ldm.errors import CheckpointError, ConfigError
from ldm.interop.models import BATCH_SIZE, RUN, Converted, Denoiser, FirstStage, Origin, Request, node
from ldm.interop.sources import Source
from ldm.latents.dense import Dense
from ldm.latents.manifest import CacheSpec, Manifest
from ldm.run_folder import RunFolder, RunState
from ldm.runtime.versions import versions
from ldm.sizes import as_resolution

_CHECKPOINT = "step=0.ckpt"
_IMAGES = node("data.sources.folder.ImageFolder", root="data/images")
_ADAM = {"target": "torch.optim.AdamW", "partial": True, "params": {"lr": 1.0e-5, "fused": True}}
_EMA = node("optim.ema.EMA", profile=node("optim.ema.FixedDecay", decay=0.9999)) | {"partial": True}
_TRAINER = {"max_steps": 100_000, "val_check_interval": 5000, "precision": "32-true"}


def write(converted: Converted, source: Source, request: Request, logdir: Path, name: str | None) -> list[RunFolder]:
    """Publish the run folders of a conversion: the first stage's before its denoiser's, each complete or absent.

    Args:
        name: of the run; None: the converted model's own. A first stage out of the same file adds `_autoencoder`.

    Raises:
        ConfigError: a denoiser without a first stage, or no folder can have that name.
        ResourceError: the disk is full; nothing is left.
    """
    name = name or converted.name
    if isinstance(converted, FirstStage):
        return [_publish(logdir, name, lambda _: _autoencoder_run(converted, name, converted.source or source))]
    written = []
    if converted.first_stage is not None:
        written = write(converted.first_stage, source, request, logdir, f"{name}_autoencoder")
    try:
        path = written[0].path if written else None if converted.pixels else request.autoencoder
        if path is None and not converted.pixels:
            raise ConfigError(
                f"{source.path}: holds no first stage, without which no picture can be made. Name the autoencoder "
                f"whose latents it was trained on: --autoencoder RUN, or a folder of diffusers as it is (convert other "
                f"files first)"
            )

        def run(folder: RunFolder) -> dict[str, Any]:
            return _denoiser_run(converted, name, source, path, folder)

        return [*written, _publish(logdir, name, run, converted.write_files)]
    except BaseException:
        for folder in written:
            shutil.rmtree(folder.path, ignore_errors=True)
        raise


def _autoencoder_run(converted: FirstStage, name: str, source: Source) -> dict[str, Any]:
    config = {
        "name": name,
        "seed": 23,
        "randomness": STANDARD,
        "model": node(
            "autoencoder.module.AutoencoderKL",
            **{**converted.params, "optimizer": converted.params.get("optimizer", _ADAM)},
        ),
        "data": node(
            "data.datamodule.ImageDataModule",
            train=_IMAGES,
            batch_size=BATCH_SIZE,
            resolution=converted.resolution,
            channels=converted.params["encoder"]["params"]["in_channels"],
            seed=23,
            num_validation=100,
        ),
        "lightning": {"trainer": dict(_TRAINER)},
    }
    facts = {"kind": "autoencoder", "latents": converted.statistics}
    return untrained(config, facts, converted.weights, converted.origin, source)


def _denoiser_run(
    converted: Denoiser, name: str, source: Source, autoencoder: Path | None, folder: RunFolder
) -> dict[str, Any]:
    codec = Codec.pixels(len(converted.mean)) if autoencoder is None else Codec.load(autoencoder)
    manifest = _manifest(converted, codec, autoencoder, source)
    config = {
        "name": name,
        "seed": 23,
        "randomness": dict(converted.randomness),
        "model": node(
            "diffusion.module.LatentDiffusion", **_placed(converted.params, folder), optimizer=_ADAM, ema=_EMA
        ),
        "data": node(
            "latents.datamodule.LatentDataModule",
            train=_IMAGES,
            autoencoder=None if autoencoder is None else str(autoencoder),
            channels=codec.in_channels,
            resolution=manifest.plan.pixels["resolution"],
            batch_size=BATCH_SIZE,
            seed=23,
            num_validation=100,
            statistics=asdict(manifest.statistics),
            **converted.data,
        ),
        "lightning": {"trainer": dict(_TRAINER)},
    }
    average = converted.weights if converted.average is None else converted.average
    weights: dict[str, Any] = {f"denoiser.{key}": tensor for key, tensor in converted.weights.items()}
    weights |= {f"ema.average.{key}": tensor for key, tensor in average.items()}
    weights |= {f"objective.{key}": tensor for key, tensor in converted.objective.items()}
    weights["ema._extra_state"] = {"images_seen": 0}
    facts: dict[str, Any] = {"kind": "diffusion", "latents": manifest.to_dict()}
    if autoencoder is not None:
        # A folder's newest checkpoint may be another one by the time that the run is gone on with.
        facts["data"] = {"autoencoder": manifest.plan.autoencoder["weights"], **_dense_facts(converted.data)}
    return untrained(config, facts, weights, converted.origin, source)


def _dense_facts(data: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What `aligned`, `drawn` and `masked` of a data module are, as it would say itself."""
    aligned, drawn = ({key: build(made) for key, made in data.get(name, {}).items()} for name in ("aligned", "drawn"))
    return Dense(aligned, drawn, build(data["masked"]) if "masked" in data else None).facts()


def _manifest(converted: Denoiser, codec: Codec, autoencoder: Path | None, source: Source) -> Manifest:
    """Of the latents that it was trained on: their scale and the autoencoder that made them; no records."""
    height, width = converted.size
    if codec.latent_channels != len(converted.mean):
        raise ConfigError(
            f"{autoencoder}: makes latents of {codec.latent_channels} channels; {source.path} was trained on "
            f"{len(converted.mean)}. Name the autoencoder whose latents it was trained on: --autoencoder RUN"
        )
    factor = codec.down_factor
    made_by = codec.describe() | {"path": str(autoencoder or "")}
    if converted.latents is not None:
        known = Manifest.from_dict(converted.latents)
        if made_by["weights"] != known.plan.autoencoder["weights"]:
            raise CheckpointError(f"{source.path}: its autoencoder is not the one that made its latents; get it again")
        return replace(known, plan=replace(known.plan, autoencoder=made_by), shards=[])
    plan = CacheSpec(
        shape=(len(converted.mean), height, width),
        num_items=0,
        source=f"foreign:{source.path.name}",
        pixels={
            "resolution": as_resolution((height * factor, width * factor)),
            "channels": codec.in_channels,
        },
        autoencoder=made_by,
        num_classes=converted.params["conditioner"]["params"].get("num_classes"),
    )
    return Manifest(plan, [*converted.mean], [*converted.std], broken=[], shards=[])


def untrained(
    config: dict[str, Any], facts: dict[str, Any], weights: Mapping[str, Tensor], origin: Origin, source: Source
) -> dict[str, Any]:
    """A checkpoint before its first step: everything that resuming reads, and no optimizer's state."""
    note = {
        "source": source.path.name,
        "sha256": dict(source.sha256),
        "family": origin.family,
        "license": origin.license,
        "dropped": dict(origin.dropped)
        | ({"the optimizers' states": source.optimizer_tensors} if source.optimizer_tensors else {}),
        "notes": [*origin.notes],
        "tensors": len(weights),
    }
    common = {"format": store.FORMAT, "config": config, "data": None, "step": 0, "images_seen": 0}
    return {
        "epoch": 0,
        "global_step": 0,
        "pytorch-lightning_version": versions()["pytorch-lightning"],
        "state_dict": dict(weights),
        "optimizer_states": [],
        "lr_schedulers": [],
        "ldm": {**common, "versions": versions(), "metrics": {}, **facts, "origin": note},
    }


def _placed(tree: Any, folder: RunFolder) -> Any:
    """The parameters of a model with its run folder in the place of `RUN`."""
    if isinstance(tree, Mapping):
        return {key: _placed(value, folder) for key, value in tree.items()}
    return tree.replace(RUN, str(folder.path)) if isinstance(tree, str) and tree.startswith(RUN) else tree


def _publish(
    logdir: Path,
    name: str,
    run: Callable[[RunFolder], dict[str, Any]],
    write_files: Callable[[Path], None] | None = None,
) -> RunFolder:
    """Written aside, then renamed: a reader finds the whole folder or none.

    Args:
        run: the folder that it will be -> the checkpoint's state.
        write_files: writes what else belongs into it.
    """
    run_folder.check_name(name)
    folder = _free(logdir, name)
    state = run(folder)
    logdir.mkdir(parents=True, exist_ok=True)
    aside = RunFolder(files.temporary(logdir / f".{name}"))
    try:
        aside.make()
        if write_files is not None:
            write_files(aside.path)
        fill(aside, state)
        aside.path.rename(folder.path)
        return folder
    finally:
        shutil.rmtree(aside.path, ignore_errors=True)


def fill(folder: RunFolder, state: dict[str, Any]) -> None:
    """Write what a run folder holds before its first step, of a state as `untrained` makes it."""
    folder.make()
    store.save(folder.checkpoints / _CHECKPOINT, state)
    config, origin = state["ldm"]["config"], state["ldm"]["origin"]
    files.write_text(folder.origin_file, json.dumps(origin, indent=2) + "\n")
    files.write_text(folder.source_file, to_yaml(config))
    files.write_text(folder.facts_file, json.dumps(state["ldm"]["data"] or {}) + "\n")
    files.write_text(folder.config_file, to_yaml(config))
    folder.write_state(RunState("finished", 0, "converted", 0, f"checkpoints/{_CHECKPOINT}"))


def _free(logdir: Path, name: str) -> RunFolder:
    while (folder := RunFolder(logdir / f"{time.strftime(run_folder.TIME_FORMAT)}_{name}")).path.exists():
        time.sleep(0.2)
    return folder
