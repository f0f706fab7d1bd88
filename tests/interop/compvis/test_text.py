"""The text encoders in Stable Diffusion's files become folders that FrozenText reads, with the same tokens."""

import json
import string
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import nn

from ldm.cli import sample
from ldm.diffusion.conditioners.text import FrozenText
from ldm.errors import CheckpointError, ConfigError
from ldm.interop.compvis import text as compvis_text
from ldm.interop.convert import convert
from ldm.interop.models import Request
from ldm.sampling.guidance import Guidance
from ldm.sampling.pipeline import Pipeline
from tests.interop.compvis_files import SIZES, Kind, tiny, yaml_of

WIDTH, LONGEST, LAYERS = 64, 12, 3
SPECIAL = ["<|startoftext|>", "<|endoftext|>"]
WORDS = ["!", *string.ascii_lowercase, *(f"{letter}</w>" for letter in string.ascii_lowercase), "!</w>", *SPECIAL]
CAPTIONS = ["a cat", "two dogs on a boat"]


@pytest.fixture
def tokenizer(tmp_path) -> Path:
    """CLIP's, of single letters."""
    folder = tmp_path / "given" / "tokenizer"
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(WORDS)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return folder.parent


class OpenClip(nn.Module):
    """The text half of OpenCLIP as Stable Diffusion 2 reads it: the hidden states before the last layer, normed."""

    def __init__(self) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(len(WORDS), WIDTH)
        self.positional_embedding = nn.Parameter(torch.randn(LONGEST, WIDTH))
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.ModuleList(self._block() for _ in range(LAYERS))
        self.ln_final = nn.LayerNorm(WIDTH)
        self.text_projection = nn.Parameter(torch.randn(WIDTH, WIDTH))
        self.logit_scale = nn.Parameter(torch.zeros(()))

    @staticmethod
    def _block() -> nn.Module:
        block = nn.Module()
        block.ln_1, block.ln_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        block.attn = nn.MultiheadAttention(WIDTH, 1, batch_first=True)
        block.mlp = nn.ModuleDict({"c_fc": nn.Linear(WIDTH, 4 * WIDTH), "c_proj": nn.Linear(4 * WIDTH, WIDTH)})
        return block

    def forward(self, words: torch.Tensor, layers: int) -> torch.Tensor:
        x = self.token_embedding(words) + self.positional_embedding
        later = torch.full((LONGEST, LONGEST), float("-inf")).triu(1)
        for block in self.transformer.resblocks[:layers]:
            inside = block.ln_1(x)
            x = x + block.attn(inside, inside, inside, attn_mask=later, need_weights=False)[0]
            x = x + block.mlp["c_proj"](nn.functional.gelu(block.mlp["c_fc"](block.ln_2(x))))
        return self.ln_final(x)


def words_of(captions, pad):
    """What CLIP's tokenizer makes of them: begin, letters, end, and the padding."""
    rows = []
    for caption in captions:
        letters = [part for word in caption.split() for part in [*word[:-1], f"{word[-1]}</w>"]]
        row = [SPECIAL[0], *letters[: LONGEST - 2], SPECIAL[1]]
        rows.append([WORDS.index(word) for word in row + [pad] * (LONGEST - len(row))])
    return torch.tensor(rows)


def open_clip():
    torch.manual_seed(3)
    return OpenClip().eval()


def clip():
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(4)
    sizes = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_attention_heads": 1}
    sizes |= {"num_hidden_layers": LAYERS, "max_position_embeddings": LONGEST, "vocab_size": len(WORDS)}
    network = CLIPTextModel(CLIPTextConfig(**sizes)).eval()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.2)
    return network


def in_file(network):
    """`cond_stage_model.` of Stable Diffusion 1 or 2, without that prefix."""
    if isinstance(network, OpenClip):
        return {f"model.{name}": one for name, one in network.state_dict().items()}
    weights = {name.removeprefix("text_model."): one for name, one in network.state_dict().items()}
    weights["embeddings.position_ids"] = torch.arange(LONGEST)[None]
    return {f"transformer.text_model.{name}": one for name, one in weights.items()}


def written(network, tokenizer, **more):
    found = compvis_text.found_in(in_file(network), "model.ckpt", **more)
    found.write(folder := tokenizer.parent / "text_encoder", tokenizer)
    return FrozenText(folder, WIDTH, LONGEST)


@torch.no_grad()
@pytest.mark.parametrize("last_layer", [False, True])
def test_open_clip_puts_out_what_stable_diffusion_2_reads(tokenizer, last_layer):
    network = open_clip()
    found = written(network, tokenizer, last_layer=last_layer)({"caption": CAPTIONS}).tokens
    expected = network(words_of(CAPTIONS, "!"), LAYERS if last_layer else LAYERS - 1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_clip_puts_out_what_stable_diffusion_1_reads(tokenizer):
    network = clip()
    conditioner = written(network, tokenizer)
    expected = network(words_of([*CAPTIONS, ""], SPECIAL[1])).last_hidden_state
    torch.testing.assert_close(conditioner({"caption": CAPTIONS}).tokens, expected[:2], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(conditioner.null(1).tokens, expected[2:], rtol=1e-4, atol=1e-5)


def test_what_does_not_fit_is_refused(tokenizer):
    whole = in_file(open_clip())
    assert compvis_text.found_in({"embedding.weight": torch.zeros(3, 4)}, "model.ckpt") is None
    lacking = {name: one for name, one in whole.items() if "1.attn.in_proj_bias" not in name}
    with pytest.raises(CheckpointError, match=r"model.ckpt: its text encoder does not fit: 1 tensors missing"):
        compvis_text.found_in(lacking, "model.ckpt")
    with pytest.raises(CheckpointError, match=r"1 in no place of it \(other.weight\)"):
        compvis_text.found_in(whole | {"model.other.weight": torch.zeros(3)}, "model.ckpt")
    with pytest.raises(ConfigError, match="no tokenizer in it"):
        compvis_text.found_in(whole, "model.ckpt").write(tokenizer.parent / "out", tokenizer.parent)
    smaller = whole | {"model.token_embedding.weight": torch.zeros(len(WORDS) - 1, WIDTH)}
    with pytest.raises(ConfigError, match="not the tokenizer of this text encoder"):
        compvis_text.found_in(smaller, "model.ckpt").write(tokenizer.parent / "out", tokenizer)


def file(tmp_path, network, kind):
    tensors = tiny(kind, SIZES["two levels"])
    tensors |= {f"cond_stage_model.{name}": one for name, one in in_file(network).items()}
    path = tmp_path / "stable.safetensors"
    save_file({name: one.contiguous() for name, one in tensors.items()}, path)
    condition = {"target": "nowhere.Encoder", "params": {"ucg_rate": 0.1}}
    config = yaml_of(kind, SIZES["two levels"], parameterization="v", cond_stage_config=condition)
    path.with_suffix(".yaml").write_text(yaml.safe_dump(config))
    return path


@pytest.mark.parametrize("network", [clip, open_clip])
def test_stable_diffusion_samples_from_captions_and_is_guided(network, tokenizer, tmp_path):
    kind = Kind({"context_dim": WIDTH, "num_heads": 1}, linear=network is open_clip)
    path = file(tmp_path, network(), kind)
    request = Request(text_encoder=tokenizer)
    lines = [*convert(path, request, config=None, license=None, name=None, logdir=tmp_path / "logs")]
    run = Path(lines[1].split("  ")[0])
    assert (run / "text_encoder" / "config.json").is_file()
    assert not (run / "conditioner.safetensors").exists()
    command = ["-r", str(run), "-n", "1", "--steps", "2", "--guidance", "4", "--negative", "a dog"]
    assert sample.main([*command, "--prompt", *CAPTIONS]) == 0
    assert len([*run.glob("samples/*/*-000000.png")]) == len(CAPTIONS)
    pipeline = Pipeline.load(run)
    conditions = [{"caption": caption} for caption in CAPTIONS]
    plain, guided = (pipeline.generate([0, 0], conditions, steps=2, guidance=Guidance(scale)) for scale in (1.0, 4.0))
    assert plain[0].tobytes() != plain[1].tobytes()
    assert plain[0].tobytes() != guided[0].tobytes()


def test_a_missing_tokenizer_is_asked_for_and_nothing_is_written(tokenizer, tmp_path):
    path = file(tmp_path, clip(), Kind({"context_dim": WIDTH, "num_heads": 1}))
    for request, message in (
        (Request(), "--text-encoder DIR"),
        (Request(text_encoder=tmp_path / "none"), "no tokenizer in it"),
    ):
        with pytest.raises(ConfigError, match=message):
            [*convert(path, request, config=None, license=None, name=None, logdir=tmp_path / "logs")]
        assert not [*(tmp_path / "logs").glob("*")]


def test_a_model_of_captions_and_pictures_reads_both(tokenizer, tmp_path):
    kind = Kind({"context_dim": WIDTH, "num_heads": 1, "spatial_channels": 3})
    path = file(tmp_path, clip(), kind)
    request = Request(text_encoder=tokenizer)
    lines = [*convert(path, request, config=None, license=None, name=None, logdir=tmp_path / "logs")]
    pipeline = Pipeline.load(lines[1].split("  ")[0])
    assert {*pipeline.conditioner.keys} == {"caption", "spatial"}
    assert len(pipeline.generate([0], [{"caption": "a cat", "spatial": torch.randn(3, 8, 8)}], steps=2)) == 1
