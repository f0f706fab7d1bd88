"""Trained networks of the package transformers that a conditioner reads and that stay as they are: in folders.

They are read from there, never downloaded, and known by a hash, which a checkpoint's is compared with.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.errors import CheckpointError
from ldm.weights.digest import weight_hash
from ldm.weights.remembered import remembered

_HASH = "_extra_state"
"""The key under which torch puts a module's extra state."""


class FrozenModel:
    """The trained network in a folder, loaded when it is first asked for, and released when that is asked for.

    Args:
        folder: where it lies.
        kind: its class in transformers.
        what: it is, for messages, such as "text encoder".
        compute: the type of its weights in memory.
    """

    def __init__(self, folder: str, kind: Any, what: str, compute: torch.dtype = torch.float32) -> None:
        self.folder = folder
        self.kind = kind
        self.compute = compute
        self._what = what
        self._network: nn.Module | None = None
        self._weights: str | None = None

    @property
    def network(self) -> nn.Module:
        """Frozen, in eval mode, on the CPU or where it ran last; loaded unless it is there.

        Raises:
            CheckpointError: it cannot be read, or lacks weights.
        """
        if self._network is None:
            network: nn.Module = read(self.kind, self.folder, self._what)
            self._weights = self._weights or hash_of(network)
            for parameter in network.parameters():  # not the buffers, such as the frequencies of rotary embeddings
                parameter.data = parameter.data.to(self.compute)
            self._network = network
        return self._network

    @property
    def is_loaded(self) -> bool:
        return self._network is not None

    def release(self) -> None:
        """Give the network's memory back."""
        if self._network is not None:
            on_gpu = any(parameter.is_cuda for parameter in self._network.parameters())
            self._network = None
            if on_gpu:
                torch.cuda.empty_cache()

    @contextmanager
    def lent(self) -> Iterator[None]:
        """Within the block the network may be loaded; after it, it is there only if it was there before."""
        stays = self.is_loaded
        try:
            yield
        finally:
            if not stays:
                self.release()

    @property
    def weights(self) -> str:
        """sha256 (hex) of the weights, as float32; without names, which differ between versions of transformers."""
        if self._weights is None:
            kind = f"{self._what} {self.kind.__name__}"
            self._weights = remembered(Path(self.folder), kind, self._hashed)
        return self._weights

    def _hashed(self) -> str:
        with self.lent():
            network = self.network  # which sets it
            return self._weights or hash_of(network)


def read(kind: Any, folder: str, what: str) -> Any:
    """A network of the class `kind` of transformers in float32, on the CPU, frozen and in eval mode.

    Args:
        what: it is, for messages, such as "text encoder".

    Raises:
        CheckpointError: it cannot be read, or lacks weights.
    """
    with reading(folder, what), torch.device("cpu"), quiet():
        network, info = kind.from_pretrained(
            folder, local_files_only=True, dtype=torch.float32, output_loading_info=True
        )
    # A pooler, which sentence encoders may come without, has no part in the tokens.
    lacking = sorted(str(name) for name in [*info["missing_keys"], *info["mismatched_keys"]])
    if lacking := [name for name in lacking if "pooler." not in name]:
        raise CheckpointError(f"{folder}: {len(lacking)} weights are missing or of another shape, such as {lacking[0]}")
    return network.requires_grad_(False).eval()


def hash_of(network: nn.Module) -> str:
    """sha256 (hex) of the weights, without their names, which differ between versions of transformers."""
    tensors = [tensor for name, tensor in network.named_parameters() if "pooler." not in name]
    return sha256("".join(sorted(weight_hash({"": tensor}) for tensor in tensors)).encode()).hexdigest()


@contextmanager
def reading(folder: str, what: str) -> Iterator[None]:
    """Within the block, whatever transformers raises is a CheckpointError of the folder."""
    try:
        yield
    except Exception as error:  # transformers, tokenizers and safetensors have classes of their own
        raise CheckpointError(f"{folder}: cannot be read as a {what}: {' '.join(str(error).split())}") from error


@contextmanager
def quiet() -> Iterator[None]:
    """Within the block transformers does not list what in a file is of no use here, such as CLIP's other half."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def as_state(hashes: str) -> Tensor:
    """Hashes (hex) as a module's extra state: uint8, on the CPU."""
    return torch.tensor([*bytes.fromhex(hashes)], dtype=torch.uint8, device="cpu")


def require_same(folder: str, what: str, found: Mapping[str, str], state: Tensor) -> None:
    """CheckpointError unless a checkpoint's state has these hashes, 32 bytes each."""
    hashes = bytes(state.tolist()).hex()
    for place, (part, mine) in enumerate(found.items()):
        if mine != (expected := hashes[64 * place : 64 * (place + 1)]):
            raise CheckpointError(
                f"{folder}: not the {what} that this model was trained with: {part} {mine[:16]}..., "
                f"expected {expected[:16]}.... Put that encoder into the folder."
            )


def may_lack_hash(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """A pre-hook: weights of others name no encoder, and then there is nothing to compare."""
    state_dict.setdefault(f"{prefix}{_HASH}", None)
