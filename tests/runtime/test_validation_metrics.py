"""Means over items, batches and ranks; which metrics there are, and under which names they are logged."""

from functools import partial

import pytest
import torch
from torch import nn
from torchmetrics import Metric

from ldm.errors import ConfigError
from ldm.runtime.validation_metrics import Mean, ValidationMetrics

VALUES = torch.rand(11, generator=torch.Generator().manual_seed(0))


class Value(Mean):
    def values(self, batch, output):
        return batch["values"]


class Several(Metric):
    """Logs what it is told to."""

    def __init__(self, **found):
        super().__init__()
        self.found = found

    def update(self, batch, output):
        pass

    def compute(self):
        return self.found


class Watches(Several):
    """Notes how it is called."""

    def __init__(self, network=None):
        super().__init__()
        self.network, self.seen = network, []

    def update(self, batch, output):
        self.seen.append((torch.is_autocast_enabled("cpu"), torch.is_grad_enabled(), self.network.training))


def validate(metrics, batches):
    metrics.start(torch.device("cpu"))
    for values in batches:
        metrics.update({"values": values}, None)
    return metrics.compute()


@pytest.mark.parametrize("cut", [[11], [4, 4, 3], [1] * 11])
def test_a_mean_does_not_depend_on_the_batches(cut):
    (found,) = validate(ValidationMetrics({"value": Value()}), VALUES.split(cut)).values()
    assert found.item() == VALUES.double().mean().float().item()
    metric = Value()
    for rows in torch.stack([VALUES, 2 * VALUES]).split(cut, dim=1):
        metric.update({"values": rows}, None)
    torch.testing.assert_close(metric.compute()[1], 2 * VALUES.double().mean(), rtol=1e-12, atol=0)


def test_small_values_are_not_lost_beside_large_ones():
    """In float32, 2^24 + 1 is 2^24."""
    metric = Value()
    for value in (2.0**24, *[1.0] * 8):
        metric.update({"values": torch.tensor([value])}, None)
    assert metric.compute().item() == (2**24 + 8) / 9


def test_the_configuration_adds_replaces_and_leaves_out():
    own = {"a": Several(x=1.0), "b": Several(y=2.0), "c": Several(z=3.0)}
    assert [*validate(ValidationMetrics(own), [])] == ["val/x", "val/y", "val/z"]
    changed = validate(ValidationMetrics(own, {"b": Several(w=4.0), "a": None, "mine": Value(), "no": None}), [VALUES])
    assert [*changed] == ["val/w", "val/z", "val/mine"]
    assert changed["val/w"].dtype == changed["val/mine"].dtype == torch.float32
    assert validate(ValidationMetrics(own, dict.fromkeys(own)), []) == {}


@pytest.mark.parametrize("other", [Several(mine=1.0), Value()])
def test_two_metrics_of_one_name_are_refused(other):
    metrics = ValidationMetrics({"first": Several(mine=2.0)}, {"mine": other})
    with pytest.raises(ConfigError, match=r"model\.params\.metrics: 'first' and 'mine' both log val/mine.*mine=null"):
        validate(metrics, [VALUES])


def test_more_than_a_scalar_is_refused():
    metrics = ValidationMetrics({}, {"mine": Several(row=torch.zeros(3))})
    with pytest.raises(ConfigError, match=r"metrics\.mine: val/row: expected a scalar, found shape \(3,\)"):
        validate(metrics, [VALUES])


def test_a_validation_begins_anew():
    metrics = ValidationMetrics({"value": Value()})
    metrics.start(torch.device("cpu"))
    metrics.update({"values": torch.tensor([1e6])}, None)  # of one that was broken off
    assert validate(metrics, [VALUES]) == validate(metrics, VALUES.split(3))


def test_metrics_are_shown_batches_without_gradients_dropout_and_autocast():
    watch = Watches(nn.Dropout())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        validate(ValidationMetrics({}, {"watch": watch}), [VALUES])
    assert watch.seen == [(False, False, False)]


def on_a_rank(rank: int, world: int) -> dict[str, float]:
    """In a forked child: every rank has its share, of its own size."""
    metrics = ValidationMetrics({"value": Value()})
    share = VALUES[rank::world]
    found = [validate(metrics, share.split(2)) for _ in range(2)]
    assert found[0] == found[1]
    return {name: value.item() for name, value in found[0].items()}


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_have_the_mean_of_all(grouped, world):
    expected = {"val/value": VALUES.double().mean().float().item()}
    assert grouped(world, partial(on_a_rank, world=world)) == [expected] * world
