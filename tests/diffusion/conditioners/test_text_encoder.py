"""Text encoders as features: what transformers makes of each caption on its own, and nothing that stays in memory."""

import gc
import json
import logging
import shutil
import weakref

import pytest
import torch
from torch import nn

from ldm.diffusion.conditioners import pooling, text
from ldm.diffusion.conditioners.features import Cutting, Feature, columns, held, stacked
from ldm.diffusion.conditioners.text import FeatureText, FrozenText, TextEncoder
from ldm.diffusion.conditioners.text_models import opened
from ldm.errors import CheckpointError, ConfigError, DataError
from tests.tiny_text import LAYERS, LONGEST, WIDTH, WORDS, clip_config, forget, save_text_encoder

transformers = pytest.importorskip("transformers")

CPU = torch.device("cpu")
CAPTIONS = ["red dog", "photo of red dog on blue dog", ""]  # the tokenizer takes each "a" out of its word
FULL = {"dtype": "float32"}


def sizes(**more):
    return {
        "hidden_size": WIDTH,
        "intermediate_size": 64,
        "num_hidden_layers": LAYERS,
        "vocab_size": len(WORDS),
        **more,
    }


def gemma(name):
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": LONGEST}
    special = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 1}
    config = getattr(transformers, f"{name}Config")(**sizes(**heads, **special))
    return getattr(transformers, f"{name}Model")(config)


def t5():
    config = {"d_model": WIDTH, "d_kv": 8, "d_ff": 64, "num_layers": LAYERS, "num_heads": 4, "vocab_size": len(WORDS)}
    return transformers.T5EncoderModel(transformers.T5Config(**config, feed_forward_proj="gated-gelu"))


NETWORKS = {
    "CLIPTextModel": lambda: transformers.CLIPTextModel(clip_config()),
    "CLIPTextModelWithProjection": lambda: transformers.CLIPTextModelWithProjection(clip_config()),
    "T5EncoderModel": t5,
    "BertModel": lambda: transformers.BertModel(transformers.BertConfig(**sizes(num_attention_heads=2))),
    "GemmaModel": lambda: gemma("Gemma"),
    "Gemma2Model": lambda: gemma("Gemma2"),
}


@pytest.fixture(autouse=True)
def nothing_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where hashes of models are remembered
    yield
    forget()


@pytest.fixture
def folder(tmp_path):
    return save_text_encoder(tmp_path / "text")


def theirs(kind, folder, caption, length=LONGEST, dtype=torch.float32):
    """What a person gets from transformers for one caption, unpadded."""
    network = getattr(transformers, kind).from_pretrained(folder, dtype=dtype).eval()
    words = transformers.AutoTokenizer.from_pretrained(folder)(
        caption, truncation=True, max_length=length, return_tensors="pt"
    )
    words.pop("token_type_ids", None)
    with torch.no_grad():
        return network, network(**words, output_hidden_states=True)


@pytest.mark.parametrize("caption", CAPTIONS)
@pytest.mark.parametrize("kind", NETWORKS)
def test_a_caption_s_own_tokens_are_those_of_transformers_to_the_bit(kind, caption, tmp_path):
    folder = save_text_encoder(tmp_path / "text", network=NETWORKS[kind]())
    network, expected = theirs(kind, folder, caption, 6)
    found = TextEncoder(folder, WIDTH, 6, **FULL).encode(caption, CPU)
    assert [*found] == ["tokens"]
    assert torch.equal(found["tokens"], expected.last_hidden_state[0])
    assert len(found["tokens"]) == min(len(caption.split()) + 2, 6)
    earlier = TextEncoder(folder, WIDTH, 6, layer=-2, final_norm=False, **FULL).encode(caption, CPU)
    assert torch.equal(earlier["tokens"], expected.hidden_states[-2][0])
    names = {"CLIP": "text_model.final_layer_norm", "T5En": "encoder.final_layer_norm", "Gemm": "norm"}
    normed = TextEncoder(folder, WIDTH, 6, layer=-2, **FULL).encode(caption, CPU)["tokens"]
    if kind == "BertModel":  # its layers end with norms of their own
        assert torch.equal(normed, earlier["tokens"])
        return
    norm = dict(network.named_modules()).get(names[kind[:4]]) or network.final_layer_norm
    with torch.no_grad():
        assert torch.equal(normed, norm(expected.hidden_states[-2])[0])


@pytest.mark.parametrize("kind", NETWORKS)
def test_a_smaller_type_of_sums_is_that_of_transformers(kind, tmp_path):
    folder = save_text_encoder(tmp_path / "text", network=NETWORKS[kind]())
    _, expected = theirs(kind, folder, CAPTIONS[1], dtype=torch.bfloat16)
    encoder = TextEncoder(folder, WIDTH, LONGEST, compute="bfloat16", **FULL)
    assert torch.equal(encoder.encode(CAPTIONS[1], CPU)["tokens"], expected.last_hidden_state[0].float())
    full = TextEncoder(folder, WIDTH, LONGEST, **FULL)
    assert not torch.equal(encoder.encode(CAPTIONS[1], CPU)["tokens"], full.encode(CAPTIONS[1], CPU)["tokens"])
    assert encoder.describe()["weights"] == full.describe()["weights"]
    assert encoder.describe() != full.describe()


@pytest.mark.parametrize("kind", NETWORKS)
def test_neither_neighbors_nor_a_longer_limit_change_a_bit(kind, tmp_path):
    folder = save_text_encoder(tmp_path / "text", network=NETWORKS[kind]())
    short, long = TextEncoder(folder, WIDTH, 10), TextEncoder(folder, WIDTH, LONGEST)
    alone = [short.encode(caption, CPU)["tokens"] for caption in CAPTIONS]
    forget()
    for caption, expected in zip(reversed(CAPTIONS), reversed(alone), strict=True):
        assert torch.equal(long.encode(caption, CPU)["tokens"], expected)
    found = columns(short, "text", {"caption": CAPTIONS}, CPU)
    assert found["text.tokens"].shape == (3, 10, WIDTH)
    assert found["text.tokens"].dtype == torch.float16
    assert found["text.tokens_mask"].sum(1).tolist() == [4, 9, 2]
    for row, mask, expected in zip(found["text.tokens"], found["text.tokens_mask"], alone, strict=True):
        assert torch.equal(row[mask], expected)
        assert not row[~mask].any()


def test_padded_as_in_stable_diffusion_it_is_frozen_text(folder):
    frozen = FrozenText(folder, WIDTH, 10)({"caption": CAPTIONS}).tokens
    encoder = TextEncoder(folder, WIDTH, 10, padding=True, **FULL)
    assert not encoder.parts["tokens"].ragged
    found = FeatureText(encoder)({"caption": CAPTIONS})
    assert found.token_mask is None
    assert torch.allclose(found.tokens, frozen, atol=1e-5)  # alone instead of side by side
    assert found.tokens.dtype == torch.float32


# ---- one vector -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("caption", [*CAPTIONS, "red <|endoftext|> blue dog", "dog " * 100])
def test_clip_s_pooled_outputs(caption, padding, tmp_path):
    folder = save_text_encoder(tmp_path / "text", network=NETWORKS["CLIPTextModelWithProjection"]())
    _, plain = theirs("CLIPTextModel", folder, caption)
    _, projected = theirs("CLIPTextModelWithProjection", folder, caption)
    for how, expected in ((pooling.EndOfText(), plain.pooler_output), (pooling.Projected(), projected.text_embeds)):
        encoder = TextEncoder(folder, WIDTH, LONGEST, layer=-2, padding=padding, pooling=how, **FULL)
        found = encoder.encode(caption, CPU)
        assert found["vector"].shape == encoder.parts["vector"].shape == expected[0].shape
        assert torch.allclose(found["vector"], expected[0], atol=1e-5)
        assert found.keys() == encoder.parts.keys() == {"tokens", "vector"}


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("kind", ["BertModel", "T5EncoderModel", "Gemma2Model"])
def test_mean_first_and_last_are_of_a_text_s_own_tokens(kind, padding, tmp_path):
    folder = save_text_encoder(tmp_path / "text", network=NETWORKS[kind]())
    _, expected = theirs(kind, folder, CAPTIONS[0])
    tokens = expected.last_hidden_state[0]
    picks = {pooling.Mean: tokens.mean(0), pooling.First: tokens[0], pooling.Last: tokens[-1]}
    for how, vector in picks.items():
        encoder = TextEncoder(folder, WIDTH, LONGEST, tokens=False, padding=padding, pooling=how(), **FULL)
        (found,) = encoder.encode(CAPTIONS[0], CPU).values()
        assert torch.allclose(found, vector, atol=1e-5)
        encoder = TextEncoder(folder, WIDTH, LONGEST, tokens=False, padding=padding, pooling=how(True), **FULL)
        (found,) = encoder.encode(CAPTIONS[0], CPU).values()
        assert torch.allclose(found, vector / vector.norm(), atol=1e-5)


def sentence_folder(folder, modules='["Transformer", "Pooling", "Normalize"]', modes='"pooling_mode_cls_token": true'):
    kinds = json.loads(modules)
    listed = [{"type": f"sentence_transformers.models.{kind}", "path": f"{i}_{kind}"} for i, kind in enumerate(kinds)]
    (folder / "modules.json").write_text(json.dumps(listed))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling" / "config.json").write_text(f'{{"pooling_mode_mean_tokens": false, {modes}}}')


def test_a_sentence_encoder_s_folder_says_how_it_pools(folder):
    sentence_folder(folder)
    encoder = TextEncoder(folder, WIDTH, LONGEST, pooling=pooling.SentencePooling(), **FULL)
    named = TextEncoder(folder, WIDTH, LONGEST, pooling=pooling.First(normalize=True), **FULL)
    assert encoder.describe() == named.describe()
    found, expected = (one.encode(CAPTIONS[0], CPU)["vector"] for one in (encoder, named))
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"modules": '["Transformer", "Pooling", "Dense"]'},
            r"modules.json: expected Transformer, Pooling and",
        ),
        ({"modes": '"pooling_mode_max_tokens": true'}, r"config.json: expected one of .*, found pooling_mode_max_tok"),
        ({"modes": '"x": ['}, r"1_Pooling/config.json: expected what a sentence encoder says"),
        (None, r"modules.json: expected what a sentence encoder says .* name the pooling yourself"),
    ],
)
def test_a_folder_that_says_nothing_of_pooling_or_what_is_not_done(change, message, folder):
    if change is not None:
        sentence_folder(folder, **change)
    with pytest.raises(CheckpointError, match=message):
        _ = TextEncoder(folder, WIDTH, LONGEST, pooling=pooling.SentencePooling()).parts


def test_a_clip_without_a_projection(folder):
    with pytest.raises(CheckpointError, match=r"1 weights are missing .*text_projection"):
        TextEncoder(folder, WIDTH, LONGEST, pooling=pooling.Projected()).encode("a cat", CPU)


# ---- captions of every kind -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("caption", "message"),
    [
        ("a \ud83d cat", r"caption 'a \\ud83d cat': character 2 is half of a surrogate pair"),
        (7, "caption 7: expected text, found int"),
        (None, "caption None: expected text, found NoneType"),
        (["a", "b"], r"caption \['a', 'b'\]: expected text, found list"),
        (b"a cat", "caption b'a cat': expected text, found bytes"),
    ],
)
def test_what_is_no_text_is_named(caption, message, folder):
    for read in (lambda value: TextEncoder(folder, WIDTH, 8).encode(value, CPU), TextEncoder(folder, WIDTH, 8).is_cut):
        with pytest.raises(DataError, match=message):
            read(caption)
    for conditioner in (FeatureText(TextEncoder(folder, WIDTH, 8)), FrozenText(folder, WIDTH, 8)):
        with pytest.raises(DataError, match=message):
            conditioner({"caption": ["a cat", caption]})


HOSTILE = ["", " ", "\n\t", "🙂👩‍👩‍👧", "כלב אדום", "كلب", "\x00", "b" * 10_000, "dog " * 10_000, "a" * 10_000]


@pytest.mark.parametrize("number", range(len(HOSTILE)))
def test_any_text_has_a_token_and_no_more_than_the_limit(number, folder, caplog):
    encoder = TextEncoder(folder, WIDTH, 12, prefix="photo of ")
    with caplog.at_level(logging.WARNING):
        assert encoder.is_cut(HOSTILE[number]) == (number > 7)
        tokens = encoder.encode(HOSTILE[number], CPU)["tokens"]
    assert 1 <= len(tokens) <= 12
    assert tokens.isfinite().all()
    assert not caplog.records


def test_how_long_a_caption_may_be(folder):
    encoder = TextEncoder(folder, WIDTH, 8)
    assert isinstance(encoder, Cutting)
    assert not encoder.is_cut("red dog on blue dog of")  # 6 words, between a beginning and an end
    assert encoder.is_cut("red dog on blue dog of red dog")
    assert TextEncoder(folder, WIDTH, 8, prefix="photo ").is_cut("red dog on blue dog of")
    kept = encoder.encode("red dog on blue dog of red dog", CPU)["tokens"]
    assert torch.equal(kept, encoder.encode("red dog on blue dog of green photo", CPU)["tokens"])


@pytest.mark.parametrize("padding", [False, True])
def test_a_tokenizer_that_adds_nothing_has_a_token_for_the_empty_text(padding, tmp_path):
    folder = save_text_encoder(tmp_path / "text", network=gemma("Gemma"))
    from tokenizers import processors

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.backend_tokenizer.post_processor = processors.Sequence([])
    tokenizer.save_pretrained(folder)
    encoder = TextEncoder(folder, WIDTH, 4, padding=padding, pooling=pooling.Mean())
    found = encoder.encode("", CPU)
    assert len(found["tokens"]) == (4 if padding else 1)
    assert len(encoder.encode("red dog", CPU)["tokens"]) == (4 if padding else 2)
    assert all(part.isfinite().all() for part in found.values())


def test_a_prefix_is_read_before_each_caption(folder):
    encoder, plain = TextEncoder(folder, WIDTH, 8, prefix="photo of "), TextEncoder(folder, WIDTH, 8)
    assert torch.equal(encoder.encode("red dog", CPU)["tokens"], plain.encode("photo of red dog", CPU)["tokens"])
    assert encoder.describe() != plain.describe()


def test_numbers_that_the_type_does_not_hold_are_named(tmp_path):
    network = transformers.CLIPTextModel(clip_config())
    folder = save_text_encoder(tmp_path / "text", network=network)
    norm = next(module for name, module in network.named_modules() if name.endswith("final_layer_norm"))
    nn.init.constant_(norm.weight, 1e6)
    network.save_pretrained(folder)
    with pytest.raises(ConfigError, match=r"dtype: .* makes numbers up to \d+, which float16 does not hold"):
        TextEncoder(folder, WIDTH, 8).encode("a cat", CPU)
    assert TextEncoder(folder, WIDTH, 8, dtype="bfloat16").encode("a cat", CPU)["tokens"].dtype == torch.bfloat16


# ---- folders ----------------------------------------------------------------------------------------------------


def test_what_is_missing_or_does_not_fit_is_one_message(folder, tmp_path):
    with pytest.raises(ConfigError, match=rf"TextEncoder: channels: the tokens of .* are {WIDTH} wide, found 33"):
        TextEncoder(folder, 33)
    with pytest.raises(ConfigError, match=r"TextEncoder: max_length: .* reads up to 16 tokens, found 17"):
        TextEncoder(folder, WIDTH, 17)
    with pytest.raises(ConfigError, match="TextEncoder: expected tokens: true, or a pooling"):
        TextEncoder(folder, WIDTH, 8, tokens=False)
    with pytest.raises(CheckpointError, match=r"nowhere: no text encoder: expected a folder"):
        TextEncoder(tmp_path / "nowhere", WIDTH)
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(folder / "config.json", bare)
    with pytest.raises(CheckpointError, match=r"bare: no tokenizer: expected "):
        TextEncoder(bare, WIDTH, 8).encode("a cat", CPU)
    shutil.copy(folder / "tokenizer.json", bare)
    forget()
    with pytest.raises(CheckpointError, match=r"bare: cannot be read as a text encoder: .*model.safetensors"):
        TextEncoder(bare, WIDTH, 8).encode("a cat", CPU)


def test_an_encoder_of_the_catalog_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setenv("LDM_WEIGHTS", str(tmp_path))
    with pytest.raises(CheckpointError, match=r"(?s)all-minilm-l6-v2/model.safetensors: no such file.*--fetch all-min"):
        TextEncoder("all-minilm-l6-v2", 384)


# ---- provenance -------------------------------------------------------------------------------------------------


def test_a_description_says_all_but_where_it_lies(folder, tmp_path):
    first = TextEncoder(folder, WIDTH, 8, pooling=pooling.Mean(normalize=True)).describe()
    moved = shutil.copytree(folder, tmp_path / "moved")
    assert TextEncoder(moved, WIDTH, 8, pooling=pooling.Mean(normalize=True)).describe() == first
    assert {len(first.pop(key)) for key in ("weights", "tokenizer")} == {64}
    assert first == {
        "channels": WIDTH,
        "max_length": 8,
        "layer": -1,
        "final_norm": True,
        "padding": False,
        "tokens": True,
        "pooling": {"by": "Mean", "normalize": True},
        "prefix": "",
        "dtype": "float16",
        "compute": "float32",
    }


def test_a_tokenizer_is_told_by_what_it_does(folder, tmp_path):
    def vocabulary(changes, name):
        other = shutil.copytree(folder, tmp_path / name)
        content = " ".join((other / "tokenizer.json").read_text().split())
        for was, becomes in changes.items():
            assert was in content
            content = content.replace(was, becomes)
        (other / "tokenizer.json").write_text(content)
        return opened(str(other)).vocabulary

    first = opened(str(folder)).vocabulary
    assert vocabulary({}, "spaces") == first
    assert vocabulary({'"normalizer": null': '"normalizer": {"type": "Lowercase"}'}, "lower") != first
    assert vocabulary({'"dog"': '"cow"'}, "word") != first
    assert vocabulary({'"red": 3': '"red": 4', '"green": 4': '"green": 3'}, "swapped") != first


def test_another_encoder_or_tokenizer_is_refused_and_both_hashes_named(folder, tmp_path):
    def conditioner(place):
        return FeatureText(TextEncoder(place, WIDTH, 8))

    state = conditioner(folder).state_dict()
    assert state["_extra_state"].shape == (64,)
    conditioner(shutil.copytree(folder, tmp_path / "moved")).load_state_dict(state)  # wherever it lies
    others = {"weights": save_text_encoder(tmp_path / "other", seed=1)}
    others["tokenizer"] = shutil.copytree(folder, tmp_path / "words")
    file = others["tokenizer"] / "tokenizer.json"
    file.write_text(file.read_text().replace('"dog"', '"cow"'))
    for what, place in others.items():
        found, expected = (TextEncoder(one, WIDTH, 8).describe()[what] for one in (place, folder))
        message = f"not the text encoder .*: {what} {found[:16]}..., expected {expected[:16]}"
        with pytest.raises(CheckpointError, match=message):
            conditioner(place).load_state_dict(state)
        conditioner(place).load_state_dict({})  # weights of others name none
    assert not opened(str(folder)).is_loaded


# ---- the conditioner --------------------------------------------------------------------------------------------


def test_null_computed_in_inference_mode_serves_training(folder):
    conditioner = FeatureText(TextEncoder(folder, WIDTH, LONGEST))
    with torch.inference_mode():
        conditioner.null(2)
    layer = torch.nn.Linear(WIDTH, 1)
    layer(conditioner.null(2).tokens).sum().backward()
    assert layer.weight.grad is not None


def test_features_are_stacked_under_autocast_as_without(folder):
    encoder = TextEncoder(folder, WIDTH, 10, pooling=pooling.Mean())
    rows = [encoder.encode(caption, CPU) for caption in CAPTIONS]
    without = stacked(encoder, "words", rows)
    with torch.autocast("cpu", torch.bfloat16):
        under = stacked(encoder, "words", rows)
    assert torch.float16 in {column.dtype for column in without.values()}
    for name, column in without.items():
        assert under[name].dtype == column.dtype
        assert torch.equal(under[name], column)


def test_cached_columns_give_the_same_bits_and_the_encoder_leaves(folder):
    encoder = TextEncoder(folder, WIDTH, 10, pooling=pooling.Mean())
    assert isinstance(encoder, Feature)
    conditioner = FeatureText(encoder, name="words")
    fresh = conditioner({"caption": CAPTIONS})
    network = weakref.ref(opened(str(folder)).network)
    rows = [encoder.encode(caption, CPU) for caption in CAPTIONS]
    batch = {"caption": CAPTIONS, **stacked(encoder, "words", rows)}
    assert held(encoder, "words", batch)
    assert not held(encoder, "text", batch)
    cached = conditioner(batch)
    gc.collect()
    assert network() is None
    for slot in ("vector", "tokens", "token_mask"):
        assert torch.equal(getattr(cached, slot), getattr(fresh, slot))
    assert cached.tokens.dtype == cached.vector.dtype == torch.float32
    batch.pop("caption")
    assert torch.equal(conditioner(batch).tokens, fresh.tokens)


def test_null_is_the_empty_text_and_needs_the_encoder_once_and_briefly(folder, monkeypatch):
    conditioner = FeatureText(TextEncoder(folder, WIDTH, 10, pooling=pooling.Last()))
    null = conditioner.null(3)
    assert not opened(str(folder)).is_loaded
    conditioner.state_dict()
    assert not opened(str(folder)).is_loaded
    monkeypatch.setattr(text.TextModel, "network", property(lambda _: pytest.fail("loaded again")))
    again = conditioner.null(2)
    monkeypatch.undo()
    expected = conditioner({"caption": [""]})
    assert not opened(str(folder)).is_loaded  # "" is known
    for slot in ("vector", "tokens", "token_mask"):
        assert torch.equal(getattr(null, slot), getattr(expected, slot).expand_as(getattr(null, slot)))
        assert len(getattr(again, slot)) == 2
    mixed = conditioner.null(3).where(torch.tensor([True, False, True]), conditioner({"caption": CAPTIONS}))
    assert opened(str(folder)).is_loaded  # batches bring no columns
    assert mixed.token_mask.sum(1).tolist() == [2, 9, 2]


def test_captions_asked_for_again_need_no_encoder(folder, monkeypatch):
    conditioner = FeatureText(TextEncoder(folder, WIDTH, 10))
    expected = conditioner({"caption": CAPTIONS})
    conditioner.feature.release()
    monkeypatch.setattr(text.TextModel, "network", property(lambda _: pytest.fail("loaded again")))
    assert torch.equal(conditioner({"caption": CAPTIONS}).tokens, expected.tokens)


def test_without_values_only_shapes_are_known(folder):
    with torch.device("meta"):
        conditioner = FeatureText(TextEncoder(folder, WIDTH, 8, pooling=pooling.Mean()))
    for found in (conditioner({"caption": CAPTIONS}), conditioner.null(3)):
        assert found.tokens.shape == (3, 8, WIDTH)
        assert found.token_mask.shape == (3, 8)
        assert found.vector.shape == (3, WIDTH)
        assert found.tokens.is_meta
    assert conditioner.state_dict()["_extra_state"].is_meta
    assert not opened(str(folder)).is_loaded


def test_no_captions_are_named(folder):
    with pytest.raises(ConfigError, match="FeatureText: the data set has no captions"):
        FeatureText(TextEncoder(folder, WIDTH, 8))({"draws": None})


# ---- a real one ---------------------------------------------------------------------------------------------------


def test_minilm_is_what_its_makers_say():
    encoder = TextEncoder("all-minilm-l6-v2", 384, 128, pooling=pooling.SentencePooling(), **FULL)
    folder = opened("all-minilm-l6-v2").folder
    assert encoder.describe()["pooling"] == {"by": "Mean", "normalize": True}
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    network = transformers.AutoModel.from_pretrained(folder).eval()
    sentences = ["A man is eating food.", "A man is eating a piece of bread.", "Someone has a meal.", "A cheetah runs."]
    words = tokenizer(sentences, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = network(**words).last_hidden_state
    mask = words["attention_mask"].bool()
    vectors = []
    for number, sentence in enumerate(sentences):
        found = encoder.encode(sentence, CPU)
        own = expected[number, mask[number]]
        assert found["tokens"].shape == own.shape
        assert (found["tokens"] - own).abs().max() < 1e-5  # alone, and padded among others
        mean = own.mean(0)
        assert (found["vector"] - mean / mean.norm()).abs().max() < 1e-6
        vectors.append(found["vector"])
    near = torch.stack(vectors[1:]) @ vectors[0]
    assert near.argsort(descending=True).tolist() == [0, 1, 2]
    # As sentence-transformers documents it for these two: https://www.sbert.net, "A man is eating food."
    assert near[0] == pytest.approx(0.7553, abs=1e-3)
