"""Muon of convolutions: against torch's of matrices, and against the singular values themselves."""

from typing import Any

import pytest
import torch
from torch import nn

from ldm.optim.optimizers import Muon
from ldm.optim.orthogonal import Orthogonal, orthogonalized


@pytest.mark.parametrize("shape", [(8, 8), (4, 36), (36, 4), (1, 9)])
def test_singular_vectors_stay_and_values_become_one(shape):
    given = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    made = orthogonalized(given)
    u, _, v = torch.linalg.svd(given, full_matrices=False)
    values = u.mT @ made @ v.mT  # (N, k, k)
    diagonal = values.diagonal(dim1=1, dim2=2)
    assert diagonal.min() > 0.6
    assert diagonal.max() < 1.3
    torch.testing.assert_close(values, torch.diag_embed(diagonal), rtol=0, atol=1e-3)


def with_values_down_to(least):
    """Matrices (3,64,576), float64, whose singular values fall from 1."""

    def vectors(rows):
        return torch.linalg.qr(torch.randn(3, rows, 64, generator=draws, dtype=torch.float64)).Q

    draws = torch.Generator().manual_seed(0)
    return vectors(64) * torch.linspace(1, least**0.25, 64, dtype=torch.float64) ** 4 @ vectors(576).mT


@pytest.mark.parametrize("least", [1e-2, 1e-6, 0.0])
def test_fewer_operations_make_the_same_of_the_largest_and_the_smallest_values(least):
    given = with_values_down_to(least)
    expected = orthogonalized(given)  # float64: the steps as they are written
    torch.testing.assert_close(orthogonalized(given.float()), expected.float(), rtol=0, atol=2e-4)


@pytest.fixture(params=["bf16", "tf32"])
def rounded_products(request):
    products: Any = torch.backends.mkldnn.matmul
    before, products.fp32_precision = products.fp32_precision, request.param
    yield
    products.fp32_precision = before


def test_rounded_products_are_not_enough_for_fewer_operations(rounded_products):
    given = with_values_down_to(1e-6)
    expected = orthogonalized(given).float()
    torch.testing.assert_close(orthogonalized(given.float()), expected, rtol=0, atol=0.05)
    torch.testing.assert_close(orthogonalized(given.bfloat16()).float(), expected, rtol=0, atol=0.05)


def test_together_is_one_by_one_and_zero_stays_zero():
    given = torch.randn(4, 6, 10, generator=torch.Generator().manual_seed(0))
    given[2] = 0
    made = orthogonalized(given)
    torch.testing.assert_close(made, torch.cat([orthogonalized(each[None]) for each in given]))
    assert not made[2].any()


def test_a_matrix_is_stepped_as_by_torch():
    torch.manual_seed(0)
    start = [torch.randn(shape) for shape in [(8, 12), (12, 8), (8, 12)]]
    ours, theirs = ([nn.Parameter(each.clone()) for each in start] for _ in range(2))
    settings = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}
    steppers = Orthogonal(ours, **settings), torch.optim.Muon(theirs, adjust_lr_fn="match_rms_adamw", **settings)
    for _ in range(3):
        for one, other in zip(ours, theirs, strict=True):
            one.grad = torch.randn(one.shape)
            other.grad = one.grad.clone()
        for stepper in steppers:
            stepper.step()
    for one, other, before in zip(ours, theirs, start, strict=True):
        # torch computes its updates in bf16.
        assert (one - other).norm() < 0.02 * (one - before).norm()


def test_a_kernel_is_the_matrix_of_its_rows_in_any_layout():
    torch.manual_seed(0)
    start, gradient = torch.randn(6, 4, 3, 3), torch.randn(6, 4, 3, 3)
    layouts = start.clone(), start.to(memory_format=torch.channels_last), start.flatten(1).clone()
    stepped = [nn.Parameter(each) for each in layouts]
    for parameter in stepped:
        parameter.grad = gradient.reshape(parameter.shape)
        Muon([parameter], lr=0.1, convolutions=True).step()
    for parameter in stepped:
        torch.testing.assert_close(parameter.reshape(start.shape), stepped[0])
    assert stepped[1].is_contiguous(memory_format=torch.channels_last)


def test_what_has_no_gradient_stays():
    torch.manual_seed(0)
    moved, kept = nn.Parameter(torch.ones(3, 3)), nn.Parameter(torch.ones(3, 3))
    moved.grad = torch.randn(3, 3)
    Orthogonal([moved, kept], lr=0.1, momentum=0.9, weight_decay=0.1).step()
    assert bool((moved != 1).any())
    assert bool((kept == 1).all())
    Orthogonal([kept], lr=0.1, momentum=0.9, weight_decay=0.1).step()


def test_autocast_changes_nothing():
    torch.manual_seed(0)
    gradient, stepped = torch.randn(32, 32), [nn.Parameter(torch.zeros(32, 32)) for _ in range(2)]
    for parameter, enabled in zip(stepped, (False, True), strict=True):
        parameter.grad = gradient.clone()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            Orthogonal([parameter], lr=0.1, momentum=0.9, weight_decay=0.1).step()
    assert torch.equal(*stepped)


def test_a_closure_is_called():
    parameter = nn.Parameter(torch.ones(3, 3))

    def closure():
        loss = parameter.square().sum()
        loss.backward()
        return loss

    assert Orthogonal([parameter], lr=0.1, momentum=0.9, weight_decay=0.1).step(closure) == 9
    assert bool((parameter != 1).any())


def test_a_vector_is_refused():
    with pytest.raises(ValueError, match="two dimensions"):
        Orthogonal([nn.Parameter(torch.ones(3))], lr=0.1, momentum=0.9, weight_decay=0.1)
