import io
import math

import numpy as np
import pytest
from PIL import Image

from ldm.data.degradation_steps import (
    AnisotropicBlur,
    GaussianNoise,
    IsotropicBlur,
    Jpeg,
    OneOf,
    PoissonNoise,
    Resize,
    Sometimes,
    blurred,
    gaussian_kernel,
    resized,
)
from ldm.data.drawn import generator
from ldm.errors import ConfigError

FULL = (40, 56)
PIXELS = np.random.default_rng(0).integers(0, 256, (3, *FULL), dtype=np.uint8)


def flat(value, channels=3, side=128):
    return np.full((channels, side, side), value, dtype=np.uint8)


def random(number=0):
    return generator(0, "steps", number)


# ---- blur ----


@pytest.mark.parametrize(("variances", "angle"), [((2.25, 2.25), 0.0), ((6.0, 1.5), 0.7), ((1.0, 8.0), 2.5)])
def test_a_kernel_sums_to_one_and_has_its_variances(variances, angle):
    kernel = gaussian_kernel(variances, angle)
    assert kernel.sum() == 2**16
    assert kernel.min() >= 0
    assert np.array_equal(kernel, kernel[::-1, ::-1])
    radius = len(kernel) // 2
    assert radius == math.ceil(3 * math.sqrt(max(variances)))
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    found = np.array([[(kernel * a * b).sum() for b in (x, y)] for a in (x, y)]) / 2**16
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    expected = turn @ np.diag(variances) @ turn.T
    assert np.allclose(found, expected, atol=0.03 * max(variances)), "three standard deviations cut a little off"


def test_no_variance_is_no_blur():
    assert gaussian_kernel((0.0, 0.0), 1.0).tolist() == [[2**16]]
    assert np.array_equal(IsotropicBlur((0, 0))(PIXELS, FULL, random()), PIXELS)


@pytest.mark.parametrize("size", [FULL, (5, 3), (1, 1)])
def test_a_blur_is_the_exact_sum_rounded_once(size):
    pixels, kernel = PIXELS[:, : size[0], : size[1]], gaussian_kernel((4.0, 1.0), 0.5)
    radius = len(kernel) // 2
    padded = np.pad(pixels, ((0, 0), (radius, radius), (radius, radius)), mode="reflect").astype(np.int64)
    windows = np.lib.stride_tricks.sliding_window_view(padded, kernel.shape, (1, 2))
    sums = (windows * kernel[::-1, ::-1]).sum((-2, -1))
    assert np.array_equal(blurred(pixels, kernel), (sums + 2**15) >> 16)


def test_a_blur_keeps_what_is_flat_and_spreads_a_point():
    assert np.array_equal(blurred(flat(255), gaussian_kernel((3.0, 3.0), 0.0)), flat(255))
    point = flat(0, 1, 33)
    point[0, 16, 16] = 255
    kernel = gaussian_kernel((4.0, 1.0), 0.4)
    radius = len(kernel) // 2
    spread = blurred(point, kernel)[0, 16 - radius : 17 + radius, 16 - radius : 17 + radius]
    assert np.array_equal(spread, (kernel * 255 + 2**15) >> 16)


def test_an_anisotropic_blur_is_wider_one_way():
    point = flat(0, 1, 65)
    point[0, 32, 32] = 255
    y, x = np.mgrid[-32:33, -32:33]
    ratios = []
    for number in range(20):
        seen = AnisotropicBlur((0.5, 12.0))(point, FULL, random(number))[0].astype(float)
        axes = np.linalg.eigvalsh([[(seen * a * b).sum() for b in (x, y)] for a in (x, y)])
        ratios.append(axes[1] / axes[0])
    assert max(ratios) > 3


# ---- resizing ----


@pytest.mark.parametrize("kernel", ["nearest", "bilinear", "bicubic", "box"])
def test_each_channel_is_resized_as_pillow_does(kernel):
    made = resized(PIXELS, (17, 23), kernel)
    whole = Image.fromarray(PIXELS.transpose(1, 2, 0)).resize((23, 17), Image.Resampling[kernel.upper()])
    assert np.array_equal(made.transpose(1, 2, 0), np.asarray(whole))


def test_the_factor_is_that_of_the_full_picture():
    assert Resize((4, 4))(PIXELS[:, :20, :28], FULL, random()).shape == (3, 10, 14)
    assert Resize((100, 100))(PIXELS, FULL, random()).shape == (3, 1, 1)
    heights = {Resize((1, 8))(PIXELS, FULL, random(number)).shape[1] for number in range(60)}
    assert 5 <= min(heights) < 8
    assert 25 < max(heights) <= 40


# ---- noise ----


def test_gaussian_noise_has_its_deviation_and_colors():
    each = GaussianNoise((10, 10), gray=0)(flat(128), FULL, random()).astype(float) - 128
    # Its variance, and a twelfth for rounding; over 49152 pixels the deviation is known to 0.3 %.
    assert each.std() == pytest.approx(math.sqrt(100 + 1 / 12), rel=0.02)
    assert abs(each.mean()) < 0.25
    assert abs(np.corrcoef(each.reshape(3, -1)) - np.eye(3)).max() < 0.04
    same = GaussianNoise((10, 10), gray=1)(flat(128), FULL, random())
    assert np.array_equal(same[0], same[1])
    assert same.std() == pytest.approx(10, rel=0.03)


@pytest.mark.parametrize("value", [40, 160])
def test_poisson_noise_grows_with_brightness(value):
    # Photons seen: value / 255 * 1000; each is worth 255 / 1000 levels.
    expected = math.sqrt(value / 255 * 1000) * 255 / 1000
    each = PoissonNoise((3, 3), gray=0)(flat(value), FULL, random()).astype(float)
    assert each.std() == pytest.approx(math.sqrt(expected**2 + 1 / 12), rel=0.03)
    assert each.mean() == pytest.approx(value, abs=0.3)
    same = PoissonNoise((3, 3), gray=1)(flat(value), FULL, random())
    assert np.array_equal(same[0], same[2])
    assert same.std() == pytest.approx(expected, rel=0.04)


def test_noise_does_not_wrap_around():
    assert GaussianNoise((30, 30))(flat(255), FULL, random()).min() > 80
    assert GaussianNoise((30, 30))(flat(0), FULL, random()).max() < 180
    assert np.array_equal(PoissonNoise()(flat(0), FULL, random()), flat(0))


# ---- JPEG ----


@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_is_pillows(channels):
    made = Jpeg((40, 40))(PIXELS[:channels], FULL, random())
    picture = Image.fromarray(PIXELS[0] if channels == 1 else PIXELS.transpose(1, 2, 0))
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=40)
    theirs = np.asarray(Image.open(file))
    assert np.array_equal(made, theirs[None] if channels == 1 else theirs.transpose(2, 0, 1))


def test_the_quality_is_drawn():
    smooth = resized(PIXELS[:, :5, :7], FULL, "bicubic").astype(int)
    errors = [np.abs(Jpeg((5, 95))(smooth.astype(np.uint8), FULL, random(n)) - smooth).mean() for n in range(30)]
    assert max(errors) > 4 * min(errors)


# ---- steps of steps ----


def test_sometimes_and_one_of_follow_their_probabilities():
    bright, dark = GaussianNoise((1, 1)), Resize((2, 2))
    done = [Sometimes(dark, 0.3)(flat(9, 1, 4), (4, 4), random(number)).shape[1] for number in range(1000)]
    assert abs(done.count(2) - 300) < 5 * math.sqrt(210)
    choice = OneOf([bright, dark], [3, 1])
    done = [choice(flat(9, 1, 4), (4, 4), random(number)).shape[1] for number in range(1000)]
    assert abs(done.count(2) - 250) < 5 * math.sqrt(187.5)


def test_channels_are_checked_within():
    for step in (Jpeg((1, 95)), Sometimes(Jpeg((1, 95)), 0.1), OneOf([Resize((1, 2)), Jpeg((1, 95))])):
        step.check(1)
        step.check(3)
        with pytest.raises(ConfigError, match="Jpeg: expected pictures of 1 or 3 channels, found 2"):
            step.check(2)


@pytest.mark.parametrize(
    ("make", "params", "message"),
    [
        (IsotropicBlur, {"std": (2, 1)}, r"IsotropicBlur\.std: expected \[low, high\]"),
        (AnisotropicBlur, {"variance": (2, 1)}, r"AnisotropicBlur\.variance: expected"),
        (Resize, {"factor": (2, 1)}, r"Resize\.factor: expected"),
        (GaussianNoise, {"std": (2, 1)}, r"GaussianNoise\.std: expected"),
        (PoissonNoise, {"photons": (2, 1)}, r"PoissonNoise\.photons: expected"),
        (Jpeg, {"quality": (95, 30)}, r"Jpeg\.quality: expected .* found \[95, 30\]: exchange them"),
        (Jpeg, {"quality": (30, 101)}, r"Jpeg\.quality: expected numbers from 1 to 100"),
        (Resize, {"factor": (1, 2), "kernels": ["cubic"]}, r"Resize\.kernels: expected some of .*, found cubic"),
        (Resize, {"factor": (1, 2), "kernels": []}, r"Resize\.kernels: .* found none"),
        (OneOf, {"steps": [Jpeg((1, 2))], "weights": [0]}, r"OneOf\.weights: expected weights from 0 up"),
        (OneOf, {"steps": []}, r"OneOf\.weights: expected one weight for each of 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(make, params, message):
    with pytest.raises(ConfigError, match=message):
        make(**params)
