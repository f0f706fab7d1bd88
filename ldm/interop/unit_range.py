"""An autoencoder of pictures in [-1, 1] fitted to a model that gives it pictures in [0, 1], and takes such from it."""

from pathlib import Path

import torch

from ldm.checkpoints import store
from ldm.config.tree import current_plain
from ldm.errors import ConfigError
from ldm.interop.models import FirstStage, Origin, node
from ldm.interop.sources import Source
from ldm.weights.cache import sha256

_ENCODER = "ldm.autoencoder.networks.Encoder"
_PARTS = ("encoder", "decoder", "quantizer")


def fitted(path: Path | None) -> FirstStage | None:
    """The same autoencoder with `unit_range`, whose decoder brings its pictures back to [-1, 1] for all else here.

    Its decoder's last layer is scaled, so that no model of the one can be used with the other: their weights' hashes
    differ.

    Args:
        path: run folder or checkpoint; None: there is none.

    Returns:
        None: there is none, or it is fitted already.

    Raises:
        CheckpointError: missing, damaged, or not from stage 1.
        ConfigError: its encoder is not of a kind that can be fitted.
    """
    if path is None:
        return None
    verified = store.verify(path)
    state = store.load(verified)
    record = store.facts(state, "autoencoder", verified.path)
    config = current_plain(record["config"], str(verified.path))
    params = {name: made for name, made in config["model"]["params"].items() if name in _PARTS and made}
    encoder = params["encoder"]
    if encoder["target"] != _ENCODER:
        raise ConfigError(
            f"{verified.path}: expected an autoencoder of {_ENCODER}, which can be fitted to pictures in [0, 1]; found "
            f"{encoder['target']}. Convert the file of Stable Diffusion's autoencoder"
        )
    if encoder["params"].get("unit_range"):
        return None
    params["encoder"] = {**encoder, "params": {**encoder["params"], "unit_range": True}}
    weights = {name: one for name, one in state["state_dict"].items() if name.partition(".")[0] in params}
    weights["decoder.conv_out.weight"] = 2 * weights["decoder.conv_out.weight"]
    weights["decoder.conv_out.bias"] = 2 * weights["decoder.conv_out.bias"] - 1
    params["loss"] = node("autoencoder.losses.AutoencoderLoss", kl_weight=1e-6, learn_logvar=False)
    weights["loss.logvar"] = torch.zeros(())
    origin = Origin(
        "an autoencoder fitted to pictures in [0, 1]",
        license=record.get("origin", {}).get("license", "unknown"),
        notes=[f"Its weights are those of {verified.path}, with the decoder's last layer scaled."],
    )
    resolution = config.get("data", {}).get("params", {}).get("resolution") or 256
    file = verified.path
    source = Source(file, {}, sha256={file.name: sha256(file)})
    return FirstStage(path.stem, params, weights, resolution, origin, source=source)
