"""What the machine can do at best: one large matrix product, as a side beside the others."""

import torch

from scripts.bench.child import Built, Place, repeat

SIZE = 2048


def product(size: int, place: Place) -> Built:
    """The product of two square matrices."""
    dtype = torch.bfloat16 if place.bf16 else torch.float32
    one, other = torch.randn(2, size, size, device=place.device).to(dtype)

    def step() -> None:
        torch.mm(one, other)

    return Built(0, repeat(step, place))
