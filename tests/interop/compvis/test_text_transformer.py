"""The text transformer inside latent diffusion's own files: a live part of the model, exact both ways, and sampled."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from ldm.cli import convert as convert_command
from ldm.cli import sample
from ldm.diffusion.conditioners.text_transformer import TextTransformer
from ldm.diffusion.conditioners.tokenizer import read
from ldm.errors import CheckpointError, ConfigError
from ldm.interop.compvis import model as compvis_model
from ldm.interop.compvis import text_transformer
from ldm.interop.convert import convert
from ldm.interop.models import Request
from ldm.interop.tables import to_theirs, under
from ldm.sampling.guidance import Guidance
from ldm.sampling.pipeline import Pipeline
from tests.interop.compvis_files import SIZES, Kind, inventory, source, tiny, yaml_of
from tests.tiny_text import BERT_WORDS, save_bert_vocabulary, save_vocabulary

pytest.importorskip("tokenizers")

WIDTH, LONGEST, NUMBER = 16, 9, len(BERT_WORDS)
TWO = SIZES["two levels"]
CAPTIONS = ["a red cat", "", "cat " * 30]


@pytest.fixture
def vocabulary(tmp_path):
    return save_vocabulary(tmp_path / "vocab.txt")


def bert(depth=2, heads=2, logits=True):
    """{name: tensor} of a BERTEmbedder."""
    torch.manual_seed(depth)
    shapes = {"token_emb.weight": (NUMBER, WIDTH), "pos_emb.emb.weight": (LONGEST, WIDTH)}
    shapes |= {"norm.weight": (WIDTH,), "norm.bias": (WIDTH,)}
    shapes |= {"to_logits.weight": (NUMBER, WIDTH), "to_logits.bias": (NUMBER,)} if logits else {}
    inner = 64 * heads
    for number in range(depth):
        attend, feed = (f"attn_layers.layers.{2 * number + part}" for part in (0, 1))
        shapes |= {f"{attend}.1.to_{part}.weight": (inner, WIDTH) for part in "qkv"}
        shapes |= {f"{attend}.1.to_out.weight": (WIDTH, inner), f"{attend}.1.to_out.bias": (WIDTH,)}
        shapes |= {f"{feed}.1.net.0.0.weight": (4 * WIDTH, WIDTH), f"{feed}.1.net.0.0.bias": (4 * WIDTH,)}
        shapes |= {f"{feed}.1.net.2.weight": (WIDTH, 4 * WIDTH), f"{feed}.1.net.2.bias": (WIDTH,)}
        shapes |= {f"{part}.0.{kind}": (WIDTH,) for part in (attend, feed) for kind in ("weight", "bias")}
    return {f"transformer.{name}": torch.randn(shape) * 0.3 for name, shape in shapes.items()}


def kind(**more):
    return Kind({"context_dim": WIDTH, "num_heads": 2, **more.pop("unet", {})}, **more)


def file(encoder, **more):
    return tiny(kind(**more), TWO) | {f"cond_stage_model.{name}": one for name, one in encoder.items()}


def converted(tensors, request, **said):
    (found,) = compvis_model.convert(source(tensors, yaml_of(kind(), TWO, **said)), request)
    return found


def ours(encoder, vocabulary, **more):
    found = text_transformer.found_in(encoder, vocabulary, "model.ckpt")
    params = {**found.node["params"], "tokenizer": vocabulary, **more}
    model = TextTransformer(**params).eval()
    used = {name: one for name, one in encoder.items() if "to_logits" not in name}
    weights = {
        one.ours: one.change.ours([used[name] for name in one.theirs])
        for one in text_transformer.table(params["depth"])
    }
    model.load_state_dict(weights)
    return model


@torch.no_grad()
@pytest.mark.parametrize(("depth", "heads"), [(1, 1), (3, 2)])
def test_tokens_are_those_of_another_implementation(depth, heads, vocabulary):
    """diffusers' own, for the same weights: LDMBertModel."""
    module = pytest.importorskip("diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion")
    encoder = bert(depth, heads)
    sizes = {"vocab_size": NUMBER, "max_position_embeddings": LONGEST, "encoder_layers": depth, "d_model": WIDTH}
    theirs = module.LDMBertModel(
        module.LDMBertConfig(**sizes, encoder_ffn_dim=4 * WIDTH, encoder_attention_heads=heads, head_dim=64)
    ).eval()
    names = {"token_emb": "embed_tokens", "pos_emb.emb": "embed_positions", "norm": "layer_norm"}
    for number in range(depth):
        a, f, layer = *(f"attn_layers.layers.{2 * number + part}." for part in (0, 1)), f"layers.{number}."
        names |= {f"{a}0": f"{layer}self_attn_layer_norm", f"{a}1.to_out": f"{layer}self_attn.out_proj"}
        names |= {f"{a}1.to_{part}": f"{layer}self_attn.{part}_proj" for part in "qkv"}
        names |= {f"{f}0": f"{layer}final_layer_norm", f"{f}1.net.0.0": f"{layer}fc1", f"{f}1.net.2": f"{layer}fc2"}
    for mine, its in names.items():
        layer = theirs.model.get_submodule(its)
        layer.load_state_dict({kind: encoder[f"transformer.{mine}.{kind}"] for kind, _ in layer.named_parameters()})
    words = read(vocabulary, LONGEST)
    rows = [words.encode(caption)[0] for caption in CAPTIONS]
    padded = torch.tensor([row + [0] * (LONGEST - len(row)) for row in rows])
    expected = theirs.model(padded, position_ids=torch.arange(LONGEST)[None], return_dict=True).last_hidden_state
    found = ours(encoder, vocabulary)({"caption": CAPTIONS})
    assert found.token_mask is None
    torch.testing.assert_close(found.tokens, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spatial", [0, 3])
def test_weights_are_mapped_both_ways_to_the_bit(spatial, vocabulary):
    encoder = bert()
    found = compvis_model.convert(
        source(
            file(encoder, unet={"spatial_channels": spatial}), yaml_of(kind(unet={"spatial_channels": spatial}), TWO)
        ),
        Request(text_encoder=vocabulary),
    )[0]
    place = "conditioner.conditioners.tokens." if spatial else "conditioner."
    weights = {name: one for name, one in found.weights.items() if name.startswith("conditioner.")}
    state = weights.pop(f"{place}_extra_state")
    assert bytes(state.tolist()) == vocabulary.read_bytes()
    back = to_theirs(under(text_transformer.table(2), place), weights)
    expected = {name: one for name, one in encoder.items() if "to_logits" not in name}
    assert back.keys() == expected.keys()
    assert all(torch.equal(back[name], expected[name]) for name in expected)
    assert found.origin.dropped["the text transformer's prediction of words"] == 2
    assert torch.equal(found.average[f"{place}places"], weights[f"{place}places"])


def test_what_does_not_fit_is_refused(vocabulary, tmp_path):
    encoder, request = bert(), Request(text_encoder=vocabulary)
    for name in encoder:
        lacking = {key: one for key, one in encoder.items() if key != name}
        if "to_logits" in name or "token_emb" in name:
            continue
        with pytest.raises(CheckpointError, match=r"missing|in no place"):
            converted(file(lacking), request)
    with pytest.raises(CheckpointError, match=r"in no place of this model.*\n.*extra"):
        converted(file(encoder | {"transformer.extra.weight": torch.zeros(2)}), request)
    short = tmp_path / "short.txt"
    short.write_text("\n".join(BERT_WORDS[:-1]))
    with pytest.raises(ConfigError, match=rf"not the tokenizer of model.ckpt: expected {NUMBER} tokens"):
        converted(file(encoder), Request(text_encoder=short))
    with pytest.raises(ConfigError, match=r"none: no tokenizer in it. Expected --text-encoder PATH"):
        converted(file(encoder), Request(text_encoder=tmp_path / "none"))


def test_numbers_that_are_not_known_to_be_layouts_are_given_ready_made_as_before(vocabulary):
    settings = {"target": "nowhere.BERTEmbedder", "params": {"use_tokenizer": False}}
    found = converted(file(bert()), Request(), cond_stage_config=settings)
    assert found.params["conditioner"]["target"].endswith("Given")
    odd = bert() | {"transformer.pos_emb.emb.weight": torch.zeros(LONGEST + 1, WIDTH)}  # no three tokens for each box
    found = converted(file(odd), Request(), cond_stage_key="coordinates_bbox", cond_stage_config=settings)
    assert found.params["conditioner"]["target"].endswith("Given")


def test_the_published_layouts_are_read_by_their_transformer():
    (found,) = compvis_model.convert(source(inventory("layout2img")), Request())
    assert found.params["conditioner"]["target"].endswith("LayoutTransformer")
    sizes = {"channels": 512, "depth": 16, "vocab_size": 8192, "num_heads": 8, "num_head_channels": 64}
    assert found.params["conditioner"]["params"] == sizes | {"most": 30, "crop": True}
    own = [one for key, one in found.weights.items() if key.startswith("conditioner.")]
    assert sum(one.numel() for one in own) == 54_656_000
    assert found.data == {"aligned": {"boxes": {"target": "ldm.latents.aligned.Boxes", "params": {"most": 30}}}}
    assert found.params["label_dropout"] == 0


@pytest.mark.parametrize(("name", "width", "millions"), [("text2img256", 640, 166.59), ("txt2img-1p4B", 1280, 542.90)])
def test_published_files_hold_one(name, width, millions, tmp_path, monkeypatch):
    monkeypatch.setenv("LDM_WEIGHTS", str(tmp_path / "cache"))
    with pytest.raises(ConfigError, match=r"(?s)words of bert-base-uncased.*--text-encoder PATH.*all-minilm-l6-v2"):
        compvis_model.convert(source(inventory(name)), Request())
    vocabulary = save_bert_vocabulary(tmp_path / "vocab.txt")
    (found,) = compvis_model.convert(source(inventory(name)), Request(text_encoder=vocabulary))
    params = {"tokenizer": "<run folder>/vocab.txt", "channels": width, "depth": 32, "vocab_size": 30522}
    params |= {"max_length": 77, "num_heads": 8, "num_head_channels": 64, "attend_padding": True}
    assert found.params["conditioner"]["params"] == params
    own = [one for key, one in found.weights.items() if key.startswith("conditioner.") and one.is_meta]
    assert sum(one.numel() for one in own) / 1e6 == pytest.approx(millions, abs=0.01)
    assert found.params["label_dropout"] == (0.1 if name == "txt2img-1p4B" else 0)


def test_the_tokenizer_of_the_weights_in_the_cache_is_taken(vocabulary, monkeypatch):
    monkeypatch.setattr(text_transformer.cache, "find", lambda name: vocabulary.parent / "model.safetensors")
    monkeypatch.setattr(text_transformer, "VOCABULARY", NUMBER)
    found = converted(file(bert()), Request())
    assert found.params["conditioner"]["params"]["tokenizer"] == "<run folder>/vocab.txt"


def test_a_converted_run_samples_from_captions_wherever_it_lies(vocabulary, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    encoder = bert()
    tensors = file(encoder)
    save_file({name: one.contiguous() for name, one in tensors.items()}, "text.safetensors")
    settings = {"target": "nowhere.BERTEmbedder", "params": {"ucg_rate": 0.1}}
    Path("text.yaml").write_text(yaml.safe_dump(yaml_of(kind(), TWO, cond_stage_config=settings)))
    assert convert_command.main(["text.safetensors", "--text-encoder", str(vocabulary)]) == 0
    (run,) = Path("logs").glob("*_text")
    assert (run / "vocab.txt").read_bytes() == vocabulary.read_bytes()
    assert not (run / "conditioner.safetensors").exists()
    Path("wanted.json").write_text(json.dumps([{"caption": caption} for caption in CAPTIONS]))
    vocabulary.unlink()
    run = run.rename(tmp_path / "logs" / "moved")
    command = ["-r", str(run), "-n", "1", "--steps", "2", "--guidance", "3", "--conditions", "wanted.json"]
    assert sample.main(command) == 0, capsys.readouterr().err
    assert len([*run.glob("samples/*/*-000000.png")]) == len(CAPTIONS)
    prompts = ["-r", str(run), "-n", "1", "--steps", "2", "--prompt", "a blue boat", "--negative", "a dog"]
    assert sample.main([*prompts, "--guidance", "3"]) == 0, capsys.readouterr().err
    pipeline = Pipeline.load(run)
    (run / "vocab.txt").unlink()
    alone = Pipeline.load(run)
    wanted = [{"caption": "a red cat"}]
    pictures = [one.generate([0], wanted, steps=2, guidance=Guidance(3.0))[0].tobytes() for one in (pipeline, alone)]
    assert pictures[0] == pictures[1]
    assert read(run, LONGEST) is None


def test_runs_that_were_converted_before_go_on(tmp_path):
    """Their conditioner is `Given`, and the encoder lies beside them."""
    encoder = {name: one for name, one in bert().items() if "attn_layers" not in name}
    path = tmp_path / "old.safetensors"
    save_file({name: one.contiguous() for name, one in file(encoder).items()}, path)
    path.with_suffix(".yaml").write_text(yaml.safe_dump(yaml_of(kind(), TWO)))
    lines = [*convert(path, Request(), config=None, license=None, name=None, logdir=tmp_path / "logs")]
    run = Path(lines[1].split("  ")[0])
    assert load_file(run / "conditioner.safetensors").keys() == {f"cond_stage_model.{name}" for name in encoder}
    pipeline = Pipeline.load(run)
    assert len(pipeline.generate([0], [{"tokens": torch.randn(LONGEST, WIDTH)}], steps=2)) == 1
