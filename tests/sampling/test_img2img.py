"""What leads a sample: guidance in an interval and away from a worse model, and a picture to begin with."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.data.transforms import EvalTransform
from ldm.diffusion.conditioners.base import Unconditional
from ldm.diffusion.objectives import Flow
from ldm.errors import ConfigError, DataError, NumericError
from ldm.sampling.generate import generate
from ldm.sampling.guidance import Guidance
from ldm.sampling.img2img import InitImage
from ldm.sampling.pipeline import Pipeline
from ldm.sampling.samplers import ancestral, dpmpp_2m, heun, unipc


@pytest.fixture(scope="module")
def pipeline(runs):
    return Pipeline.load(runs.diffusion)


@pytest.fixture(scope="module")
def raw(runs):
    return Pipeline.load(runs.diffusion, ema=False)


class Captioned(Unconditional):
    keys = ("caption",)


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    """A file of 24 x 20 pixels, and a mask of its right half."""
    folder = tmp_path_factory.mktemp("pictures")
    pixels = np.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "picture.png")
    mask = np.zeros((20, 24), dtype=np.uint8)
    mask[:, 12:] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    return folder


def pictures(pipeline, guidance, **options):
    made = generate(
        pipeline, [1, 2], [{"class_label": 0}, {"class_label": 2}], guidance=guidance, **{"steps": 6, **options}
    )
    return np.stack([one.image for one in made]).astype(int)


def test_an_interval_of_everything_is_all_guidance_and_of_nothing_none(pipeline):
    guided, plain = pictures(pipeline, Guidance(4.0)), pictures(pipeline, Guidance())
    assert np.array_equal(pictures(pipeline, Guidance(4.0, interval=(1e-6, 1e6))), guided)
    assert np.array_equal(pictures(pipeline, Guidance(4.0, interval=(1e5, 1e6))), plain)
    some = pictures(pipeline, Guidance(4.0, interval=(0.2, 3.0)))
    assert not np.array_equal(some, guided)
    assert not np.array_equal(some, plain)


def test_a_worse_model_that_is_no_worse_changes_nothing(pipeline, raw):
    plain = pictures(pipeline, Guidance())
    assert np.abs(pictures(pipeline, Guidance(3.0, guide=pipeline)) - plain).max() <= 1
    assert np.array_equal(pictures(pipeline, Guidance(0.0, guide=raw)), pictures(raw, Guidance()))
    assert np.abs(pictures(pipeline, Guidance(3.0, guide=raw)) - plain).max() > 1


def test_a_worse_model_of_something_else_is_refused(pipeline, raw):
    other = replace(raw, manifest=replace(raw.manifest, std=[3.0] * 4))
    with pytest.raises(ConfigError, match="trained on other latents"):
        pictures(pipeline, Guidance(2.0, guide=other))
    with pytest.raises(ConfigError, match="uses another path from data to noise"):
        pictures(pipeline, Guidance(2.0, guide=replace(raw, objective=Flow())))
    fewer = replace(raw, manifest=replace(raw.manifest, plan=replace(raw.manifest.plan, num_classes=2)))
    with pytest.raises(ConfigError, match="was trained with 2 classes, the model to guide with 3"):
        pictures(pipeline, Guidance(2.0, guide=fewer))
    captioned = replace(raw, denoiser=copy.deepcopy(raw.denoiser))
    captioned.denoiser["conditioner"] = Captioned()
    with pytest.raises(ConfigError, match="reads caption, the model to guide class_label"):
        pictures(pipeline, Guidance(2.0, guide=captioned))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        *(({"scale": value}, "scale: expected a finite number") for value in (math.nan, math.inf, -math.inf)),
        *(({"rescale": value}, "rescale: expected 0 to 1, found") for value in (1.5, -0.1, math.nan, math.inf)),
        ({"interval": (2.0, 1.0)}, "interval: expected 0 <= LOW < HIGH.* found 2 and 1"),
        ({"interval": (2.0, 2.0)}, "interval: expected"),
        ({"interval": (-1.0, 2.0)}, "interval: expected"),
        ({"interval": (math.nan, 2.0)}, "interval: expected"),
        ({"interval": (math.inf, math.inf)}, "interval: expected"),
        ({"interval": (0.0, math.nan)}, "interval: expected"),
        ({"channels": 0}, "channels: expected 1 or more, found 0"),
        ({"channels": -3}, "channels: expected 1 or more, found -3"),
    ],
)
def test_what_cannot_be_is_refused(values, message):
    with pytest.raises(ConfigError, match=f"guidance {message}"):
        Guidance(**{"scale": 2.0, **values})


@pytest.mark.parametrize("way", ["no class", "guide", "classifier"])
def test_the_first_channels_alone_are_led(pipeline, raw, way):
    """In the first step, from the same noise, the other channels are as without guidance."""
    others = {"no class": {}, "guide": {"guide": raw}, "classifier": {"classifier": prefers_bright}}[way]
    x, t, labels = torch.randn(2, 4, 4, 4), torch.tensor(500.0), torch.tensor([0, 2])

    def estimate(**values):
        return Guidance(**values).denoiser(pipeline, {"class_label": labels}, 2)(x, t)

    with torch.no_grad():
        plain, whole = estimate(), estimate(scale=4.0, **others)
        for channels in (1, 3, 4):
            led = estimate(scale=4.0, channels=channels, **others)
            torch.testing.assert_close(led[:, :channels], whole[:, :channels])
            torch.testing.assert_close(led[:, channels:], plain[:, channels:])
    assert (whole - plain).abs().max() > 1e-3
    with pytest.raises(ConfigError, match=r"guidance channels: expected 1 to 4, the channels of .* found 5"):
        pictures(pipeline, Guidance(4.0, channels=5, **others))


def test_a_scale_too_large_is_named_beside_the_weights(pipeline):
    with pytest.raises(NumericError, match=r"not finite: .*or guidance 1e\+38 overflows"):
        pictures(pipeline, Guidance(1e38))
    damaged = replace(pipeline, denoiser=copy.deepcopy(pipeline.denoiser))
    for weight in damaged.denoiser.parameters():
        weight.fill_(math.nan)
    with pytest.raises(NumericError, match=r"the weights are damaged or have diverged$"):
        pictures(damaged, Guidance())


def test_ways_of_guidance_exclude_one_another(pipeline):
    with pytest.raises(ConfigError, match="rescale: only for classifier-free guidance; leave out it or guide"):
        Guidance(2.0, rescale=0.5, guide=pipeline)
    with pytest.raises(ConfigError, match="leave out it or classifier"):
        Guidance(2.0, rescale=0.5, classifier=prefers_bright)
    with pytest.raises(ConfigError, match="both another model and a classifier"):
        Guidance(2.0, guide=pipeline, classifier=prefers_bright)


def test_a_model_that_always_knew_the_class_cannot_be_led_away_from_none(pipeline):
    always = replace(pipeline, label_dropout=0.0)
    with pytest.raises(ConfigError, match="never trained without its conditions"):
        pictures(always, Guidance(2.0))
    with pytest.raises(ConfigError, match="conditions: found none, but this model was never trained"):
        list(generate(always, [1]))
    assert np.array_equal(pictures(always, Guidance()), pictures(pipeline, Guidance()))
    with pytest.raises(ConfigError, match="found none, but this model was never trained"):
        list(generate(pipeline, [1], guidance=Guidance(2.0, guide=always)))
    assert len(pictures(always, Guidance(2.0, guide=replace(always, objective=pipeline.objective)))) == 2


def prefers_bright(x, t, labels):
    """Class 2 is large values of the first channel, class 0 small ones."""
    return (labels - 1) * x[:, 0].mean((1, 2))


def test_a_classifier_leads_a_model_without_classes(make_runs):
    pipeline = Pipeline.load(make_runs(classes=None).diffusion)
    knows = replace(pipeline, manifest=replace(pipeline.manifest, plan=replace(pipeline.manifest.plan, num_classes=3)))
    means = {scale: [] for scale in (0.0, 5.0)}
    knows.codec.decode = lambda latents: means[scale].append(latents[:, 0].mean((1, 2))) or torch.zeros(2, 3, 16, 16)
    for scale in means:
        pictures(knows, Guidance(scale, classifier=prefers_bright))
    (alone,), ((dark, bright),) = means[0.0], means[5.0]
    assert dark < alone[0]
    assert bright > alone[1]
    with pytest.raises(ConfigError, match="no classes are requested"):
        list(generate(knows, [1], guidance=Guidance(classifier=prefers_bright)))
    with pytest.raises(ConfigError, match="class 3: expected 0 to 2"):
        list(generate(knows, [1], [{"class_label": 3}], guidance=Guidance(classifier=prefers_bright)))
    with pytest.raises(ConfigError, match="class 0: expected none of the training data"):
        list(generate(pipeline, [1], [{"class_label": 0}], guidance=Guidance(classifier=prefers_bright)))


def test_a_picture_is_kept_the_more_the_lower_the_strength(pipeline, picture):
    init_image = [InitImage.read(pipeline.manifest, picture / "picture.png", strength) for strength in (0.05, 0.5, 1.0)]
    assert init_image[0].image.shape == (3, 16, 16)
    through = pipeline.codec.decode(pipeline.codec.encode(init_image[0].image[None])[0])
    coded = ((through[0] + 1) * 127.5).round().permute(1, 2, 0).numpy()
    made = [pictures(pipeline, Guidance(), steps=20, init_image=one) for one in init_image]
    gaps = [np.abs(one - coded).mean() for one in made]
    assert gaps[0] < gaps[1] < gaps[2]


@pytest.mark.parametrize(("strength", "steps", "left"), [(1.0, 10, 10), (0.5, 10, 5), (0.01, 10, 1), (0.6, 5, 3)])
def test_strength_is_a_share_of_the_steps(pipeline, strength, steps, left):
    times = pipeline.objective.timesteps(steps)
    found = InitImage(torch.zeros(3, 16, 16), strength).times(times)
    assert len(found) == left + 1
    assert torch.equal(found, times[-left - 1 :])


@pytest.mark.parametrize("sampler", [ancestral, heun, dpmpp_2m, unipc])
def test_what_is_outside_the_mask_stays_pixel_for_pixel(pipeline, picture, sampler):
    init_image = InitImage.read(pipeline.manifest, picture / "picture.png", 1.0, picture / "mask.png")
    made = pictures(pipeline, Guidance(), init_image=init_image, sampler=sampler)
    before = ((init_image.image + 1) * 127.5).round().permute(1, 2, 0).numpy().astype(int)
    kept = ~init_image.mask.numpy()
    assert 0.3 < kept.mean() < 0.6
    assert np.array_equal(made[:, kept], np.stack([before[kept]] * 2))
    assert np.abs(made[0] - made[1])[~kept].mean() > 5


def test_a_latent_place_with_one_free_pixel_is_free():
    free = torch.zeros(16, 16, dtype=torch.bool)
    free[5, 6] = True
    kept = InitImage(torch.zeros(3, 16, 16), mask=free).latent_mask((4, 4, 4))
    assert (~kept).nonzero().tolist() == [[1, 1]]
    assert InitImage(torch.zeros(3, 16, 16)).latent_mask((4, 4, 4)) is None


def test_strengths_and_masks_that_cannot_be(pipeline, picture, tmp_path):
    for strength in (0.0, 1.1, math.nan):
        with pytest.raises(ConfigError, match="strength: expected"):
            InitImage(torch.zeros(3, 16, 16), strength)
    Image.new("L", (24, 20)).save(tmp_path / "black.png")
    with pytest.raises(ConfigError, match="all of it is black"):
        InitImage.read(pipeline.manifest, picture / "picture.png", 1.0, tmp_path / "black.png")
    Image.new("L", (20, 20), "white").save(tmp_path / "square.png")
    with pytest.raises(ConfigError, match=r"square\.png: expected the size of .*24 x 20, found 20 x 20"):
        InitImage.read(pipeline.manifest, picture / "picture.png", 1.0, tmp_path / "square.png")
    with pytest.raises(DataError, match=r"nothing\.png"):
        InitImage.read(pipeline.manifest, tmp_path / "nothing.png", 1.0)


def of_pixels(pipeline, **pixels):
    """The manifest of a model of other pixels."""
    plan = pipeline.manifest.plan
    return replace(pipeline.manifest, plan=replace(plan, pixels={**plan.pixels, **pixels}))


def test_a_picture_is_decoded_as_those_trained_on(pipeline, tmp_path):
    Image.fromarray(np.full((16, 16), 4095, dtype=np.uint16)).save(tmp_path / "white.png")

    def read(manifest):
        return InitImage.read(manifest, tmp_path / "white.png", 1.0).image

    assert (read(of_pixels(pipeline, value_range=[0, 4095], channels=1)) == 1).all()
    assert read(of_pixels(pipeline, value_range=[0, 4095])).shape == (3, 16, 16)
    for nothing in ({}, {"value_range": None}):  # as a model from before this was noted says
        assert read(of_pixels(pipeline, **nothing)).mean() < -0.8


def test_a_picture_is_resized_as_those_trained_on(pipeline, picture):
    for name in ("nearest", "bilinear", "bicubic"):
        found = InitImage.read(of_pixels(pipeline, interpolation=name), picture / "picture.png", 1.0).image
        with Image.open(picture / "picture.png") as image:
            assert torch.equal(found, EvalTransform(16, name)(image.convert("RGB")))


def test_a_picture_to_begin_with_is_neither_square_nor_of_three_channels(pipeline, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (24, 36, 5), dtype=np.uint8)
    np.save(tmp_path / "five.npy", pixels)
    Image.fromarray(pixels[..., :4]).save(tmp_path / "four.png")
    mask = np.zeros((24, 36), np.uint8)
    mask[:, 18:] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    wide = EvalTransform([16, 24])
    expected = {
        "five.npy": wide(torch.from_numpy(pixels.transpose(2, 0, 1).copy())),
        "four.png": wide(Image.fromarray(pixels[..., :4])),
    }
    for name, image in expected.items():
        manifest = of_pixels(pipeline, resolution=[16, 24], channels=len(image))
        found = InitImage.read(manifest, tmp_path / name, 1.0, tmp_path / "mask.png")
        assert torch.equal(found.image, image)
        assert found.mask.tolist() == [[False] * 12 + [True] * 12] * 16
        assert found.latent_mask((4, 4, 6)).tolist() == [[True] * 3 + [False] * 3] * 4
    Image.fromarray(mask[:, :24]).save(tmp_path / "square.png")
    manifest = of_pixels(pipeline, resolution=[16, 24], channels=5)
    with pytest.raises(ConfigError, match=r"square\.png: expected the size of .*five.npy, 36 x 24, found 24 x 24"):
        InitImage.read(manifest, tmp_path / "five.npy", 1.0, tmp_path / "square.png")
    np.save(tmp_path / "flat.npy", mask)
    with pytest.raises(DataError, match=r"flat\.npy: expected one picture \(H,W,C\) of uint8, found \(24, 36\)"):
        InitImage.read(manifest, tmp_path / "flat.npy", 1.0)


def test_whatever_goes_wrong_with_a_picture_names_it(pipeline, picture, monkeypatch):
    def fails(*args):
        raise RuntimeError("no memory")

    monkeypatch.setattr(EvalTransform, "__call__", fails)
    with pytest.raises(RuntimeError) as caught:
        InitImage.read(pipeline.manifest, picture / "picture.png", 1.0)
    assert "picture.png, 24 x 20 pixels" in caught.value.__notes__[0]
