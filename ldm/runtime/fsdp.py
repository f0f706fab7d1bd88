"""Parameters sharded over the ranks (FSDP2), and conversion to and from whole tensors.

A sharded parameter is a DTensor: each rank holds some of its rows (dimension 0, split as by torch.chunk), and likewise
of its gradient and of the optimizer's moments. Before a block runs, its rows are gathered from all ranks, and freed
afterwards. Functions marked "collective" communicate: every rank has to call them, in the same order.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer


@runtime_checkable
class InBlocks(Protocol):
    """A network that lists the parts that are gathered one at a time; together they should hold most of its weights."""

    def blocks(self) -> Sequence[nn.Module]: ...


def shard(
    module: nn.Module,
    mesh: DeviceMesh,
    blocks: Sequence[nn.Module] = (),
    compute: torch.dtype | None = None,
    methods: Sequence[str] = (),
) -> None:
    """Keep on this rank only its rows of every parameter of `module`; all ranks hold the same ones before.

    Args:
        module: not sharded again if it already is.
        mesh: the ranks, in one dimension.
        blocks: its parts that are gathered separately.
        compute: dtype of the gathered parameters, while the stored rows keep their own; None: the same. Norms and
            biases keep theirs, as under autocast. Inputs are never converted (a noise level would lose precision), and
            gradients are averaged over the ranks in float32.
        methods: methods besides `forward` that use parameters. They must not return a view of one.
    """
    if isinstance(module, FSDPModule) or next(module.parameters(), None) is None:
        return
    policy = MixedPrecisionPolicy(
        param_dtype=compute,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
        param_dtype_override_fn=_own_type_of_vectors,
    )
    for part in (*blocks, module):
        # Also after a forward pass without a backward pass, so that the parameters are then the sharded rows.
        fully_shard(part, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    for method in methods:
        register_fsdp_forward_method(module, method)


def _own_type_of_vectors(parameter: nn.Parameter) -> torch.dtype | None:
    return parameter.dtype if parameter.ndim < 2 else None


def total_norm(gradients: Iterable[Tensor]) -> Tensor:
    """The 2-norm of all gradients together, all ranks' rows of them: a plain scalar, on their device (collective)."""
    norm = get_total_norm(gradients)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def load_weights(module: nn.Module, state_dict: Mapping[str, Any], strict: bool = True) -> None:
    """`module.load_state_dict` for whole or sharded tensors, in the form that the module holds."""
    own = module.state_dict()
    module.load_state_dict({name: _like(value, own.get(name)) for name, value in state_dict.items()}, strict=strict)


def load_optimizer(optimizer: Optimizer, state_dict: Mapping[str, Any]) -> None:
    """`optimizer.load_state_dict` for whole or sharded tensors; those with a parameter's shape are sharded like it."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = {
        index: {name: _like(value, parameters[index]) for name, value in entry.items()}
        for index, entry in state_dict["state"].items()
    }
    optimizer.load_state_dict({**state_dict, "state": state})


def _like(value: Any, pattern: Any) -> Any:
    """A whole tensor sharded like `pattern`, if it has the same shape; without communication.

    A copy: the value may be mapped from a file, which would stay open with it, and on the disk after it was removed.
    """
    if not isinstance(value, Tensor) or isinstance(value, DTensor):
        return value
    if not isinstance(pattern, DTensor) or value.shape != pattern.shape:
        return value.clone()
    mesh, placements = pattern.device_mesh, pattern.placements
    return distribute_tensor(value, mesh, placements, src_data_rank=None).clone()
