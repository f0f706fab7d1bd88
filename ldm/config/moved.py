"""Former names in stored configurations, and their present ones.

Dotted names and parameters are public: they stand in the configurations that run folders and checkpoints hold, in what
a latent cache says of itself, and in people's own files. All of these are read under the names of today: YAML and what
is merged with it by ldm/config/yaml_text.py, the rest by `current_plain` of ldm/config/tree.py. A class that moves or
is renamed gets a row here, a parameter likewise; rows are never removed.
"""

MOVED = {
    "ldm.averages": "ldm.training.callbacks.ema_snapshots",
    "ldm.averages.AverageSnapshots": "ldm.training.callbacks.ema_snapshots.EMASnapshots",
    "ldm.autoencoder.quantiser": "ldm.autoencoder.quantizer",
    "ldm.autoencoder.quantiser.VectorQuantiser": "ldm.autoencoder.quantizer.VectorQuantizer",
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
    "ldm.diffusion.networks.unet.TransformerBlock": "ldm.diffusion.networks.unet_attention.TransformerBlock",
    "ldm.diffusion.unet": "ldm.diffusion.networks.unet",
    "ldm.diffusion.paths.Discrete": "ldm.diffusion.paths.DiscreteVP",
    "ldm.diffusion.paths.Exploding": "ldm.diffusion.paths.VE",
    "ldm.diffusion.paths.Straight": "ldm.diffusion.paths.Linear",
    "ldm.diffusion.predictions.Preconditioned": "ldm.diffusion.predictions.EDMPreconditioned",
    "ldm.ema": "ldm.optim.ema",
    "ldm.ema.Decay": "ldm.optim.ema.FixedDecay",
    "ldm.finite": "ldm.training.callbacks.skip_nonfinite",
    "ldm.finite.FiniteGuard": "ldm.training.callbacks.skip_nonfinite.SkipNonFinite",
    "ldm.loggers": "ldm.training.loggers",
    "ldm.optimizers": "ldm.optim.optimizers",
    "ldm.safety": "ldm.training.callbacks.provenance",
    "ldm.safety.StopOnSignal": "ldm.training.callbacks.stop.StopOnSignal",
    "ldm.saving": "ldm.training.callbacks.checkpoints",
    "ldm.schedule": "ldm.optim.lr_schedules",
    "ldm.strategies": "ldm.training.strategies",
}
"""Modules, and classes that moved separately from their module: former dotted name -> present one."""

_LEVELS = {"channel_multipliers": "channel_mult", "blocks_per_level": "num_res_blocks"}

PARAMETERS = {
    "ldm.autoencoder.losses.AutoencoderLoss": {"adversarial_start": "disc_start"},
    "ldm.autoencoder.module.AutoencoderKL": {"quantiser": "quantizer"},
    "ldm.autoencoder.networks.Decoder": {"channels": "base_channels", **_LEVELS},
    "ldm.autoencoder.networks.Encoder": {"channels": "base_channels", **_LEVELS},
    "ldm.diffusion.networks.dit.DiT": {
        "channels": "hidden_size",
        "feed_ratio": "mlp_ratio",
        "heads": "num_heads",
        "normalise_attention": "qk_norm",
        "rotary": "rope",
    },
    "ldm.diffusion.networks.edm2.MagnitudePreservingUNet": {"channels": "model_channels", **_LEVELS},
    "ldm.diffusion.networks.unet.UNet": {
        "channels": "model_channels",
        "context_channels": "context_dim",
        "head_channels": "num_head_channels",
        "heads": "num_heads",
        **_LEVELS,
    },
    "ldm.diffusion.objectives.Flow": {"told_scale": "time_scale"},
    "ldm.diffusion.paths.GVP": {"last": "t_max", "told_scale": "time_scale"},
    "ldm.diffusion.paths.Linear": {"last": "t_max", "told_scale": "time_scale"},
    "ldm.diffusion.paths.VP": {"last": "t_max", "told_scale": "time_scale"},
    "ldm.optim.ema.EMA": {"others": "extra"},
    "ldm.optim.ema.PowerFunction": {"width": "std"},
}
"""By the class's present name: former parameter -> present one."""


def target(name: str) -> str:
    """The dotted name that `name` has now."""
    if name in MOVED:
        return MOVED[name]
    module, _, last = name.rpartition(".")
    return f"{MOVED[module]}.{last}" if module in MOVED else name


def parameter(of: str, name: str) -> str:
    """What the parameter `name` of the class `of`, a dotted name of today, is called now."""
    return PARAMETERS.get(of, {}).get(name, name)
