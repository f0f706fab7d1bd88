"""Shapes, parameters and FLOPs without values."""

import pytest
import torch
from torch import nn

from ldm.config.load import from_tree
from ldm.errors import ConfigError
from ldm.randomness import Draws
from ldm.training import dry_run

IMAGES = {"channels": 3, "resolution": 16, "num_classes": 2, "batch_size": 6, "num_items": 16}
LATENTS = {"channels": 2, "resolution": 8, "num_classes": 2, "batch_size": 6, "num_items": 16, "down_factor": 2}


def meta_batch(facts):
    """What a data module of these facts describes as its batch."""
    key = "latent" if "down_factor" in facts else "image"
    return {
        key: torch.empty(2, facts["channels"], facts["resolution"], facts["resolution"], device="meta"),
        "class_label": torch.zeros(2, dtype=torch.int64, device="meta"),
        "draws": Draws(0, range(2), facts["batch_size"], "meta"),
    }


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 32, bias=False)
        self.frozen = nn.Linear(32, 32, bias=False).requires_grad_(False)

    def total_loss(self, batch):
        return self.frozen(self.first(batch["image"])).sum()


def test_flops_by_hand():
    with torch.device("meta"):
        model = Model()
    rows = 2 * 3 * 16
    # Forward of both layers; backward: the first one's weight and the second one's input.
    expected = 2 * rows * (16 * 32 + 32 * 32 + 16 * 32 + 32 * 32)
    assert dry_run.step_flops(model, meta_batch(IMAGES)) == expected


def test_parameters():
    assert dry_run.parameter_counts(Model()) == {"total": 1536, "trained": 512, "first": 512, "frozen": 1024}


def test_both_stages_fit_their_data(autoencoder_tree, diffusion_tree):
    diffusion_tree["data"]["params"]["autoencoder"] = "somewhere"
    for tree, facts in ((autoencoder_tree, IMAGES), (diffusion_tree, LATENTS)):
        config = from_tree(tree, "test")
        resolved = config.resolved(facts)
        model = dry_run.meta_model(resolved)
        assert all(parameter.device.type == "meta" for parameter in model.parameters())
        dry_run.check_fit(model, resolved, facts, meta_batch(facts), config.origin)
        said = dry_run.report(model, resolved, facts, meta_batch(facts))
        assert "GFLOPs" in said
        assert f"(6, {facts['channels']}, {facts['resolution']}, {facts['resolution']})" in said


def misfit(tree, **params):
    tree["data"]["params"]["autoencoder"] = "somewhere"
    for part, changes in params.items():
        tree["model"]["params"][part]["params"] |= changes
    config = from_tree(tree, "run.yaml")
    resolved = config.resolved(LATENTS)
    with pytest.raises(ConfigError) as caught:
        dry_run.check_fit(dry_run.meta_model(resolved), resolved, LATENTS, meta_batch(LATENTS), config.origin)
    return str(caught.value)


def test_a_misfit_names_the_keys(diffusion_tree):
    message = misfit(diffusion_tree, network={"in_channels": 4})
    assert "latent (6, 2, 8, 8)" in message
    assert "model.params.network.params.in_channels (run.yaml) is 4, the data has 2: write ${data:channels}" in message


def test_too_few_classes(diffusion_tree):
    message = misfit(diffusion_tree, conditioner={"num_classes": 1})
    assert "model.params.conditioner.params.num_classes (run.yaml) is 1, the data has 2" in message


def test_a_resolution_that_cannot_be_halved(diffusion_tree):
    diffusion_tree["model"]["params"]["network"]["params"]["channel_mult"] = [1] * 5
    assert "latent (6, 2, 8, 8)" in misfit(diffusion_tree)
