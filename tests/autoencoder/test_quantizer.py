"""The codebook: nearest codes, straight-through gradients, its losses, and how much of it is in use."""

import pytest
import torch

from ldm.autoencoder.quantizer import VectorQuantiser, usage


@pytest.fixture
def quantiser():
    torch.manual_seed(0)
    book = VectorQuantiser(size=16, channels=3)
    torch.nn.init.normal_(book.codebook.weight)
    return book


@pytest.fixture
def latents():
    return torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(1), requires_grad=True)


def test_every_vector_becomes_its_nearest_code(quantiser, latents):
    found = quantiser(latents)
    vectors = latents.movedim(1, -1).reshape(-1, 3)
    expected = torch.cdist(vectors, quantiser.codebook.weight).argmin(1).reshape(2, 4, 5)
    assert torch.equal(found.indices, expected)
    torch.testing.assert_close(found.mode().movedim(1, -1), quantiser.codebook.weight[expected])
    torch.testing.assert_close(found.sample(), found.mode())
    assert torch.equal(found.mean, latents)
    assert not found.std.any()
    assert not found.var.any()


def test_codes_are_their_own_nearest(quantiser):
    codes = quantiser.codebook.weight.detach().t().reshape(1, 3, 4, 4)
    assert torch.equal(quantiser.nearest(codes).flatten(), torch.arange(16))
    torch.testing.assert_close(quantiser(quantiser(codes).mode()).cost(), torch.zeros(1))


def test_gradients_pass_straight_through(quantiser, latents):
    weight = torch.randn(2, 3, 4, 5)
    (quantiser(latents).sample() * weight).sum().backward()
    torch.testing.assert_close(latents.grad, weight)
    assert quantiser.codebook.weight.grad is None


def test_the_cost_draws_codes_to_latents_and_latents_to_codes(quantiser, latents):
    found = quantiser(latents)
    gap = (latents - found.mode()).detach()
    torch.testing.assert_close(found.cost(), 1.25 * gap.square().flatten(1).sum(1))
    found.cost().sum().backward()
    torch.testing.assert_close(latents.grad, 2 * 0.25 * gap)
    expected = torch.zeros(16, 3).index_add(0, found.indices.flatten(), -2 * gap.movedim(1, -1).reshape(-1, 3))
    torch.testing.assert_close(quantiser.codebook.weight.grad, expected)


def test_perplexity_and_use(quantiser):
    codes = quantiser.codebook.weight.detach()
    for places, perplexity in (([0, 0, 0, 0], 1), ([0, 1, 2, 3], 4), ([5, 5, 6, 6], 2)):
        counts = quantiser(codes[places].t().reshape(1, 3, 2, 2)).counts()
        found = usage(counts)
        assert found["perplexity"] == pytest.approx(perplexity, rel=1e-5)
        assert found["codes_used"] == len(set(places)) / 16
        # A data set comes in pieces.
        more = counts + quantiser(codes[[7] * 4].t().reshape(1, 3, 2, 2)).counts()
        assert usage(more)["codes_used"] == (len(set(places)) + 1) / 16


def test_nearest_in_bf16_autocast_is_exact(quantiser, latents):
    with torch.autocast("cpu", torch.bfloat16):
        found = quantiser(latents)
    assert torch.equal(found.indices, quantiser(latents).indices)
    assert found.mode().dtype == torch.float32
