"""Names that have changed since configurations were first stored, and the ones they have now.

Dotted names and parameters are public: they stand in the configurations that run folders and checkpoints hold, in what
a latent cache says of itself, and in people's own files. All of these are read under the names of today: YAML and what
is merged with it by ldm/config/tree.py, the rest by `current_plain`. A class that moves or is renamed gets a row here,
a parameter likewise; rows are never removed.
"""

from typing import Any

MOVED = {
    "ldm.averages": "ldm.training.callbacks.ema_snapshots",
    "ldm.autoencoder.quantiser": "ldm.autoencoder.quantizer",
    "ldm.callbacks": "ldm.training.callbacks.previews",
    "ldm.callbacks.Progress": "ldm.training.callbacks.progress.Progress",
    "ldm.callbacks.Throughput": "ldm.training.callbacks.progress.Throughput",
    "ldm.data.arrays": "ldm.data.sources.arrays",
    "ldm.data.datamodules": "ldm.data.datamodule",
    "ldm.data.images": "ldm.data.sources.folder",
    "ldm.data.images.Subset": "ldm.data.dataset.Subset",
    "ldm.data.latent_datamodule": "ldm.latents.datamodule",
    "ldm.data.openmoji": "ldm.data.sources.openmoji",
    "ldm.data.pixels": "ldm.data.transforms",
    "ldm.diffusion.conditioning": "ldm.diffusion.conditioners.classes",
    "ldm.diffusion.conditioning.Unconditional": "ldm.diffusion.conditioners.base.Unconditional",
    "ldm.diffusion.dit": "ldm.diffusion.networks.dit",
    "ldm.diffusion.edm2": "ldm.diffusion.networks.edm2",
    "ldm.diffusion.grids": "ldm.sampling.timesteps",
    "ldm.diffusion.samplers": "ldm.sampling.samplers",
    "ldm.diffusion.unet": "ldm.diffusion.networks.unet",
    "ldm.ema": "ldm.optim.ema",
    "ldm.finite": "ldm.training.callbacks.skip_nonfinite",
    "ldm.loggers": "ldm.training.loggers",
    "ldm.optimizers": "ldm.optim.optimizers",
    "ldm.safety": "ldm.training.callbacks.provenance",
    "ldm.safety.StopOnSignal": "ldm.training.callbacks.stop.StopOnSignal",
    "ldm.saving": "ldm.training.callbacks.checkpoints",
    "ldm.schedule": "ldm.optim.lr_schedules",
    "ldm.strategies": "ldm.training.strategies",
}
"""Modules, and classes that went elsewhere than the rest of their module: dotted name then -> now."""

PARAMETERS: dict[str, dict[str, str]] = {}
"""By the class' name of today: parameter then -> now."""


def target(name: str) -> str:
    """The dotted name that `name` has now."""
    if name in MOVED:
        return MOVED[name]
    module, _, last = name.rpartition(".")
    return f"{MOVED[module]}.{last}" if module in MOVED else name


def parameter(of: str, name: str) -> str:
    """What the parameter `name` of the class `of`, a dotted name of today, is called now."""
    return PARAMETERS.get(of, {}).get(name, name)


def current_plain(value: Any) -> Any:
    """Plain containers, such as the configuration in a checkpoint, with the names of today; all of them new."""
    if isinstance(value, list | tuple):
        return [current_plain(child) for child in value]
    if not isinstance(value, dict):
        return value
    children = {key: current_plain(child) for key, child in value.items()}
    if isinstance(children.get("target"), str):
        children["target"] = target(children["target"])
        if isinstance(children.get("params"), dict):
            children["params"] = {parameter(children["target"], key): of for key, of in children["params"].items()}
    return children
