"""Reconstructions of a stage-1 run as `ldm evaluate` measures them."""

from pathlib import Path
from typing import Any

from ldm.autoencoder.codec import Codec
from ldm.checkpoints import store
from ldm.cli import evaluate_run
from ldm.cli.devices import Precision
from ldm.cli.evaluate_options import is_configuration
from ldm.config.tree import current_plain
from ldm.errors import ConfigError
from ldm.evaluation.fidelity import RECONSTRUCTION, Fidelity
from ldm.evaluation.pictures import configured
from ldm.evaluation.pictures.configured import Configured
from ldm.evaluation.pictures.made import Reconstructions
from ldm.evaluation.reference import PicturesReference
from ldm.evaluation.subject import Reconstructed


def reconstructions(options: Any, path: Path, device: str) -> Reconstructed:
    """What the command line asks to measure of a stage-1 run; everything is loaded, nothing computed.

    Raises:
        LdmError: it cannot be measured.
    """
    precision = Precision.of(options, device)
    codec = Codec.load(path, options.trust).to(device)
    file = Path(codec.path)
    found = store.record(file)
    (originals, part, _), name = _originals(options, file, current_plain(found["config"], str(file)))
    number = min(options.images or len(originals), len(originals))
    if originals.channels != codec.in_channels:
        raise ConfigError(
            f"{name}: has pictures of {originals.channels} channels, the autoencoder reads {codec.in_channels}"
        )
    perceptual, notes = evaluate_run.perceptual(originals.shape, options.metrics)
    protocol = {
        "kind": "reconstructions",
        "images": number,
        "part": part,
        "of": originals.description()["source"],
        **precision.settings,
    }
    home = evaluate_run.home(file)
    return Reconstructed(
        name=str(home.parent),
        kind="reconstructions",
        pictures=Reconstructions(codec, originals, number, precision.compute),
        home=home,
        words=[f"step{found.get('step', 0)}-reconstructions", part, str(number)],
        protocol=protocol,
        metrics=options.metrics or RECONSTRUCTION,
        own_reference=lambda: PicturesReference(originals, name, number),
        training=evaluate_run.training(file, found),
        title="reconstructions",
        fidelity=Fidelity(codec, min(originals.shape[1:]), perceptual),
        notes=notes,
    )


def _originals(options: Any, file: Path, config: Any) -> tuple[Configured, str]:
    """The pictures that are reconstructed, and what they are called."""
    if options.against is None:
        own = configured.of_data(evaluate_run.data(config, file), options.trust, options.part, str(file))
        return own, f"its originals ({own.part})"
    word, *overrides = options.against
    if not is_configuration(word):
        raise ConfigError("--against: reconstructions are compared with their originals: name a configuration")
    other = configured.of_file(Path(word).expanduser(), overrides, options.trust, options.part)
    return other, f"{word} ({other.part})"
