"""The text transformer: its formula, its masks, and the tokenizer that its weights carry."""

import copy
import logging
import math

import pytest
import torch
from torch import nn

from ldm.config.load import build
from ldm.diffusion.conditioners.base import require_conditioner
from ldm.diffusion.conditioners.text_transformer import TextTransformer
from ldm.diffusion.conditioners.tokenizer import read
from ldm.errors import ConfigError
from ldm.optim.ema import EMA, FixedDecay
from tests.tiny_text import BERT_WORDS, save_vocabulary

pytest.importorskip("tokenizers")

SIZES = {"channels": 16, "depth": 2, "vocab_size": len(BERT_WORDS), "max_length": 12}
CAPTIONS = ["a red cat", "photo of a boat on a blue boat", "", "unknown 🐱 words"]


@pytest.fixture
def vocabulary(tmp_path):
    return save_vocabulary(tmp_path / "vocab.txt")


def random(tokenizer, **more):
    """With weights at which every part matters."""
    torch.manual_seed(0)
    found = TextTransformer(tokenizer, **{**SIZES, **more})
    for weight in found.parameters():
        nn.init.normal_(weight, std=0.5)
    return found.eval()


def by_the_formula(model, words, seen):
    """x-transformers' encoder, one row and one head at a time, in float64."""
    weights = {name: one.double() for name, one in model.state_dict().items() if name != "_extra_state"}

    def norm(x, name):
        return nn.functional.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"])

    rows = []
    for row, there in zip(words, seen, strict=True):
        x = weights["words.weight"][row] + weights["places"]
        for number in range(len(model.layers)):
            name = f"layers.{number}"
            inside = norm(x, f"{name}.norm_attend")
            q, k, v = (inside @ weights[f"{name}.qkv.weight"].T).chunk(3, dim=-1)
            size = q.shape[-1] // model.layers[0].num_heads
            heads = []
            for a, b, c in zip(q.split(size, -1), k.split(size, -1), v.split(size, -1), strict=True):
                scores = (a @ b.T / math.sqrt(size)).masked_fill(~there, -math.inf)
                heads.append(scores.softmax(-1) @ c)
            x = x + torch.cat(heads, -1) @ weights[f"{name}.out.weight"].T + weights[f"{name}.out.bias"]
            h = norm(x, f"{name}.norm_feed") @ weights[f"{name}.fc1.weight"].T + weights[f"{name}.fc1.bias"]
            x = x + nn.functional.gelu(h) @ weights[f"{name}.fc2.weight"].T + weights[f"{name}.fc2.bias"]
        rows.append(norm(x, "norm"))
    return torch.stack(rows).float()


def words_of(vocabulary):
    tokenizer = read(vocabulary, 12)
    rows = [tokenizer.encode(caption)[0] for caption in CAPTIONS]
    padded = torch.tensor([row + [0] * (12 - len(row)) for row in rows])
    return padded, torch.tensor([[place < len(row) for place in range(12)] for row in rows])


@torch.no_grad()
@pytest.mark.parametrize("heads", [{}, {"num_heads": 2, "num_head_channels": 8}, {"num_heads": 3, "depth": 3}])
@pytest.mark.parametrize("attend_padding", [False, True])
def test_tokens_are_those_of_the_formula(heads, attend_padding, vocabulary):
    model = random(vocabulary, attend_padding=attend_padding, **heads)
    words, mask = words_of(vocabulary)
    found = model({"caption": CAPTIONS})
    expected = by_the_formula(model, words, torch.ones_like(mask) if attend_padding else mask)
    if attend_padding:
        assert found.token_mask is None
        torch.testing.assert_close(found.tokens, expected, rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(found.token_mask, mask)
        torch.testing.assert_close(found.tokens, expected * mask[..., None], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_layers_are_those_of_torch(vocabulary):
    model = random(vocabulary, num_heads=4, num_head_channels=4)
    layer = nn.TransformerEncoderLayer(16, 4, 64, 0.0, "gelu", batch_first=True, norm_first=True)
    theirs = nn.TransformerEncoder(layer, 2, nn.LayerNorm(16), enable_nested_tensor=False).train()  # no fused kernel
    state = {"norm.weight": model.norm.weight, "norm.bias": model.norm.bias}
    names = {
        "norm_attend": "norm1",
        "norm_feed": "norm2",
        "fc1": "linear1",
        "fc2": "linear2",
        "out": "self_attn.out_proj",
    }
    for number, ours in enumerate(model.layers):
        for mine, its in names.items():
            state |= {f"layers.{number}.{its}.{kind}": one for kind, one in getattr(ours, mine).named_parameters()}
        state[f"layers.{number}.self_attn.in_proj_weight"] = ours.qkv.weight
        state[f"layers.{number}.self_attn.in_proj_bias"] = torch.zeros(48)
    theirs.load_state_dict(state)
    words, mask = words_of(vocabulary)
    expected = theirs(model.words(words) + model.places, src_key_padding_mask=~mask)
    found = model({"caption": CAPTIONS}).tokens
    torch.testing.assert_close(found, expected * mask[..., None], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_longer_padding_changes_nothing_but_where_it_is_read(vocabulary):
    for attend_padding in (False, True):
        shorter = random(vocabulary, attend_padding=attend_padding)
        longer = random(vocabulary, attend_padding=attend_padding, max_length=30)
        weights = shorter.state_dict()
        longer.load_state_dict(weights | {"places": torch.cat([weights["places"], torch.randn(18, 16)])})
        few, many = shorter({"caption": CAPTIONS[:1]}), longer({"caption": CAPTIONS[:1]})
        alike = torch.allclose(few.tokens[:, :5], many.tokens[:, :5], atol=1e-6)
        assert alike is not attend_padding
        if not attend_padding:
            assert not many.tokens[:, 5:].any()


def test_null_is_the_empty_text_and_is_trained(vocabulary):
    model = random(vocabulary).train()
    require_conditioner(model)
    # Of one row, as the null is made: products of more rows may be rounded otherwise.
    null, empty = model.null(3), model({"caption": [""]})
    assert torch.equal(null.tokens, empty.tokens.expand(3, -1, -1))
    assert torch.equal(null.token_mask, empty.token_mask.expand(3, -1))
    assert null.token_mask[0].tolist() == [True] * 2 + [False] * 10
    mixed = null.where(torch.tensor([True, False, False]), model({"caption": CAPTIONS[:3]}))
    mixed.tokens.square().sum().backward()
    assert all(weight.grad is not None for weight in model.parameters())
    assert random(vocabulary, attend_padding=True).null(2).token_mask is None


def test_a_text_of_no_tokens_has_one(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    bare = Tokenizer(models.WordLevel({"a": 0, "cat": 1}, unk_token="a"))
    bare.pre_tokenizer = pre_tokenizers.Whitespace()
    bare.save(str(tmp_path / "tokenizer.json"))
    found = random(tmp_path / "tokenizer.json")({"caption": ["", "a cat"]})
    assert found.token_mask.sum(1).tolist() == [1, 2]
    assert found.tokens.isfinite().all()
    with pytest.raises(ConfigError, match=r"attend_padding: .*tokenizer.json has no token for padding"):
        random(tmp_path / "tokenizer.json", attend_padding=True)


def test_captions_that_are_cut_are_counted(vocabulary, caplog):
    model = random(vocabulary)
    with caplog.at_level(logging.WARNING):
        for _ in range(10):
            model({"caption": ["cat " * 10_000]})
    assert [record.getMessage()[:40] for record in caplog.records] == [
        "captions cut to max_length 12 so far: 1,",
        "captions cut to max_length 12 so far: 10",
    ]
    assert "of 10002 tokens" in caplog.text
    for caption in (None, 3, ["a"]):
        with pytest.raises(ConfigError, match="caption: expected a text"):
            model({"caption": [caption]})
    with pytest.raises(ConfigError, match="the data set has no captions"):
        model({})


def test_weights_alone_read_captions_anywhere(vocabulary, tmp_path):
    model = random(vocabulary)
    moved = TextTransformer(tmp_path / "elsewhere.txt", **SIZES).eval()
    with pytest.raises(ConfigError, match=r"elsewhere.txt: no such file. Make one of the captions: ldm tokenizer"):
        moved({"caption": CAPTIONS})
    moved.load_state_dict(copy.deepcopy(model.state_dict()))
    assert torch.equal(moved({"caption": CAPTIONS}).tokens, model({"caption": CAPTIONS}).tokens)
    assert moved.files() == {"vocab.txt": vocabulary.read_bytes()}
    average = EMA(nn.ModuleDict({"conditioner": moved}), FixedDecay()).average["conditioner"]
    assert torch.equal(average({"caption": CAPTIONS}).tokens, model({"caption": CAPTIONS}).tokens)


def test_weights_are_read_with_their_own_tokenizer_whatever_lies_there(vocabulary, tmp_path, caplog):
    model = random(vocabulary)
    state = model.state_dict()
    other = tmp_path / "other.txt"
    other.write_text(vocabulary.read_text().replace("cat", "cow"))
    ours, theirs = read(vocabulary, 12).digest, read(other, 12).digest
    found = nn.ModuleDict({"conditioner": random(other)})
    found.load_state_dict({f"conditioner.{k}": v for k, v in state.items()})
    said = (
        f"other.txt: not the tokenizer that this model was trained with, and not used: sha256 {theirs}, expected {ours}"
    )
    assert said in caplog.text
    assert torch.equal(found["conditioner"]({"caption": CAPTIONS}).tokens, model({"caption": CAPTIONS}).tokens)
    assert found["conditioner"].files() == {"vocab.txt": vocabulary.read_bytes()}
    bare = {name: one for name, one in state.items() if name != "_extra_state"}
    random(other).load_state_dict(bare)  # weights of others come without


def test_a_table_that_is_too_small_is_refused(vocabulary):
    size = len(BERT_WORDS)
    with pytest.raises(ConfigError, match=rf"vocab_size: .*vocab.txt has {size} tokens, .*found 5; write {size}"):
        random(vocabulary, vocab_size=5)
    state = random(vocabulary).state_dict() | {"words.weight": torch.zeros(5, 16)}
    small = TextTransformer("none", **{**SIZES, "vocab_size": 5})
    with pytest.raises(ConfigError, match=rf"vocab_size: the tokenizer of the checkpoint has {size} tokens, .*found 5"):
        small.load_state_dict(state)


def test_without_values_only_shapes_are_known(vocabulary):
    node = {"target": "ldm.diffusion.conditioners.text_transformer.TextTransformer"}
    with torch.device("meta"):
        model = build({**node, "params": {"tokenizer": "none", **SIZES}})
    for found in (model({"caption": CAPTIONS}), model.null(4)):
        assert found.tokens.shape == (4, 12, 16)
        assert found.token_mask.shape == (4, 12)
        assert found.tokens.is_meta
    assert model.state_dict()["_extra_state"].is_meta


def test_it_runs_compiled_and_in_half_precision(vocabulary):
    model = random(vocabulary)
    expected = model({"caption": CAPTIONS}).tokens
    with torch.autocast("cpu", torch.bfloat16):
        found = model({"caption": CAPTIONS}).tokens
    torch.testing.assert_close(found.float(), expected, rtol=0.1, atol=0.1)
    for layer in model.layers:
        layer.compile(backend="eager", fullgraph=True)
    torch.testing.assert_close(model({"caption": CAPTIONS}).tokens, expected)
