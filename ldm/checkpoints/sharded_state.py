"""Saving and loading sharded tensors: gathered whole, or each rank's rows separately.

torch's own get_optimizer_state_dict does not do the gathering: it steps an optimizer that has no moments yet, so that a
save before the first step changes the training that follows, and it keys moments by parameter name, where every
checkpoint so far numbers them as the optimizer does; set_optimizer_state_dict fails on these or takes them for zeros.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor import empty as empty_dtensor

from ldm.checkpoints import state_tree
from ldm.runtime import distributed


def gathered(value: Any) -> Any:
    """A copy of the containers with whole tensors, on the CPU of rank 0; None in their place elsewhere (collective)."""

    def gather(key: str, leaf: Any) -> Any:
        if not isinstance(leaf, DTensor):
            return leaf
        whole = leaf.full_tensor()  # one at a time, since more may not fit into memory
        return whole.cpu() if distributed.is_main() else None

    return state_tree.replaced(value, gather)


def cut(state: Mapping[str, Any], folder: str, timeout: float) -> dict[str, Any]:
    """A checkpoint as `store.save` takes it from each rank: this rank's rows split off, None in their place.

    Args:
        folder: name of the shards' folder, the same on all ranks.
        timeout: seconds that rank 0 may wait for the files of the others.
    """
    tensors: dict[str, Tensor] = {}
    offsets: dict[str, list[int]] = {}

    def take(key: str, leaf: Any) -> Any:
        if not isinstance(leaf, DTensor):
            return leaf
        tensors[key] = leaf.to_local()
        offsets[key] = [*leaf.__create_chunk_list__()[0].offsets]  # as torch.distributed.checkpoint asks for them
        return None

    rest: dict[str, Any] = state_tree.replaced(dict(state), take)
    place = {"rank": distributed.rank(), "world": distributed.world_size(), "folder": folder, "timeout": timeout}
    return {**rest, "shard": {**place, "tensors": tensors, "offsets": offsets}}


def rows(folder: Path, mesh: DeviceMesh) -> dict[str, Tensor]:
    """This rank's rows of the sharded tensors, as DTensors; reads no others, and does not communicate.

    Args:
        folder: of the shards, written by any number of ranks.
        mesh: the ranks, in one dimension.
    """
    reader = dcp.HuggingFaceStorageReader(str(folder))
    known = reader.read_metadata().state_dict_metadata
    tensors: dict[str, Tensor] = {
        key: empty_dtensor(*entry.size, dtype=entry.properties.dtype, device_mesh=mesh, placements=[Shard(0)])
        for key, entry in known.items()
        if isinstance(entry, TensorStorageMetadata)  # safetensors files hold nothing else
    }
    dcp.load(tensors, storage_reader=reader, no_dist=True)
    return tensors
