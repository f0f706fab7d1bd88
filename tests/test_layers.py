"""ldm.layers: parity of the parts that networks share."""

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.embeddings import get_timestep_embedding

from ldm.layers import attend, group_norm, timestep_embedding


def test_sinusoid_equals_diffusers():
    levels = torch.tensor([0.0, 1.0, 12.5, 999.0])
    expected = get_timestep_embedding(levels, 64, flip_sin_to_cos=True, downscale_freq_shift=0)
    torch.testing.assert_close(timestep_embedding(levels, 64), expected)
    assert timestep_embedding(levels, 65).shape == (4, 65)


@pytest.mark.parametrize("pixels", [16, 128, 129])
def test_both_ways_of_attention_agree(pixels):
    q, k, v = torch.randn(3, 2, 4, pixels, 8).unbind(0)
    torch.testing.assert_close(attend(q, k, v), F.scaled_dot_product_attention(q, k, v), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pixels", [128, 256, 257])
def test_attention_in_bf16_has_the_gradients_of_float32_whichever_way_it_is_computed(pixels):
    torch.manual_seed(0)
    rounded = [torch.randn(2, 3, pixels, 16).bfloat16().requires_grad_() for _ in range(3)]
    exact = [one.detach().float().requires_grad_() for one in rounded]
    upstream = torch.randn(2, 3, pixels, 16)
    wanted = torch.autograd.grad(F.scaled_dot_product_attention(*exact), exact, upstream)
    found = torch.autograd.grad(attend(*rounded), rounded, upstream.bfloat16())
    for ours, true in zip(found, wanted, strict=True):
        assert (ours.float() - true).norm() < 2**-5 * true.norm()


@pytest.mark.parametrize("pixels", [16, 129])
def test_a_mask_hides_keys_in_both_ways_of_attention(pixels):
    q, k, v = torch.randn(2, 4, pixels, 8), torch.randn(2, 4, 7, 8), torch.randn(2, 4, 7, 8)
    found = attend(q, k, v, torch.arange(7) < torch.tensor([[3], [7]]))
    torch.testing.assert_close(found[:1], attend(q[:1], k[:1, :, :3], v[:1, :, :3]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[1:], attend(q[1:], k[1:], v[1:]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("channels", "groups"),
    [(512, 32), (224, 32), (192, 32), (128, 32), (64, 16), (48, 12), (36, 9), (32, 8), (8, 2), (3, 1)],
)
def test_groups_of_the_norm(channels, groups):
    assert group_norm(channels).num_groups == groups
