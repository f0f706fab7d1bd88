import numpy as np
import pytest
import torch
from PIL import Image
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x
from torchvision.transforms.functional import InterpolationMode, resize

from ldm.evaluation.features.resize import Clean, Pillow, TensorFlow1

SIZES = [(299, 299), (64, 64), (16, 16), (31, 20), (40, 100)]  # larger, smaller, both; from 40 x 48


@pytest.mark.parametrize("size", SIZES)
def test_clean_is_pillow_in_float_channel_by_channel(pictures, size):
    height, width = size
    expected = np.empty((*pictures.shape[:2], *size), dtype=np.float32)
    for image, target in zip(pictures.numpy(), expected, strict=True):
        for channel in range(3):
            one = Image.fromarray(image[channel].astype(np.float32))
            target[channel] = np.asarray(one.resize((width, height), Image.Resampling.BICUBIC)).clip(0, 255)
    torch.testing.assert_close(Clean(size)(pictures), torch.from_numpy(expected), atol=1e-4, rtol=0)


@pytest.mark.parametrize("size", SIZES)
def test_pillow_is_torchvision_on_an_image_of_pillow(pictures, size):
    images = [Image.fromarray(image) for image in pictures.permute(0, 2, 3, 1).numpy()]
    expected = np.stack([np.asarray(resize(image, list(size), InterpolationMode.BICUBIC)) for image in images])
    resized = Pillow(size)(pictures)
    assert resized.dtype == torch.float32
    assert torch.equal(resized, torch.from_numpy(expected).permute(0, 3, 1, 2).float())


@pytest.mark.parametrize("size", [299, 64, 16])
def test_tensorflow1_is_that_of_torch_fidelity(pictures, size):
    expected = interpolate_bilinear_2d_like_tensorflow1x(pictures.float(), size=(size, size), align_corners=False)
    assert torch.equal(TensorFlow1(size)(pictures), expected)


@pytest.mark.parametrize("rule", [Clean, Pillow, TensorFlow1])
def test_a_picture_of_the_right_size_passes_unchanged(pictures, rule):
    square = pictures[:, :, :40, :40]
    assert torch.equal(rule(40)(square), square.float())


@pytest.mark.parametrize("rule", [Clean, Pillow, TensorFlow1])
def test_pixels_stay_in_range(rule):
    images = torch.zeros(1, 1, 16, 16, dtype=torch.uint8)
    images[:, :, 4:12, 4:12] = 255  # bicubic rings at its edges
    resized = rule(50)(images)
    assert 0 <= resized.min() < resized.max() <= 255


def test_only_antialiased_rules_average_what_is_left_out():
    stripes = torch.zeros(1, 1, 64, 64, dtype=torch.uint8)
    stripes[..., ::2] = 255
    assert Clean(16)(stripes).std() < 10
    assert Pillow(16)(stripes).std() < 10
    assert TensorFlow1(16)(stripes).unique().tolist() == [255.0]


def test_names_tell_rule_and_size():
    names = [rule.name for rule in (Clean(224), Pillow((32, 48)), TensorFlow1(299))]
    assert names == ["clean-224", "pillow-32x48", "tf1-299"]
