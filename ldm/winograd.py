"""3x3 convolutions by Winograd's minimal filtering (Lavin and Gray 2016, arXiv:1509.09308): F(4x4, 3x3).

A tile of 4x4 outputs reads 6x6 inputs. Both factors, as polynomials in two variables, are evaluated at the 6x6 pairs of
six points (Toom and Cook), where their product is one multiplication each: 36 a tile in place of 144. With A and G the
Vandermonde matrices of the points for polynomials of four and three coefficients, and B the inverse of that for six,
by the transposition principle

    y = A^T [(G w G^T) * (B^T x B)] A

for a tile x; over channels each of the 36 is a product of matrices.

What is evaluated passes through memory, 36 values for 16 on either side of the products, so it pays for many channels
alone. In float32 rounding is five to ten times that of a direct convolution: 2e-6 of the values.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

TILE = 4
"""Outputs of a tile on a side."""

PART = 2**17
"""Pictures are computed in turn, as many at once as have this many values, but one at least: 36 / 16 of these are held
about twice over, and in the backward pass three times."""

_READ = TILE + 2  # inputs of a tile on a side, and points
_AT_ONE = _READ + 1
"""Where both variables are 1: A makes of this value the same in the whole tile, as a bias is."""


def _vandermonde(coefficients: int) -> np.ndarray:
    """Evaluates a polynomial at the points, the last of which is infinity: (6, coefficients)."""
    # With 0, 1, -1, 2, -2, float32 loses 1.5 times as much.
    points = np.array([0.0, 1.0, -1.0, 0.5, -2.0])
    infinity = np.zeros(coefficients)
    infinity[-1] = 1
    return np.vstack([np.vander(points, coefficients, increasing=True), infinity])


def _in_two_variables(matrix: np.ndarray) -> Tensor:
    return torch.from_numpy(np.kron(matrix, matrix))


_A = _in_two_variables(_vandermonde(TILE))  # (36, 16)
_G = _in_two_variables(_vandermonde(3))  # (36, 9)
_B = _in_two_variables(np.linalg.inv(_vandermonde(_READ)))  # (36, 36)


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.conv2d(x, weight, bias, padding=1), of size 3: (N, C, H, W), H and W divisible by 4 -> (N, C', H, W).

    In the layout of x. Can be differentiated once.
    """
    result: Tensor = _Convolution.apply(x, weight, bias)
    return result


class _Convolution(torch.autograd.Function):
    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu")
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        kernels = _evaluated(weight).transpose(1, 2)  # (36, C, C')
        y = _empty_like(x, weight.shape[0])  # (N, C', H, W)
        for part in _parts(x, weight):
            products = torch.bmm(_evaluated_tiles(x[part]), kernels)  # (36, tiles, C')
            if bias is not None:
                products[_AT_ONE] += bias
            y[part] = _joined(_A.to(x.dtype).T @ products.flatten(1), y[part].shape)
        return y

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The same sums, transposed."""
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        kernels = _evaluated(weight)  # (36, C', C)
        dx = _empty_like(x, x.shape[1]) if needs_x else None  # (N, C, H, W)
        d_kernels = torch.zeros_like(kernels) if needs_weight else None  # (36, C', C)
        d_bias = torch.zeros_like(weight[:, 0, 0, 0]) if needs_bias else None  # (C',)
        for part in _parts(x, weight):
            d_products = (_A.to(x.dtype) @ _split(dy[part])).unflatten(1, (-1, weight.shape[0]))  # (36, tiles, C')
            if dx is not None:
                d_tiles = _B.to(x.dtype) @ torch.bmm(d_products, kernels).flatten(1)  # (36, tiles * C)
                dx[part] = _overlapping_sum(d_tiles, x[part].shape)
            if d_kernels is not None:
                d_kernels.baddbmm_(d_products.transpose(1, 2), _evaluated_tiles(x[part]))
            if d_bias is not None:
                d_bias += d_products[_AT_ONE].sum(0)
        if d_kernels is None:
            return dx, None, d_bias
        return dx, (_G.to(x.dtype).T @ d_kernels.flatten(1)).T.reshape(weight.shape), d_bias


def _parts(x: Tensor, weight: Tensor) -> Iterator[slice]:
    """Pictures by numbers that fit into memory near the processor, if more than one does."""
    values = max(weight.shape[:2]) * x.shape[2] * x.shape[3]
    number = max(1, PART // values)
    return (slice(first, first + number) for first in range(0, x.shape[0], number))


def _empty_like(x: Tensor, channels: int) -> Tensor:
    layout = torch.contiguous_format if x.is_contiguous() else torch.channels_last
    return torch.empty(x.shape[0], channels, *x.shape[2:], dtype=x.dtype, device=x.device, memory_format=layout)


def _evaluated(weight: Tensor) -> Tensor:
    """(C', C, 3, 3) -> (36, C', C)."""
    return (_G.to(weight.dtype) @ weight.reshape(-1, 9).T).unflatten(1, weight.shape[:2])


def _evaluated_tiles(x: Tensor) -> Tensor:
    """(N, C, H, W) -> (36, tiles, C), with the pixels around the picture zero."""
    rows, channels, height, width = x.shape
    padded = x.new_empty(rows, height + 2, width + 2, channels)
    for edge in (padded[:, 0], padded[:, -1], padded[:, :, 0], padded[:, :, -1]):
        edge.zero_()
    padded[:, 1:-1, 1:-1] = x.permute(0, 2, 3, 1)
    tiles = padded.unfold(1, _READ, TILE).unfold(2, _READ, TILE)  # (N, H/4, W/4, C, 6, 6)
    values = tiles.permute(4, 5, 0, 1, 2, 3).reshape(_READ**2, -1)  # (36, tiles * C)
    return (_B.to(x.dtype).T @ values).unflatten(1, (-1, channels))


def _split(y: Tensor) -> Tensor:
    """(N, C, H, W) -> its tiles (16, tiles * C)."""
    rows, channels, height, width = y.shape
    pixels = y.permute(0, 2, 3, 1).contiguous()  # (N, H, W, C)
    grid = pixels.view(rows, height // TILE, TILE, width // TILE, TILE, channels)
    return grid.permute(2, 4, 0, 1, 3, 5).reshape(TILE**2, -1)


def _joined(tiles: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of _split: (16, tiles * C) -> (N, C, H, W), which is the given shape, in channels_last."""
    rows, channels, height, width = shape
    grid = tiles.view(TILE, TILE, rows, height // TILE, width // TILE, channels)
    return grid.permute(2, 3, 0, 4, 1, 5).reshape(rows, height, width, channels).permute(0, 3, 1, 2)


def _overlapping_sum(tiles: Tensor, shape: torch.Size) -> Tensor:
    """(36, tiles * C), each beginning 4 after the one before -> sums (N, C, H, W), which is the given shape."""
    rows, channels, height, width = shape
    down, right = height // TILE, width // TILE
    each = tiles.view(_READ, _READ, rows, down, right, channels).permute(2, 3, 0, 4, 1, 5)  # (N, down, 6, right, 6, C)
    # What a tile has beyond its first 4 falls on the first ones of the next.
    total = tiles.new_empty(rows, down + 1, TILE, right + 1, TILE, channels)
    total[:, -1] = 0
    total[:, :, :, -1] = 0
    total[:, :-1, :, :-1] = each[:, :, :TILE, :, :TILE]
    total[:, 1:, :2, :-1] += each[:, :, TILE:, :, :TILE]
    total[:, :-1, :, 1:, :2] += each[:, :, :TILE, :, TILE:]
    total[:, 1:, :2, 1:, :2] += each[:, :, TILE:, :, TILE:]
    pixels = total.view(rows, height + TILE, width + TILE, channels)[:, 1 : height + 1, 1 : width + 1]
    return pixels.permute(0, 3, 1, 2)
