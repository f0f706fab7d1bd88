"""Files of the small networks that ldm trains to judge samples: safetensors that say which kind of judge they hold."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ldm.errors import CheckpointError
from ldm.evaluation.features.loading import weights_of
from ldm.files import published
from ldm.sizes import Size


class Kind(NamedTuple):
    """A kind of judge.

    Attributes:
        name: of `ldm evaluate classifier --of`.
        what: it is, for messages.
        flag: of `ldm evaluate`, which takes its file.
    """

    name: str
    what: str
    flag: str

    @property
    def training(self) -> str:
        """The command that trains one."""
        return f"ldm evaluate classifier FILE.yaml --of {self.name}"

    @property
    def wanted(self) -> str:
        """Why there is no measure without one."""
        return f"it needs {self.what} ({self.flag} FILE), which `{self.training}` trains"


CLASSES = Kind("classes", "a classifier", "--classifier")
BOXES = Kind("boxes", "a classifier of boxes", "--boxes-classifier")
MAP = Kind("map", "a segmenter", "--segmenter")
KINDS = {kind.name: kind for kind in (CLASSES, BOXES, MAP)}


class Held(NamedTuple):
    """What a file holds.

    Attributes:
        tensors: of the network, by name.
        size: height and width of the pictures that it was trained on.
        classes: a name for each class; None: they have none.
    """

    tensors: Mapping[str, Tensor]
    size: Size
    classes: Sequence[str] | None


def write(path: Path, kind: Kind, network: nn.Module, size: Size, classes: Sequence[str] | None = None) -> None:
    """Write a judge, whole or not at all."""
    tensors = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    about = {"judge": kind.name, "height": str(size[0]), "width": str(size[1]), "classes": json.dumps(classes)}
    path.parent.mkdir(parents=True, exist_ok=True)
    with published(path) as aside:
        save_file(tensors, aside, about)


def read(path: Path, kind: Kind) -> Held:
    """A judge of this kind.

    Raises:
        CheckpointError: the file is missing, or holds another kind of judge, or none.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; expected {kind.what} that ldm trained and saved")
    try:
        with safe_open(path, "pt") as file:
            about, tensors = file.metadata() or {}, {name: file.get_tensor(name) for name in [*file.keys()]}
    except SafetensorError as error:
        raise CheckpointError(f"{path}: cannot be read as safetensors ({error})") from error
    with weights_of(f"{kind.what} that ldm saved", path):
        size = int(about["height"]), int(about["width"])
        found = KINDS[about.get("judge", CLASSES.name)]  # at first there were no others
        classes = json.loads(about.get("classes", "null"))
    if found is not kind:
        raise CheckpointError(
            f"{path}: holds {found.what}, which {found.flag} takes; expected {kind.what}: train one with "
            f"`{kind.training}`"
        )
    return Held(tensors, size, classes)
