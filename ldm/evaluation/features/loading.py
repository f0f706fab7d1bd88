"""Weights into networks of other packages, with an error that a user can act on where something is missing or wrong."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import nn

from ldm.errors import CheckpointError, ConfigError
from ldm.weights import cache


@contextmanager
def optional_packages(features: str) -> Iterator[None]:
    """Around imports of what the extra `evaluation` installs.

    Raises:
        ConfigError: a package is missing.
    """
    try:
        yield
    except ImportError as error:
        raise ConfigError(
            f"the features '{features}' need the package {error.name}: pip install -e .[evaluation]"
        ) from error


@contextmanager
def weights_of(what: str, path: Path) -> Iterator[None]:
    """Around the loading of `path` into a network.

    Raises:
        CheckpointError: it holds the weights of another network, or none.
    """
    try:
        yield
    except (RuntimeError, TypeError, AttributeError, ValueError, KeyError) as error:
        text = " ".join(str(error).split())
        raise CheckpointError(
            f"{path}: not the weights of {what}: {text if len(text) < 300 else text[:300] + '...'}"
        ) from error


def fill(network: nn.Module, path: Path, what: str, prefix: str = "") -> None:
    """Load every weight of `network` from the tensors `prefix`* of a file; others in it are left alone.

    Args:
        network: may be on the meta device; it is on the CPU afterwards.

    Raises:
        CheckpointError: the file cannot be read, or they do not fit.
    """
    with weights_of(what, path):
        tensors = {name.removeprefix(prefix): one for name, one in cache.read(path).items() if name.startswith(prefix)}
        network.to_empty(device="cpu").load_state_dict(tensors)
