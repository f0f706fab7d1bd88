"""Frozen text encoders: the tokens of transformers to the bit, and nothing of them in the model."""

import copy
import json
import shutil

import pytest
import torch
from torch import nn

from ldm.config.load import build
from ldm.diffusion.conditioners import text
from ldm.diffusion.conditioners.text import FrozenText, opened
from ldm.errors import CheckpointError, ConfigError
from ldm.optim.ema import EMA, FixedDecay
from tests.tiny_text import LAYERS, LONGEST, WIDTH, WORDS, clip_config, forget, save_text_encoder, save_tokenizer

transformers = pytest.importorskip("transformers")

CAPTIONS = ["a red cat", "photo of a boat on a blue boat", ""]


def t5(kind="T5EncoderModel"):
    sizes = {"d_model": WIDTH, "d_kv": 8, "d_ff": 64, "num_layers": LAYERS, "num_heads": 4, "vocab_size": len(WORDS)}
    return getattr(transformers, kind)(transformers.T5Config(**sizes, decoder_start_token_id=0))


def bert():
    sizes = {"hidden_size": WIDTH, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": LAYERS}
    return transformers.BertModel(transformers.BertConfig(vocab_size=len(WORDS), **sizes))


def whole_clip():
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    return transformers.CLIPModel(
        transformers.CLIPConfig(
            text_config=clip_config().to_dict(), vision_config={**vision, "image_size": 8, "patch_size": 4}
        )
    )


NETWORKS = {
    "CLIPTextModel": lambda: transformers.CLIPTextModel(clip_config()),
    "CLIPTextModelWithProjection": lambda: transformers.CLIPTextModelWithProjection(clip_config()),
    "T5EncoderModel": t5,
    "BertModel": bert,
}


@pytest.fixture(autouse=True)
def nothing_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where hashes of models are remembered
    yield
    forget()


@pytest.fixture
def folder(tmp_path):
    return save_text_encoder(tmp_path / "text")


def theirs(kind, folder, length=10, **asked):
    """What a person gets from transformers."""
    network = getattr(transformers, kind).from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    words = tokenizer(CAPTIONS, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    if kind.startswith("CLIP"):  # as Stable Diffusion: CLIP is causal, and padding a token like any other
        del words["attention_mask"]
    words.pop("token_type_ids", None)
    with torch.no_grad():
        return network, network(**words, output_hidden_states=True)


@pytest.mark.parametrize("kind", NETWORKS)
def test_tokens_are_those_of_transformers_to_the_bit(kind, tmp_path):
    folder = save_text_encoder(tmp_path / "text", network=NETWORKS[kind]())
    _, expected = theirs(kind, folder)
    found = FrozenText(folder, WIDTH, max_length=10)({"caption": CAPTIONS})
    assert found.vector is found.spatial is None
    assert torch.equal(found.tokens, expected.last_hidden_state)
    assert found.tokens.shape == (3, 10, WIDTH)
    assert not torch.equal(found.tokens[0], found.tokens[1])
    clipped = FrozenText(folder, WIDTH, max_length=10, layer=-2, final_norm=False)({"caption": CAPTIONS})
    assert torch.equal(clipped.tokens, expected.hidden_states[-2])


def test_clip_skip_ends_with_the_final_norm(folder, tmp_path):
    network, expected = theirs("CLIPTextModel", folder)
    norms = [module for name, module in network.named_modules() if name.endswith("final_layer_norm")]
    found = FrozenText(folder, WIDTH, max_length=10, layer=-2)({"caption": CAPTIONS})
    assert torch.equal(found.tokens, norms[0](expected.hidden_states[-2]))
    # A model of one layer less, as Stable Diffusion 2 comes in diffusers, has these tokens as its output.
    shorter = clip_config()
    shorter.num_hidden_layers = LAYERS - 1
    cut = transformers.CLIPTextModel(shorter)
    cut.load_state_dict({name: network.state_dict()[name] for name in cut.state_dict()})
    cut.save_pretrained(tmp_path / "cut")
    save_tokenizer(tmp_path / "cut")
    assert torch.equal(found.tokens, FrozenText(tmp_path / "cut", WIDTH, 10)({"caption": CAPTIONS}).tokens)


def test_null_is_the_empty_caption_and_computed_once(folder, monkeypatch):
    conditioner = FrozenText(folder, WIDTH, max_length=10)
    expected = conditioner({"caption": [""]}).tokens
    null = conditioner.null(3).tokens
    assert null.shape == (3, 10, WIDTH)
    assert all(torch.equal(row, expected[0]) for row in null)
    monkeypatch.setattr(text, "_encoded", lambda *_: pytest.fail("encoded again"))
    assert torch.equal(conditioner.null(1).tokens, expected)


def test_null_computed_in_inference_mode_serves_training(folder):
    conditioner = FrozenText(folder, WIDTH, max_length=10)
    with torch.inference_mode():
        conditioner.null(2)
    layer = nn.Linear(WIDTH, 1)
    layer(conditioner.null(2).tokens).sum().backward()
    assert layer.weight.grad is not None


def test_the_encoder_is_no_part_of_the_model(folder):
    conditioner = FrozenText(folder, WIDTH, max_length=10)
    model = nn.ModuleDict({"network": nn.Linear(2, 2), "conditioner": conditioner}).train()
    assert [name for name, _ in model.named_parameters()] == ["network.weight", "network.bias"]
    assert set(model.state_dict()) == {"network.weight", "network.bias", "conditioner._extra_state"}
    average = EMA(model, FixedDecay())
    average.update(model, 4)
    captions = {"caption": CAPTIONS}
    opened.cache_clear()  # others may have read it
    assert torch.equal(average.average["conditioner"](captions).tokens, conditioner(captions).tokens)
    assert opened.cache_info().misses == 1
    encoder = opened(str(folder)).network
    assert not any(module.training for module in encoder.modules())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert copy.deepcopy(conditioner).state_dict().keys() == {"_extra_state"}


def test_autocast_and_tf32_change_nothing(folder):
    conditioner = FrozenText(folder, WIDTH, max_length=10)
    expected = conditioner({"caption": CAPTIONS}).tokens
    with torch.autocast("cpu", torch.bfloat16):
        found = conditioner({"caption": CAPTIONS}).tokens
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


def test_half_precision_files_are_read_into_float32(tmp_path):
    folder = save_text_encoder(tmp_path / "text", network=transformers.CLIPTextModel(clip_config()).half())
    found = FrozenText(folder, WIDTH, max_length=10)({"caption": CAPTIONS}).tokens
    assert found.dtype == torch.float32


def test_another_encoder_in_the_folder_is_refused(folder, tmp_path):
    state = FrozenText(folder, WIDTH, 8).state_dict()
    moved = FrozenText(shutil.copytree(folder, tmp_path / "moved"), WIDTH, 8)
    moved.load_state_dict(state)  # wherever it lies
    other = FrozenText(save_text_encoder(tmp_path / "other", seed=1), WIDTH, 8)
    with pytest.raises(CheckpointError, match=r"other: not the text encoder that this model was trained with"):
        nn.ModuleDict({"conditioner": other}).load_state_dict({"conditioner._extra_state": state["_extra_state"]})
    nn.ModuleDict({"conditioner": other}).load_state_dict({})  # weights of others name none


def test_the_hash_is_the_same_for_other_names_of_the_weights(tmp_path):
    plain = save_text_encoder(tmp_path / "plain", network=bert())
    network = transformers.BertModel.from_pretrained(plain)
    network.save_pretrained(tmp_path / "headed", state_dict={f"bert.{k}": v for k, v in network.state_dict().items()})
    save_tokenizer(tmp_path / "headed")
    assert opened(str(tmp_path / "headed")).weights == opened(str(plain)).weights


def test_a_whole_clip_and_a_pipeline_s_folders(tmp_path):
    model = whole_clip()
    whole = save_text_encoder(tmp_path / "clip", network=model)
    assert FrozenText(whole, WIDTH, LONGEST)({"caption": CAPTIONS}).tokens.shape == (3, LONGEST, WIDTH)
    pipeline = tmp_path / "pipeline"
    save_text_encoder(pipeline / "text_encoder_2")
    together = FrozenText(pipeline / "text_encoder_2", WIDTH, LONGEST)({"caption": CAPTIONS}).tokens
    (pipeline / "tokenizer_2").mkdir()
    for file in (pipeline / "text_encoder_2").glob("*token*"):
        file.rename(pipeline / "tokenizer_2" / file.name)
    text.opened.cache_clear()
    apart = FrozenText(pipeline / "text_encoder_2", WIDTH, LONGEST)({"caption": CAPTIONS}).tokens
    assert torch.equal(apart, together)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"channels": 33}, rf"FrozenText: channels: the tokens of .*text are {WIDTH} wide, found 33"),
        ({"max_length": 17}, rf"FrozenText: max_length: .*text reads up to {LONGEST} tokens, found 17"),
        ({"layer": -5}, rf"FrozenText: layer: .*text has {LAYERS} layers, found -5"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_before_anything_is_loaded(params, message, folder):
    with pytest.raises(ConfigError, match=message), torch.device("meta"):
        FrozenText(folder, **{"channels": WIDTH, "max_length": 8, **params})
    assert opened.cache_info().misses == 0


def test_folders_without_an_encoder(folder, tmp_path):
    with pytest.raises(CheckpointError, match=r"nowhere: no text encoder: expected a folder with config.json"):
        FrozenText(tmp_path / "nowhere", WIDTH)
    description = folder / "config.json"
    tree = json.loads(description.read_text())
    description.write_text(json.dumps({**tree, "num_hidden_layers": LAYERS + 1}))
    with pytest.raises(CheckpointError, match=r"text: \d+ weights are missing or of another shape"):
        FrozenText(folder, WIDTH, 8)({"caption": ["a cat"]})
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="text: cannot be read as a text encoder"):
        FrozenText(folder, WIDTH, 8)({"caption": ["a cat"]})


def test_without_values_only_shapes_are_known(folder):
    with torch.device("meta"):
        node = {"target": "ldm.diffusion.conditioners.text.FrozenText", "params": {"encoder": str(folder)}}
        node["params"] |= {"channels": WIDTH, "max_length": 8}
        conditioner = build(node)
    assert conditioner({"caption": CAPTIONS}).tokens.shape == conditioner.null(3).tokens.shape == (3, 8, WIDTH)
    assert conditioner.state_dict()["_extra_state"].is_meta
    assert opened.cache_info().misses == 0


def test_without_transformers_the_extra_is_named(folder, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(ConfigError, match=r"need the package transformers: pip install -e '\.\[text\]'"):
        FrozenText(folder, WIDTH)
