"""Classifier-free guidance against its formula, and what it costs."""

import torch

from ldm.diffusion.conditioning import Conditioning
from ldm.diffusion.guidance import classifier_free


class Counted:
    """denoise(x, t, c) = 0.5 x + c, counting calls and their rows."""

    def __init__(self):
        self.rows = []

    def __call__(self, x, t, conditioning):
        self.rows.append(len(x))
        assert t.shape in ((), (len(x),))
        assert len(conditioning.vector) == len(x)
        return 0.5 * x + conditioning.vector[:, :, None, None]


told, untold = Conditioning(vector=torch.tensor([[1.0, 2.0], [3.0, 4.0]])), Conditioning(vector=torch.zeros(2, 2))
x = torch.randn(2, 2, 3, 3)


def test_formula_in_one_call_on_all_channels():
    for t in (torch.tensor(5.0), torch.tensor([5.0, 6.0])):
        denoise = Counted()
        guided = classifier_free(denoise, told, untold, 2.5)(x, t)
        torch.testing.assert_close(guided, 0.5 * x + 2.5 * told.vector[:, :, None, None])
        assert denoise.rows == [4]


def test_scale_one_is_the_identity_at_no_cost():
    denoise = Counted()
    guided = classifier_free(denoise, told, untold, 1.0)(x, torch.tensor(5.0))
    assert torch.equal(guided, 0.5 * x + told.vector[:, :, None, None])
    assert denoise.rows == [2]


def test_scale_zero_is_unconditional():
    torch.testing.assert_close(classifier_free(Counted(), told, untold, 0.0)(x, torch.tensor(5.0)), 0.5 * x)
