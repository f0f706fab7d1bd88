"""Optimizers: who is decayed, who is orthogonalised, and that a resume finds all of it."""

import copy
from functools import partial

import pytest
import torch
from torch import nn

from ldm.errors import CheckpointError
from ldm.optim.lr_schedules import Cosine
from ldm.optim.optimizers import AdamW, Muon, Scheduled, decay_groups, keep_settings, place_schedules

# Of convolutions as well.
ConvMuon = partial(Muon, convolutions=True)


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


@pytest.mark.parametrize("make", [AdamW, Muon, ConvMuon])
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


@pytest.mark.parametrize("make", [AdamW, Muon, ConvMuon])
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


@pytest.mark.parametrize("make", [Muon, ConvMuon])
@pytest.mark.parametrize("dims", [1, 2, 4])
def test_muon_takes_models_of_one_kind(make, dims):
    parameter = nn.Parameter(torch.ones([3] * dims))
    optimizer = make([parameter], lr=0.1)
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert bool((parameter < 1).any())


@pytest.mark.parametrize("convolutions", [False, True])
def test_muon_goes_on_with_moments_of_either_kind(convolutions):
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 6))
    before = Muon(model.parameters(), lr=0.1, convolutions=not convolutions)
    train(model, before, 2)
    after = Muon(model.parameters(), lr=0.1, convolutions=convolutions)
    keep_settings(after)
    after.load_state_dict(copy.deepcopy(before.state_dict()))
    weights = model[0].weight.detach().clone()
    train(model, after, 1)
    assert not torch.equal(model[0].weight, weights)


def test_muon_takes_no_late_parameters(model):
    with pytest.raises(ValueError, match="cannot be added"):
        Muon(model.parameters(), lr=0.1).add_param_group({"params": [nn.Parameter(torch.ones(2))]})


# Each optimizer with the settings of a run, and others for its resume.
CHANGED = [
    (torch.optim.Adam, {"lr": 0.1, "betas": [0.9, 0.99]}, {"lr": 0.02, "betas": [0.5, 0.9], "eps": 1e-3}),
    (torch.optim.AdamW, {"lr": 0.1}, {"lr": 0.02, "weight_decay": 0.5, "fused": True}),
    (torch.optim.NAdam, {"lr": 0.1}, {"lr": 0.02, "momentum_decay": 0.1}),
    (torch.optim.RMSprop, {"lr": 0.1, "momentum": 0.5}, {"lr": 0.02, "momentum": 0.9, "alpha": 0.5}),
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}, {"lr": 0.02, "momentum": 0.5, "nesterov": True}),
    (AdamW, {"lr": 0.1, "weight_decay": 0.1}, {"lr": 0.02, "weight_decay": 0.5, "betas": [0.5, 0.9], "eps": 1e-3}),
    (Muon, {"lr": 0.1, "weight_decay": 0.1}, {"lr": 0.02, "weight_decay": 0.5, "momentum": 0.5, "betas": [0.5, 0.9]}),
    (Muon, {"lr": 0.1, "convolutions": True}, {"lr": 0.02, "momentum": 0.5, "convolutions": True}),
]


@pytest.mark.parametrize(
    ("make", "then", "now"), CHANGED, ids=[f"{make.__module__}.{make.__name__}" for make, *_ in CHANGED]
)
def test_moments_come_from_the_checkpoint_and_settings_from_the_configuration(model, make, then, now):
    saved = make(model.parameters(), **then)
    Scheduled(saved, Cosine(10))
    train(model, saved, 3)
    state, other = copy.deepcopy(saved.state_dict()), copy.deepcopy(model)
    # What is right: the old optimizer, each of its settings changed by hand.
    fresh = make(other.parameters(), **now)
    for group, wanted in zip(saved.param_groups, fresh.param_groups, strict=True):
        group |= {name: value for name, value in wanted.items() if name != "params"}
    keep_settings(fresh)
    fresh.load_state_dict(state)
    assert [group["lr"] for group in fresh.param_groups] == [0.02] * len(fresh.param_groups)
    train(model, saved, 2, seed=1)
    train(other, fresh, 2, seed=1)
    for ours, theirs in zip(other.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_what_an_optimizer_learns_about_its_groups_is_restored(model):
    class Prodigal(torch.optim.SGD):
        def __init__(self, params, lr, coefficient=1.0):
            super().__init__(params, lr=lr)
            for group in self.param_groups:
                group |= {"coefficient": coefficient, "distance": 1e-6}

    saved = Prodigal(model.parameters(), lr=0.1)
    saved.param_groups[0]["distance"] = 0.25
    fresh = Prodigal(model.parameters(), lr=0.2, coefficient=3.0)
    keep_settings(fresh)
    fresh.load_state_dict(saved.state_dict())
    group = fresh.param_groups[0]
    assert (group["lr"], group["coefficient"], group["distance"]) == (0.2, 3.0, 0.25)


def test_moments_of_other_parameters_are_refused(model):
    fresh = AdamW(model.parameters(), lr=0.1)
    keep_settings(fresh)
    with pytest.raises(CheckpointError, match=r"\[3, 5\].*\[8\]"):
        fresh.load_state_dict(torch.optim.AdamW(model.parameters(), lr=0.1).state_dict())


@pytest.mark.parametrize("schedule", [Cosine(10, warm_up=2, final=0.1), None])
def test_a_schedule_is_restored_to_its_position_alone(model, schedule):
    scheduled = Scheduled(AdamW(model.parameters(), lr=0.1), Cosine(20))
    for _ in range(7):
        scheduled.optimizer.step()
        scheduled.step()
    other = AdamW(model.parameters(), lr=0.3)
    resumed = Scheduled(other, schedule)
    resumed.load_state_dict(copy.deepcopy(scheduled.state_dict()))
    assert resumed.last_epoch == 7
    for step in range(7, 10):
        expected = 0.3 * (schedule(step) if schedule else 1.0)
        assert [group["lr"] for group in other.param_groups] == [expected, expected] == resumed.get_last_lr()
        other.step()
        resumed.step()


def test_an_unchanged_schedule_saves_what_it_loaded(model):
    scheduled = Scheduled(AdamW(model.parameters(), lr=0.1), Cosine(20))
    for _ in range(3):
        scheduled.optimizer.step()
        scheduled.step()
    again = Scheduled(AdamW(model.parameters(), lr=0.1), Cosine(20))
    again.load_state_dict(copy.deepcopy(scheduled.state_dict()))
    assert again.state_dict() == scheduled.state_dict()


def test_optimizers_that_were_saved_without_a_schedule_have_a_position_too():
    plain, noted = {"param_groups": [{"lr": 1.0}]}, {"param_groups": [{"lr": 1.0, "initial_lr": 1.0}]}
    old = {"optimizer_states": [plain, noted], "lr_schedulers": [{"last_epoch": 5}]}
    place_schedules(old, [9, 5])
    assert old["lr_schedulers"] == [{"last_epoch": 9}, {"last_epoch": 5}]
    new = {"optimizer_states": [noted], "lr_schedulers": [{"last_epoch": 9, "_step_count": 10}]}
    place_schedules(new, [9, 5])
    assert new["lr_schedulers"] == [{"last_epoch": 9, "_step_count": 10}]
