"""What is asked of an export, and what is said of its result."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from ldm.errors import ConfigError


@dataclass(frozen=True)
class Choices:
    """What the command line says about an export.

    Attributes:
        license: of the weights, for the model card; None: that of the weights that the model came from, or unknown.
        data_license: of the pictures it was trained on; None: unknown, but of data sources that have one.
        pictures: whether the card shows sheets of the run, some of which show pictures of the data.
        check: whether a folder for diffusers is loaded, and a picture compared with the model's.
    """

    license: str | None = None
    data_license: str | None = None
    pictures: bool = True
    check: bool = True


@dataclass(frozen=True)
class Usage:
    """What a format says of itself in the model card.

    Attributes:
        library: what loads it, as the hub calls it.
        text: how, in Markdown.
    """

    library: str
    text: str


@contextmanager
def optional_packages(format: str, extra: str = "interop") -> Iterator[None]:
    """Around imports of what an extra installs.

    Raises:
        ConfigError: a package is missing.
    """
    try:
        yield
    except ImportError as error:
        raise ConfigError(f"{format} needs the package {error.name}: pip install -e .[{extra}]") from error
