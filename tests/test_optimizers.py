"""Optimizers: who is decayed, who is orthogonalised, and that a resume finds all of it."""

import copy

import pytest
import torch
from torch import nn

from ldm.optimizers import AdamW, Muon, decay_groups


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 6), nn.Unflatten(1, (6, 1, 1)), nn.Conv2d(6, 4, 1)
    )


def train(model, optimizer, steps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        model(torch.randn(16, 6, generator=generator)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_norms_and_biases_are_in_a_group_without_decay(model):
    decayed, others = decay_groups(model.parameters(), 0.1)
    assert [group["weight_decay"] for group in (decayed, others)] == [0.1, 0.0]
    assert {id(p) for p in decayed["params"]} == {id(model[place].weight) for place in (0, 2, 4)}
    assert len(decayed["params"]) + len(others["params"]) == len([*model.parameters()])
    assert len(decay_groups([model[0].bias], 0.1)) == 1


@pytest.mark.parametrize("make", [AdamW, Muon])
def test_without_gradients_only_matrices_shrink(model, make):
    before = copy.deepcopy(model.state_dict())
    optimizer = make(model.parameters(), lr=0.1, weight_decay=0.5)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, now in model.state_dict().items():
        torch.testing.assert_close(now, before[name] * (0.95 if now.ndim >= 2 else 1.0))


def test_adamw_is_torch_s(model):
    other = copy.deepcopy(model)
    train(model, AdamW(model.parameters(), lr=1e-2, weight_decay=0.0), 5)
    train(other, torch.optim.AdamW(other.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0), 5)
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_muon_moves_matrices_in_all_directions_alike(model):
    before = model[0].weight.detach().clone()
    train(model, Muon(model.parameters(), lr=0.1, weight_decay=0.0), 1)
    lengths = torch.linalg.svdvals(model[0].weight.detach() - before)
    assert lengths.max() / lengths.min() < 2  # the gradient's own differ by orders of magnitude
    # 0.2 sqrt(larger side) makes the root mean square of the update that of AdamW, about 0.2.
    assert (model[0].weight.detach() - before).square().mean().sqrt() == pytest.approx(0.1 * 0.2, rel=0.3)


def test_muon_is_scheduled_and_zeroed_as_one(model):
    optimizer = Muon(model.parameters(), lr=1.0, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)
    before = copy.deepcopy(model.state_dict())
    train(model, optimizer, 2)
    assert all(torch.equal(now, before[name]) for name, now in model.state_dict().items())
    assert scheduler.get_last_lr() == [0.0] * len(optimizer.param_groups)


@pytest.mark.parametrize("make", [AdamW, Muon])
def test_a_resumed_optimizer_is_the_same(model, make, tmp_path):
    optimizer = make(model.parameters(), lr=1e-2)
    train(model, optimizer, 3)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state")
    other = copy.deepcopy(model)
    train(model, optimizer, 3, seed=1)
    state = torch.load(tmp_path / "state", weights_only=True)
    again = make(other.parameters(), lr=1.0)
    again.load_state_dict(state["optimizer"])
    train(other, again, 3, seed=1)
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert all(len(again.state[parameter]) for parameter in other.parameters())


@pytest.mark.parametrize("dims", [1, 2])
def test_muon_takes_models_of_one_kind(dims):
    parameter = nn.Parameter(torch.ones([3] * dims))
    optimizer = Muon([parameter], lr=0.1)
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert bool((parameter < 1).any())


def test_muon_takes_no_late_parameters(model):
    with pytest.raises(ValueError, match="cannot be added"):
        Muon(model.parameters(), lr=0.1).add_param_group({"params": [nn.Parameter(torch.ones(2))]})
