"""LoRA (Hu et al. 2021) through peft: a model's weights stay, and small matrices beside its layers are trained instead.

    model:
      params:
        adapter: {target: ldm.interop.lora.LoRA, params: {rank: 16}}
    init_from: logs/<run>                    # the weights that stay

A layer W x becomes W x + alpha / rank * B (A x), with A of `rank` rows, and B zero at first: a new adapter computes
what its base does. Checkpoints of such a run hold the base, too, so that they need no other file. There, W is named
`<layer>.base_layer.weight`, A and B `<layer>.lora_A.default.weight` and `<layer>.lora_B.default.weight`.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ldm.diffusion.networks.dit import DiT
from ldm.diffusion.networks.unet import UNet
from ldm.errors import ConfigError
from ldm.interop.exports.usage import optional_packages
from ldm.ranges import Count, FractionBelowOne, Positive
from ldm.weights.digest import weight_hash

if TYPE_CHECKING:
    from peft import LoraConfig
    from peft.tuners.lora import LoraLayer

ADAPTER = "default"
"""What peft calls the one adapter of a model."""
TARGETS: dict[type[nn.Module], tuple[str, ...]] = {
    # Self-attention and cross-attention.
    UNet: ("qkv", "query", "key", "value", "out"),
    DiT: ("attention.qkv", "attention.out", "cross.query", "cross.key_value", "cross.out", "feed.fc1", "feed.fc2"),
}
"""{network: its layers that are adapted where nothing else is asked for}."""


class LoRA:
    """Freezes a denoiser and puts an adapter on its network: what `model.params.adapter` of a configuration is.

    A weighting that is learned is no part of the denoiser, and goes on learning.

    Args:
        rank: of the update of each layer.
        alpha: the update is multiplied by alpha / rank; None: by 1.
        dropout: probability that an input of A is dropped.
        targets: names of linear layers and convolutions, whole or their ends (`query`, `middle.1.out`); None: those of
            `TARGETS`.
        train_conditioner: train the conditioner as well, such as the table of classes.

    Raises:
        ConfigError: peft is not installed.
    """

    def __init__(
        self,
        rank: Count = 16,
        alpha: Positive | None = None,
        dropout: FractionBelowOne = 0.0,
        targets: Sequence[str] | None = None,
        train_conditioner: bool = False,
    ) -> None:
        with optional_packages("ldm.interop.lora.LoRA"):
            import peft  # noqa: F401
        self.rank, self.alpha, self.dropout = rank, rank if alpha is None else alpha, dropout
        self.targets = targets
        self.train_conditioner = train_conditioner

    def __call__(self, denoiser: nn.ModuleDict) -> None:
        """Change the modules `network` and `conditioner` in place.

        Raises:
            ConfigError: the network has no layer of a name in `targets`, or no layer that can be adapted.
        """
        from peft import LoraConfig, inject_adapter_in_model

        network = denoiser["network"]
        targets = [*_targets(network, self.targets)]
        network.requires_grad_(False)
        if not self.train_conditioner:
            denoiser["conditioner"].requires_grad_(False)
        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,  # type: ignore[arg-type]  # a float serves as well
            lora_dropout=self.dropout,
            target_modules=targets,
        )
        inject_adapter_in_model(config, network, ADAPTER)


def _targets(network: nn.Module, asked: Sequence[str] | None) -> Iterator[str]:
    """The names, as asked for or by default, each of which fits a layer."""
    kind = type(network).__name__
    known = [name for name, module in network.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    ends = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in known if not name.rpartition(".")[2].isdigit()))
    if not known:
        raise ConfigError(f"model.params.adapter: {kind} has no linear layer or convolution of torch to adapt")
    names = asked if asked is not None else TARGETS.get(type(network), ())
    fitting = [name for name in names if any(f".{one}".endswith(f".{name}") for one in known)]
    missing = [name for name in names if name not in fitting] if asked is not None else []
    if missing or not fitting:
        what = f"{kind} has no linear layer or convolution called {', '.join(missing)}" if missing else "name some"
        raise ConfigError(f"model.params.adapter.params.targets: {what}; there are: {ends}")
    yield from fitting


# ---- a network with an adapter


def layers(network: nn.Module) -> dict[str, "LoraLayer"]:
    """{name: layer with an adapter}; empty for a network without."""
    if not is_adapted(network):
        return {}
    from peft.tuners.lora import LoraLayer

    return {name: module for name, module in network.named_modules() if isinstance(module, LoraLayer)}


def is_adapted(network: nn.Module) -> bool:
    """Whether a network has an adapter."""
    return any(is_adapters(name) for name in network.state_dict())


def config_of(network: nn.Module) -> "LoraConfig":
    """peft's configuration of an adapter that is there."""
    configs: Any = network.peft_config
    found: LoraConfig = configs[ADAPTER]
    return found


def set_scale(network: nn.Module, scale: float) -> None:
    """Multiply the adapter's update: 0 is the base, 1 what was trained.

    Raises:
        ConfigError: there is no adapter.
    """
    if not (found := layers(network)):
        raise ConfigError("--lora-scale: this model has no adapter; name a run that was trained with one")
    for layer in found.values():
        layer.set_scale(ADAPTER, scale)


def merge(network: nn.Module) -> None:
    """Add the adapter's updates to the weights, in place: an ordinary network, whose outputs are the same.

    Raises:
        ValueError: a weight would not be finite.
    """
    for name, layer in layers(network).items():
        layer.merge(safe_merge=True)
        parent, _, own = name.rpartition(".")
        setattr(network.get_submodule(parent), own, layer.get_base_layer())


# ---- names of weights


def is_adapters(name: str) -> bool:
    """Whether a weight of this name is the adapter's, not the base's."""
    return ".lora_" in name


def base_name(name: str) -> str:
    """The name of a weight of the base without the adapter."""
    return name.replace(".base_layer.", ".")


def base_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of the base, under their own names."""
    return {base_name(name): one for name, one in weights.items() if not is_adapters(name)}


def base_hash(network: nn.Module) -> str:
    """The hash of the network below the adapter: the same as that of the run it comes from."""
    return weight_hash(base_weights(network.state_dict()))
