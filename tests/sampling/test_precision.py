"""A pipeline in bf16: its network and decoder alone, whose pictures are nearly those of float32."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from ldm.autoencoder.tiling import Tiling
from ldm.sampling.generate import generate
from ldm.sampling.guidance import Guidance
from ldm.sampling.img2img import InitImage
from ldm.sampling.pipeline import Pipeline
from ldm.sampling.precision import computing_in, network
from ldm.sampling.samplers import ancestral, ddim

SEEDS, LABELS = [3, 1, 4, 1, 5, 9, 2, 6], [0, 1, 2, 2, 1, 0, 0, 1]


@pytest.fixture(scope="module")
def whole(runs):
    return Pipeline.load(runs.diffusion)


@pytest.fixture(scope="module")
def half(runs):
    return Pipeline.load(runs.diffusion, compute=torch.bfloat16)


def pictures(pipeline, **options):
    """(N,H,W,C) int16, so that differences do not wrap around."""
    conditions = [{"class_label": label} for label in LABELS]
    made = generate(pipeline, SEEDS, conditions, **{"steps": 4, "guidance": Guidance(2.0), **options})
    return np.stack([sample.image for sample in made]).astype(np.int16)


def rms(values):
    return float(np.sqrt(np.square(values.astype(float)).mean()))


def rounding(pipeline, found):
    """How far bf16 may move pictures: a layer's values by 2^-8 of themselves, independently of the other layers'."""
    parts = (pipeline.denoiser["network"], *pipeline.codec.decoders)
    layers = sum(not [*module.children()] for part in parts for module in part.modules())
    return 2**-8 * layers**0.5 * float(found.std())


@pytest.mark.parametrize("sampler", [ddim, ancestral])
def test_pictures_are_nearly_those_of_float32_and_the_same_each_time(whole, half, sampler):
    expected, found = (pictures(one, sampler=sampler, guidance=Guidance()) for one in (whole, half))
    assert 0 < rms(found - expected) < rounding(whole, expected)
    assert np.array_equal(pictures(half, sampler=sampler, guidance=Guidance()), found)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_picture_depends_on_its_batch_by_rounding_alone(whole, half, batch_size):
    together = pictures(half, batch_size=8)
    assert rms(pictures(half, batch_size=batch_size) - together) <= rms(together - pictures(whole))


def test_the_weights_are_converted_beforehand_and_make_the_pictures_of_autocast(runs, whole, half):
    unconverted = replace(Pipeline.load(runs.diffusion), compute=torch.bfloat16)
    assert np.array_equal(pictures(half), pictures(unconverted))
    for part, kept in (("network", False), ("conditioner", True)):
        types = {weight.dtype for weight in half.denoiser[part].parameters()}
        assert (types == {torch.float32}) == kept
    assert {weight.dtype for weight in half.codec.encoder.parameters()} == {torch.float32}
    assert half.codec.decoder.conv_in.weight.dtype == torch.bfloat16
    # The encoder, and what is made of its latents, is the same.
    image = torch.rand(1, 3, 16, 16)
    assert torch.equal(half.codec.encode(image)[0], whole.codec.encode(image)[0])


@pytest.fixture
def seen(monkeypatch):
    """watch(pipeline) -> {part: whether it is called under autocast, whenever it is}."""

    def watch(pipeline):
        found = {}
        parts = {**pipeline.denoiser, **{name: getattr(pipeline.codec, name) for name in ("encoder", "decoder")}}
        for name, part in parts.items():
            states = found[name] = set()
            forward = part.forward

            def watched(*inputs, states=states, forward=forward):
                states.add(torch.is_autocast_enabled("cpu"))
                return forward(*inputs)

            monkeypatch.setattr(part, "forward", watched)
        return found

    return watch


BEGUN = InitImage(torch.zeros(3, 16, 16), 0.5)


def test_the_network_and_the_decoder_alone_are_under_autocast(half, seen):
    found = seen(half)
    levels = []

    def watched(denoise, objective, x, times, draws):
        def noted(x, t):
            x0 = denoise(x, t)
            levels.append((x.dtype, x0.dtype, torch.is_autocast_enabled("cpu")))
            return x0

        return ddim(noted, objective, x, times, draws=draws)

    pictures(half, sampler=watched, init_image=BEGUN)
    assert found == {"network": {True}, "conditioner": {False}, "encoder": {False}, "decoder": {True}}
    assert {*levels} == {(torch.float32, torch.float32, False)}


@pytest.mark.parametrize("around", [False, True], ids=["alone", "in training"])
def test_in_float32_what_surrounds_it_goes_on(runs, whole, seen, around):
    """Previews are made in the precision of the run that they belong to."""
    live = Pipeline.from_module(runs.module, copy.deepcopy(whole.codec), whole.manifest)
    found = seen(live)
    with torch.autocast("cpu", torch.bfloat16, enabled=around):
        pictures(live, init_image=BEGUN)
    assert found == {"network": {around}, "conditioner": {around}, "encoder": {False}, "decoder": {around}}


def test_a_guiding_model_computes_in_its_own_precision(runs, whole, half):
    """Each is called by itself, so that the two may differ."""
    raw = {one: Pipeline.load(runs.diffusion, ema=False, compute=one) for one in (torch.float32, torch.bfloat16)}
    guided = [
        pictures(half, guidance=Guidance(2.0, guide=raw[torch.float32])),
        pictures(half, guidance=Guidance(2.0, guide=raw[torch.bfloat16])),
        pictures(whole, guidance=Guidance(2.0, guide=raw[torch.bfloat16])),
    ]
    expected = pictures(whole, guidance=Guidance(2.0, guide=raw[torch.float32]))
    for found in guided:
        # Guidance at scale 2 adds twice the one error and once the other.
        assert 0 < rms(found - expected) < 3 * rounding(whole, expected)


def test_a_classifier_computes_in_float32(half):
    types = []

    def log_probability(x, t, labels):
        types.append((x.dtype, torch.is_autocast_enabled("cpu")))
        return -x.square().flatten(1).sum(1)

    pictures(half, guidance=Guidance(1.0, classifier=log_probability))
    assert {*types} == {(torch.float32, False)}


def test_larger_pictures_in_tiles(whole, half):
    asked = {"size": (16, 32), "tile": Tiling((16, 16), 8)}
    expected, found = (pictures(one, **asked) for one in (whole, half))
    assert 0 < rms(found - expected) < rounding(whole, expected) * 3  # guidance at scale 2
    assert half.latent_shape((16, 48)) == whole.latent_shape((16, 48))  # which calls the network


def test_weights_are_not_converted_back_nor_to_other_types(half, whole):
    assert computing_in(half, torch.bfloat16) is half
    assert computing_in(whole, torch.float32) is whole
    with pytest.raises(ValueError, match=r"found torch\.float32"):
        computing_in(half, torch.float32)
    with pytest.raises(ValueError, match=r"found torch\.float16"):
        computing_in(whole, torch.float16)


def test_the_network_is_called_as_it_is_in_float32(whole):
    x, t = torch.randn(2, 4, 4, 4), torch.tensor([3.0, 5.0])
    null = whole.conditioner.null(2)
    with torch.no_grad():
        assert torch.equal(network(whole)(x, t, null), whole.denoiser["network"](x, t, null))
