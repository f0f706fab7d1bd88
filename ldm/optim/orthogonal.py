"""Muon's step (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) for matrices and convolutions.

torch's own handles only matrices, one at a time, and always computes in bf16, which processors without it emulate.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ldm.ranges import FractionBelowOne, NotNegative, Positive

_STEPS = 5
_COEFFICIENTS = 3.4445, -4.7750, 2.0315  # of Jordan et al., and of torch


def orthogonalized(matrices: Tensor) -> Tensor:
    """Each matrix of (N,m,n) with its own singular vectors, but with singular values near 1, from 0.7 to 1.2.

    (Those below some thousandths of its norm become less.) Five steps of the quintic iteration of Newton and Schulz,
    X <- a X + (b A + c A^2) X where A = X X^T.
    """
    if matrices.shape[1] > matrices.shape[2]:
        return orthogonalized(matrices.mT).mT
    x = matrices / torch.linalg.vector_norm(matrices, dim=(1, 2), keepdim=True).clamp(min=1e-7)  # (N, m, n)
    return _short(x) if _products_are_float32(x) else _iterated(x)


def _iterated(x: Tensor) -> Tensor:
    """The steps as they are written: each corrects what the one before it has rounded, so bf16 will do."""
    a, b, c = _COEFFICIENTS
    for _ in range(_STEPS):
        gram = x @ x.mT  # (N, m, m)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)  # (N, m, n)
    return x


def _short(x: Tensor) -> Tensor:
    """The same steps for A alone, which is smaller than X, by A <- Q A Q, Q = a I + b A + c A^2; then all Q times X.

    For the kernel of a 3x3 convolution these are two fifths of the operations. But what is rounded in A grows
    twelvefold in each step, which float32 has room for, and TF32 and bf16 have not.
    """
    a, b, c = _COEFFICIENTS
    gram = x @ x.mT  # (N, m, m)
    scaled = torch.diag_embed(torch.full_like(gram[..., 0], a))  # a I, sharded as the rest is (N, m, m)

    def polynomial(gram: Tensor) -> Tensor:
        return torch.baddbmm(scaled + b * gram, gram, gram, alpha=c)  # Q (N, m, m)

    product = factor = polynomial(gram)
    for _ in range(_STEPS - 1):
        gram = factor @ gram @ factor  # (N, m, m)
        factor = polynomial(gram)
        product = factor @ product  # (N, m, m)
    return product @ x  # (N, m, n)


def _products_are_float32(x: Tensor) -> bool:
    backends: Any = torch.backends
    plain = backends.mkldnn.matmul.fp32_precision in {"none", "ieee"}
    return plain and x.dtype == torch.float32 and x.device.type == "cpu"


def loss_of(closure: Callable[[], Any] | None) -> Any:
    """What the closure of an optimizer's step, which computes the gradients, returns; None without one."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


class Orthogonal(Optimizer):
    """Muon's step for parameters of two dimensions or more; a convolution is a matrix (out, in * height * width).

    An update is the momentum (Nesterov's), orthogonalized and scaled to the size of AdamW's (Liu et al. 2025,
    "Moonlight"). Those of equal shape are made together, in float32 on CPUs and in bf16 elsewhere.

    Args:
        params: the matrices and kernels.
        lr: learning rate.
        momentum: how much of it is kept in each step.
        weight_decay: decoupled, as AdamW's.

    Raises:
        ValueError: a parameter has fewer than two dimensions.
    """

    def __init__(
        self, params: Iterable[nn.Parameter], lr: Positive, momentum: FractionBelowOne, weight_decay: NotNegative
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        if any(parameter.ndim < 2 for group in self.param_groups for parameter in group["params"]):
            raise ValueError("Orthogonal: only for parameters of two dimensions or more; Muon takes all of a model")

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = loss_of(closure)
        for group in self.param_groups:
            parameters: list[Tensor] = [parameter for parameter in group["params"] if parameter.grad is not None]
            if parameters:
                self._step(parameters, **{name: group[name] for name in ("lr", "momentum", "weight_decay")})
        return loss

    def _step(self, parameters: list[Tensor], lr: float, momentum: float, weight_decay: float) -> None:
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        gradients: list[Any] = [parameter.grad for parameter in parameters]
        buffers = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
        torch._foreach_lerp_(buffers, gradients, 1 - momentum)
        torch._foreach_mul_(parameters, 1 - lr * weight_decay)

        alike = defaultdict(list)
        for parameter, gradient, buffer in zip(parameters, gradients, buffers, strict=True):
            alike[parameter.flatten(1).shape].append((parameter, gradient, buffer))
        for (height, width), rows in alike.items():
            updates = [gradient.lerp(buffer, momentum).flatten(1) for _, gradient, buffer in rows]
            stacked = torch.stack(updates)  # (N, height, width)
            device = stacked.device.type
            with torch.autocast(device, enabled=False):  # stage 1 steps within that of its training step
                made = orthogonalized(stacked if device == "cpu" else stacked.bfloat16())
            made = made * (-lr * 0.2 * math.sqrt(max(height, width)))
            for (parameter, *_), update in zip(rows, made, strict=True):
                parameter.add_(update.reshape(parameter.shape))
