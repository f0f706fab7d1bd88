"""Vision models of transformers, with random weights, as features and as conditioners."""

import hashlib
import json

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.diffusion.conditioners import vision_models
from ldm.diffusion.conditioners.features import Feature, columns, held, stacked
from ldm.diffusion.conditioners.joint import Joint
from ldm.diffusion.conditioners.pictures import FeaturePicture, PictureEncoder
from ldm.errors import CheckpointError, ConfigError, DataError
from ldm.randomness import Draws

transformers = pytest.importorskip("transformers")
CPU = torch.device("cpu")
SIZES = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2, "patch_size": 8}


def clip():
    config = transformers.CLIPVisionConfig(**SIZES, intermediate_size=64, image_size=16, projection_dim=8)
    return transformers.CLIPVisionModelWithProjection(config)


def whole_clip():
    vision = {**SIZES, "intermediate_size": 64, "image_size": 16, "projection_dim": 8}
    text = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
    return transformers.CLIPModel(transformers.CLIPConfig(vision_config=vision, text_config=text, projection_dim=8))


MODELS = {
    "clip": clip,
    "whole clip": whole_clip,
    "dinov2": lambda: transformers.Dinov2Model(transformers.Dinov2Config(**SIZES, image_size=24)),
    "siglip": lambda: transformers.SiglipVisionModel(
        transformers.SiglipVisionConfig(**SIZES, intermediate_size=64, image_size=16)
    ),
    "vit": lambda: transformers.ViTModel(transformers.ViTConfig(**SIZES, intermediate_size=64, image_size=16)),
}


def saved(folder, network, seed=0):
    torch.manual_seed(seed)
    for parameter in network.parameters():  # transformers' own are so small that pictures hardly differ
        torch.nn.init.normal_(parameter, std=0.2)
    network.save_pretrained(folder)
    sizes = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    transformers.CLIPImageProcessor(**sizes).save_pretrained(folder)
    return folder


def painting(seed=0, size=(24, 40)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("clip"), clip())


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where hashes of models are remembered
    vision_models.opened.cache_clear()


@pytest.mark.parametrize("name", MODELS)
def test_it_makes_what_transformers_makes(name, tmp_path):
    network = MODELS[name]().eval()
    feature = PictureEncoder(saved(tmp_path, network), tokens=True, dtype="float32")
    assert isinstance(feature, Feature)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    pixels = processor(images=painting(), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        half = network.vision_model if name in ("clip", "whole clip") else network
        expected = half(pixel_values=pixels)
    made = feature.encode(painting(), CPU)
    assert {key: (one.shape, one.dtype) for key, one in made.items()} == {
        key: (torch.Size(part.shape), part.dtype) for key, part in feature.parts.items()
    }
    torch.testing.assert_close(made["tokens"], expected.last_hidden_state[0], rtol=1e-4, atol=1e-5)
    vector = expected.last_hidden_state[0, 0] if name == "vit" else expected.pooler_output[0]
    torch.testing.assert_close(made["vector"], vector, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["clip", "whole clip"])
def test_projected_it_lies_in_the_space_of_texts(name, tmp_path):
    network = MODELS[name]().eval()
    made = PictureEncoder(saved(tmp_path, network), projected=True, dtype="float32").encode(painting(), CPU)
    pixels = transformers.CLIPImageProcessor.from_pretrained(tmp_path)(images=painting(), return_tensors="pt")
    with torch.no_grad():
        pooled = network.vision_model(**pixels).pooler_output
    torch.testing.assert_close(made["vector"], network.visual_projection(pooled)[0], rtol=1e-4, atol=1e-5)


def test_shapes_are_known_without_the_weights_and_memory_is_given_back(folder):
    feature = PictureEncoder(folder, tokens=True)
    assert {name: part.shape for name, part in feature.parts.items()} == {"vector": (32,), "tokens": (5, 32)}
    assert not feature.model.is_loaded
    weights = feature.describe()["weights"]
    assert not feature.model.is_loaded
    feature.encode(painting(), CPU)
    assert feature.model.is_loaded
    feature.release()
    assert not feature.model.is_loaded
    assert feature.describe()["weights"] == weights


def test_its_description_tells_weights_processor_and_settings_but_not_the_place(folder, tmp_path):
    known = PictureEncoder(folder).describe()
    json.dumps(known)
    moved = PictureEncoder(saved(tmp_path / "moved", clip()))
    assert moved.describe() == known
    other = PictureEncoder(saved(tmp_path / "other", clip(), seed=1)).describe()
    assert other["weights"] != known["weights"]
    wider = saved(tmp_path / "wider", clip())
    transformers.CLIPImageProcessor(size={"shortest_edge": 18}, crop_size=16).save_pretrained(wider)
    assert PictureEncoder(wider).describe()["processor"] != known["processor"]
    assert PictureEncoder(folder, dtype="float32").describe() != known


def test_a_picture_comes_as_pil_as_whole_numbers_or_in_minus_one_to_one(folder):
    feature, pixels = PictureEncoder(folder), np.asarray(painting())
    expected = feature.encode(painting(), CPU)["vector"]
    whole = torch.from_numpy(pixels.copy())
    for same in (pixels, whole, whole.long(), whole.permute(2, 0, 1).float() / 127.5 - 1):
        assert torch.equal(feature.encode(same, CPU)["vector"], expected)
    gray = Image.new("L", (20, 20), 99)
    assert torch.equal(
        feature.encode(gray, CPU)["vector"], feature.encode(np.full((20, 20, 1), 99, np.uint8), CPU)["vector"]
    )
    wide = np.full((4, 4, 3), 256, np.uint16)
    for wrong in (
        "a cat",
        wide,
        np.zeros((4, 4, 2), np.uint8),
        torch.zeros(4, 4),
        Image.new("I;16", (4, 4)),
    ):
        with pytest.raises(DataError, match="image: expected"):
            feature.encode(wrong, CPU)


def test_cached_and_uncached_are_the_same_bits(folder):
    feature = PictureEncoder(folder, tokens=True)
    conditioner = FeaturePicture(feature)
    pictures = [painting(seed, (16 + seed, 20)) for seed in range(3)]
    cached = stacked(feature, "picture", [feature.encode(one, CPU) for one in pictures])
    assert held(feature, "picture", cached)
    live, kept = conditioner({"image": pictures}), conditioner(cached)
    assert torch.equal(live.vector, kept.vector)
    assert torch.equal(live.tokens, kept.tokens)
    assert not feature.model.is_loaded  # no longer needed
    assert columns(feature, "picture", {"image": pictures}, torch.device("meta"))["picture.tokens"].shape == (3, 5, 32)


def test_null_is_zeros_without_the_model_and_rows_become_it_at_their_rate(folder):
    feature, n = PictureEncoder(folder), 10_000
    conditioner = Joint({"picture": FeaturePicture(feature)}, {"picture": 0.1}).train()
    null = conditioner.null(2)
    assert null.vector.eq(torch.zeros(2, 32)).all()
    assert not feature.model.is_loaded
    found = conditioner({"picture.vector": torch.ones(n, 32).half(), "draws": Draws(0, range(n), n)})
    assert found.vector.eq(0).all(1).float().mean().item() == pytest.approx(0.1, abs=0.01)
    assert found.vector.sum(1).unique().tolist() == [0, 32]


def test_a_checkpoint_knows_its_model(folder, tmp_path):
    state = FeaturePicture(PictureEncoder(folder)).state_dict()
    assert [*state] == ["_extra_state"]
    FeaturePicture(PictureEncoder(saved(tmp_path / "moved", clip()))).load_state_dict(state)
    other = FeaturePicture(PictureEncoder(saved(tmp_path / "other", clip(), seed=1)))
    with pytest.raises(CheckpointError, match="not the vision model that this model was trained with"):
        other.load_state_dict(state)
    other.load_state_dict({})
    wider = saved(tmp_path / "wider", clip())
    transformers.CLIPImageProcessor(size={"shortest_edge": 18}, crop_size=16).save_pretrained(wider)
    with pytest.raises(CheckpointError, match="that this model was trained with: processor "):
        FeaturePicture(PictureEncoder(wider)).load_state_dict(state)


def test_what_is_missing_is_named(folder, tmp_path):
    with pytest.raises(ConfigError, match="expected vector, tokens, or both"):
        PictureEncoder(folder, vector=False)
    with pytest.raises(CheckpointError, match="no vision model"):
        PictureEncoder(tmp_path).describe()
    bare = saved(tmp_path / "bare", clip())
    (bare / "preprocessor_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no preprocessor_config\.json"):
        _ = PictureEncoder(bare).parts
    dino = saved(tmp_path / "dino", MODELS["dinov2"]())
    with pytest.raises(ConfigError, match=r"projected: .* is a dinov2"):
        _ = PictureEncoder(dino, projected=True).parts
    (dino / "model.safetensors").write_bytes(hashlib.sha256(b"").digest())
    with pytest.raises(CheckpointError, match="cannot be read as a vision model"):
        PictureEncoder(dino).describe()
    with pytest.raises(ConfigError, match=r"neither pictures nor picture\.\*"):
        FeaturePicture(PictureEncoder(folder))({"class_label": torch.zeros(2)})
