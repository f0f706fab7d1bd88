"""The codebook: nearest codes, straight-through gradients, its losses, and how much of it is in use."""

import pytest
import torch

from ldm.autoencoder.quantizer import VectorQuantizer, usage


@pytest.fixture
def quantizer():
    torch.manual_seed(0)
    book = VectorQuantizer(size=16, channels=3)
    torch.nn.init.normal_(book.codebook.weight)
    return book


@pytest.fixture
def latents():
    return torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(1), requires_grad=True)


def test_every_vector_becomes_its_nearest_code(quantizer, latents):
    found = quantizer(latents)
    vectors = latents.movedim(1, -1).reshape(-1, 3)
    expected = torch.cdist(vectors, quantizer.codebook.weight).argmin(1).reshape(2, 4, 5)
    assert torch.equal(found.indices, expected)
    torch.testing.assert_close(found.mode().movedim(1, -1), quantizer.codebook.weight[expected])
    torch.testing.assert_close(found.sample(), found.mode())
    assert torch.equal(found.mean, latents)
    assert not found.std.any()
    assert not found.var.any()


def test_codes_are_their_own_nearest(quantizer):
    codes = quantizer.codebook.weight.detach().t().reshape(1, 3, 4, 4)
    assert torch.equal(quantizer.nearest(codes).flatten(), torch.arange(16))
    torch.testing.assert_close(quantizer(quantizer(codes).mode()).regularization_loss(), torch.zeros(1))


def test_gradients_pass_straight_through(quantizer, latents):
    weight = torch.randn(2, 3, 4, 5)
    (quantizer(latents).sample() * weight).sum().backward()
    torch.testing.assert_close(latents.grad, weight)
    assert quantizer.codebook.weight.grad is None


def test_the_cost_draws_codes_to_latents_and_latents_to_codes(quantizer, latents):
    found = quantizer(latents)
    gap = (latents - found.mode()).detach()
    torch.testing.assert_close(found.regularization_loss(), 1.25 * gap.square().flatten(1).sum(1))
    found.regularization_loss().sum().backward()
    torch.testing.assert_close(latents.grad, 2 * 0.25 * gap)
    expected = torch.zeros(16, 3).index_add(0, found.indices.flatten(), -2 * gap.movedim(1, -1).reshape(-1, 3))
    torch.testing.assert_close(quantizer.codebook.weight.grad, expected)


def test_perplexity_and_use(quantizer):
    codes = quantizer.codebook.weight.detach()
    for places, perplexity in (([0, 0, 0, 0], 1), ([0, 1, 2, 3], 4), ([5, 5, 6, 6], 2)):
        counts = quantizer(codes[places].t().reshape(1, 3, 2, 2)).counts()
        found = usage(counts)
        assert found["perplexity"] == pytest.approx(perplexity, rel=1e-5)
        assert found["codes_used"] == len(set(places)) / 16
        # A data set comes in pieces.
        more = counts + quantizer(codes[[7] * 4].t().reshape(1, 3, 2, 2)).counts()
        assert usage(more)["codes_used"] == (len(set(places)) + 1) / 16


def test_nearest_in_bf16_autocast_is_exact(quantizer, latents):
    with torch.autocast("cpu", torch.bfloat16):
        found = quantizer(latents)
    assert torch.equal(found.indices, quantizer(latents).indices)
    assert found.mode().dtype == torch.float32
