"""DiT, SiT and LightningDiT: their files as runs, which of them a file is, and the way back."""

import argparse
import json
from pathlib import Path

import pytest
import torch
from diffusers import DiTTransformer2DModel
from torch import nn

from ldm.config.load import build
from ldm.diffusion.conditioners.base import Conditioning
from ldm.errors import CheckpointError, ConfigError
from ldm.interop import convert, sources
from ldm.interop.dit import model as dit
from ldm.interop.dit import table as dit_table
from ldm.interop.models import Request, shapes
from ldm.interop.tables import to_theirs
from ldm.layers import timestep_embedding
from ldm.sampling.pipeline import Pipeline
from tests.diffusion.networks.test_dit import HEADS, lightningdit, lightningdit_weights
from tests.interop import dit_files
from tests.tiny_runs import save_autoencoder

INVENTORIES = Path(__file__).parents[1] / "inventories" / "dit"
# Width, depth, and what else; 4 heads.
PLAIN = [(64, 3, {}), (96, 2, {"patch": 4}), (128, 1, {"side": 4, "outputs": 1})]
MODERN = [
    (64, 3, {"heads": 4, "patch": 1, "channels": 32, "side": 4}),
    (96, 2, {"heads": 4, "channels": 16}),
    (128, 1, {"heads": 4, "patch": 1, "side": 4}),
]
CASES = [
    (kind, *size) for kind, sizes in {"dit": PLAIN, "sit": PLAIN, "lightningdit": MODERN}.items() for size in sizes
]


def saved(folder: Path, content: dict, name: str = "net.pt") -> Path:
    torch.save(content, folder / name)
    return folder / name


def four_heads(folder: Path) -> Path:
    (folder / "heads.yaml").write_text("num_heads: 4")
    return folder / "heads.yaml"


def statistics(folder: Path, channels: int) -> Path:
    return saved(folder, {"mean": torch.randn(1, channels, 1, 1), "std": 0.5 + torch.rand(1, channels, 1, 1)}, "s.pt")


def request(folder: Path, kind: str, channels: int = 4, **asked) -> Request:
    return Request(family=kind, statistics=statistics(folder, channels) if kind == "lightningdit" else None, **asked)


def theirs(kind: str, width: int, depth: int, **size) -> dict[str, torch.Tensor]:
    torch.manual_seed(width)
    return dit_files.tensors(width, depth, modern=kind == "lightningdit", outputs=2 - (kind == "lightningdit"), **size)


def made(denoiser, weights=None) -> nn.ModuleDict:
    parts = nn.ModuleDict({name: build(denoiser.params[name]) for name in ("network", "conditioner")})
    parts.load_state_dict(denoiser.weights if weights is None else weights)
    return parts.eval()


@torch.no_grad()
def output(parts: nn.ModuleDict, x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return parts["network"](x, t, Conditioning(vector=parts["conditioner"].table(labels)))


@pytest.mark.parametrize(("kind", "width", "depth", "size"), CASES)
def test_every_tensor_comes_and_goes(tmp_path, kind, width, depth, size):
    torch.manual_seed(width)
    outputs = {"outputs": 1} if kind == "lightningdit" else {}
    content = dit_files.tensors(width, depth, modern=kind == "lightningdit", **outputs | size)
    source = sources.read(saved(tmp_path, content), four_heads(tmp_path))
    assert convert.recognized(source) is dit.FAMILY
    [denoiser] = dit.convert(source, request(tmp_path, kind, size.get("channels", 4)))
    made(denoiser)
    back = dit.theirs(denoiser.params, denoiser.weights, denoiser.size[0], kind != "dit")
    assert back.keys() == content.keys()
    halved = dit._without_variance(content, denoiser.params["network"]["params"])[0]
    for name in back.keys() - {"pos_embed", "feat_rope.freqs_cos", "feat_rope.freqs_sin"}:
        if name == "t_embedder.mlp.0.weight" and kind != "dit":
            # Turned in float64 and back, rounded to float32 in between: 2^-23 of the largest weight.
            torch.testing.assert_close(back[name], halved[name], rtol=0, atol=2**-23 * float(halved[name].abs().max()))
        else:
            assert torch.equal(back[name], halved[name]), name


@pytest.mark.parametrize(("width", "depth", "size"), PLAIN)
@torch.no_grad()
def test_dit_equals_diffusers(tmp_path, width, depth, size):
    content = theirs("dit", width, depth, **{key: value for key, value in size.items() if key != "outputs"})
    [denoiser] = dit.convert(sources.read(saved(tmp_path, content), four_heads(tmp_path)), Request(family="dit"))
    patch, side = size.get("patch", 2), size.get("side", 8)
    reference = DiTTransformer2DModel(
        4, width // 4, 4, 8, depth, sample_size=side, patch_size=patch, num_embeds_ada_norm=10
    ).eval()
    state = {}

    def copy(name, own, rows=slice(None)):
        state.update({f"{name}.{kind}": content[f"{own}.{kind}"][rows] for kind in ("weight", "bias")})

    copy("pos_embed.proj", "x_embedder.proj")
    for n in range(depth):
        block, own = f"transformer_blocks.{n}", f"blocks.{n}"
        for layer, index in (("linear_1", 0), ("linear_2", 2)):
            copy(f"{block}.norm1.emb.timestep_embedder.{layer}", f"t_embedder.mlp.{index}")
        table = content["y_embedder.embedding_table.weight"]
        state[f"{block}.norm1.emb.class_embedder.embedding_table.weight"] = table
        copy(f"{block}.norm1.linear", f"{own}.adaLN_modulation.1")
        for which, name in enumerate(("to_q", "to_k", "to_v")):
            copy(f"{block}.attn1.{name}", f"{own}.attn.qkv", slice(which * width, (which + 1) * width))
        copy(f"{block}.attn1.to_out.0", f"{own}.attn.proj")
        copy(f"{block}.ff.net.0.proj", f"{own}.mlp.fc1")
        copy(f"{block}.ff.net.2", f"{own}.mlp.fc2")
    copy("proj_out_1", "final_layer.adaLN_modulation.1")
    copy("proj_out_2", "final_layer.linear")
    reference.load_state_dict(state)
    for block in reference.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0  # as the authors' code
        block.norm1.norm.eps = block.norm3.eps = 1e-6
    x, t, labels = torch.randn(3, 4, side, side), torch.tensor([0.0, 500.0, 999.0]), torch.tensor([1, 9, 10])
    expected = reference(x, t, labels).sample[:, :4]
    torch.testing.assert_close(output(made(denoiser), x, t, labels), expected, rtol=1e-4, atol=1e-4)


def test_sit_runs_time_the_other_way(tmp_path):
    """The same weights taken for a DiT give the velocity towards data, at 1 - t."""
    file = saved(tmp_path, theirs("sit", 384, 2))
    backward, forward = (made(dit.convert(sources.read(file), Request(family=kind))[0]) for kind in ("sit", "dit"))
    x, t, labels = torch.randn(4, 4, 8, 8), torch.tensor([0.0, 0.3, 0.9, 1.0]), torch.tensor([0, 3, 9, 10])
    torch.testing.assert_close(output(backward, x, t, labels), -output(forward, x, 1 - t, labels), rtol=1e-4, atol=1e-5)


def test_the_fold_is_of_the_sinusoid_of_1_minus_t():
    weight, t = torch.randn(16, 256), torch.rand(50)
    expected = timestep_embedding(1 - t, 256) @ weight.T
    torch.testing.assert_close(timestep_embedding(t, 256) @ dit_table.folded(weight).T, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("normalise", [False, True])
def test_lightningdit_equals_its_definition(tmp_path, normalise):
    """Written down in float64 in tests/diffusion/networks/test_dit.py, in the authors' conventions."""
    torch.manual_seed(3)
    content = lightningdit_weights(normalise)
    x, t, labels = torch.randn(4, 4, 8, 8), torch.tensor([0.0, 0.25, 0.7, 1.0]), torch.tensor([0, 3, 9, 10])
    content["y_embedder.embedding_table.weight"] = torch.randn(11, 64)
    expected = lightningdit(content, x, t, content["y_embedder.embedding_table.weight"][labels])
    content["pos_embed"] = dit.positions(4, 4, 64, torch.device("cpu"))[None]
    content |= {f"feat_rope.freqs_{wave}": torch.zeros(16, 64 // HEADS) for wave in ("cos", "sin")}
    [denoiser] = dit.convert(sources.read(saved(tmp_path, content)), request(tmp_path, "lightningdit"))
    assert denoiser.params["network"]["params"]["qk_norm"] is normalise
    found = -output(made(denoiser), x, 1 - t, labels)
    torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-4)
    back = dit.theirs(denoiser.params, denoiser.weights, 8, backward=True)
    assert back.keys() == content.keys()
    assert all(torch.equal(back[name], one) for name, one in content.items() if ".attn." in name)


@pytest.mark.parametrize("kind", dit.KINDS)
def test_a_converted_run_samples(tmp_path, kind):
    autoencoder = save_autoencoder(tmp_path / "autoencoder")
    size = {"heads": 6} if kind == "lightningdit" else {}
    file = saved(tmp_path, theirs(kind, 384, 1, **size))
    asked = request(tmp_path, kind, autoencoder=autoencoder)
    [line] = convert.convert(file, asked, config=None, license="CC0", name=None, logdir=tmp_path / "logs")
    [folder] = (tmp_path / "logs").iterdir()
    assert str(folder) in line
    assert dit.KINDS[kind].name in line
    pipeline = Pipeline.load(folder)
    assert pipeline.num_classes == 10
    assert pipeline.knows_null
    assert pipeline.manifest.plan.shape == (4, 8, 8)
    pictures = pipeline.generate([1, 2], [{"class_label": 3}] * 2, steps=2)
    assert [picture.size for picture in pictures] == [(32, 32)] * 2


def test_an_autoencoder_of_other_latents_is_refused(tmp_path):
    file = saved(tmp_path, theirs("lightningdit", 384, 1, heads=6, channels=16))
    asked = request(tmp_path, "lightningdit", 16, autoencoder=save_autoencoder(tmp_path / "autoencoder"))
    with pytest.raises(ConfigError, match=r"makes latents of 4 channels; .*net\.pt was trained on 16"):
        [*convert.convert(file, asked, config=None, license=None, name=None, logdir=tmp_path / "logs")]
    assert not [*tmp_path.glob("logs/*")]


def test_a_word_for_the_family_is_one_of_its_own(tmp_path):
    file = saved(tmp_path, theirs("dit", 384, 1))
    with pytest.raises(ConfigError, match="expected one of dit, sit, lightningdit, found --family unet"):
        [*convert.convert(file, Request(family="unet"), config=None, license=None, name=None, logdir=tmp_path)]


def test_scales_of_latents_and_objectives(tmp_path):
    file = saved(tmp_path, theirs("dit", 384, 1))
    [one] = dit.convert(sources.read(file), Request(family="dit"))
    assert one.mean == [0.0] * 4
    assert one.std == pytest.approx([1 / 0.18215] * 4)
    objective = build(one.params["objective"])
    assert float(objective.sigma(torch.tensor(1.0))) == pytest.approx(0.01)  # sqrt(1e-4)
    assert float(objective.path.c_noise(torch.tensor(1.0))) == 0
    [two] = dit.convert(sources.read(file), Request(family="sit"))
    assert float(build(two.params["objective"]).path.c_noise(torch.tensor(0.5))) == 0.5


def test_files_of_both_are_not_told_apart_in_silence(tmp_path):
    file = saved(tmp_path, theirs("dit", 384, 1))
    with pytest.raises(ConfigError, match="--family dit, or --family sit"):
        dit.convert(sources.read(file), Request())


@pytest.mark.parametrize("said", ["family: sit", "model: SiT-XL/2", "model: {model_type: SiT-XL/2}"])
def test_a_description_tells_them_apart(tmp_path, said):
    file = saved(tmp_path, theirs("dit", 384, 1))
    (tmp_path / "net.yaml").write_text(f"{said}\n")
    [one] = dit.convert(sources.read(file), Request())
    assert one.origin.family == "SiT"


@pytest.mark.parametrize(("model", "family"), [("DiT-S/2", "DiT"), ("SiT-S/2", "SiT")])
def test_a_training_checkpoint_says_what_it_is(tmp_path, model, family):
    raw, average = theirs("dit", 384, 1), theirs("dit", 384, 1)
    average = {name: one if name == "pos_embed" else 2 * one for name, one in average.items()}
    optimizer = {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 1e-4}]}
    arguments = argparse.Namespace(model=model, num_classes=10, image_size=64, path_type="Linear")
    wrapped = {f"module.{name}": one for name, one in raw.items()}
    file = saved(tmp_path, {"model": wrapped, "ema": average, "opt": optimizer, "args": arguments})
    source = sources.read(file)
    assert convert.recognized(source) is dit.FAMILY
    [one] = dit.convert(source, Request())
    assert one.origin.family == family
    for weights, content in ((one.weights, raw), (one.average, average)):
        expected = content["t_embedder.mlp.2.weight"]
        assert torch.equal(weights["network.embed.2.weight"], expected)
    assert source.optimizer_tensors == 2


def test_what_is_left_out_is_said(tmp_path):
    [one] = dit.convert(sources.read(saved(tmp_path, theirs("dit", 384, 1))), Request(family="dit"))
    assert one.origin.dropped == {
        "the variance half of the output layer": 2,
        "the table of positions, which is computed": 1,
    }
    assert any("variance" in note for note in one.origin.notes)


def test_more_and_less_than_the_model_is_refused(tmp_path):
    content = theirs("dit", 384, 2)
    content["projector.weight"] = torch.zeros(2)
    del content["blocks.1.mlp.fc2.bias"]
    with pytest.raises(CheckpointError) as refused:
        dit.convert(sources.read(saved(tmp_path, content)), Request(family="dit"))
    assert "projector.weight" in str(refused.value)
    assert "blocks.1.mlp.fc2.bias" in str(refused.value)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("pos_embed", torch.randn(1, 16, 384), "not the fixed table"),
        ("pos_embed", torch.zeros(1, 15, 384), "expected a square"),
        ("pos_embed", torch.zeros(16), "expected 3 dimensions"),
        ("x_embedder.proj.weight", torch.zeros(384, 0, 2, 2), "expected 4 dimensions"),
        ("y_embedder.embedding_table.weight", torch.zeros(()), "expected 2 dimensions"),
    ],
)
def test_tensors_that_say_nothing_are_refused(tmp_path, name, tensor, message):
    content = theirs("dit", 384, 1) | {name: tensor}
    with pytest.raises(CheckpointError, match=message):
        dit.convert(sources.read(saved(tmp_path, content)), Request(family="dit"))


def test_heads_of_a_width_that_was_not_published(tmp_path):
    file = saved(tmp_path, theirs("dit", 64, 1))
    with pytest.raises(ConfigError, match="num_heads: N"):
        dit.convert(sources.read(file), Request(family="dit"))
    (tmp_path / "net.yaml").write_text("num_heads: 5")
    with pytest.raises(ConfigError, match="divisor of the width 64"):
        dit.convert(sources.read(file), Request(family="dit"))
    (tmp_path / "net.yaml").write_text("num_heads: 4")
    [one] = dit.convert(sources.read(file), Request(family="dit"))
    assert one.params["network"]["params"]["num_heads"] == 4


def test_lightningdit_needs_its_statistics(tmp_path):
    content = theirs("lightningdit", 384, 1, heads=6)
    file = saved(tmp_path, content)
    with pytest.raises(ConfigError, match=r"latents_stats\.pt"):
        dit.convert(sources.read(file), Request())
    (tmp_path / "net.yaml").write_text(
        "data: {latent_norm: true, latent_multiplier: 0.5}\ntransport: {use_lognorm: false}"
    )
    stats = tmp_path / "stats.json"
    stats.write_text(json.dumps({"mean": [1, 2, 3, 4], "std": [1, 1, 2, 2]}))
    [one] = dit.convert(sources.read(file), Request(statistics=stats))
    assert one.origin.family == "LightningDiT"
    assert one.mean == [1, 2, 3, 4]
    assert one.std == [2, 2, 4, 4]
    assert "levels" not in one.params["objective"]["params"]
    assert "direction_weight" not in one.params["objective"]["params"]  # theirs is off unless its YAML says it


def test_sit_on_a_curved_path(tmp_path):
    file = saved(tmp_path, theirs("sit", 384, 1))
    (tmp_path / "net.yaml").write_text("{family: sit, path_type: GVP}")
    [one] = dit.convert(sources.read(file), Request())
    assert type(build(one.params["objective"]).path).__name__ == "GVP"
    (tmp_path / "net.yaml").write_text("{family: sit, prediction: score}")
    with pytest.raises(ConfigError, match="expected velocity"):
        dit.convert(sources.read(file), Request())


@pytest.mark.parametrize("inventory", sorted(INVENTORIES.glob("*.json")), ids=lambda path: path.stem)
def test_published_sizes(inventory):
    """Names and shapes of their own code's networks; the counts are the published ones."""
    published = json.loads(inventory.read_text())
    content = {name: torch.empty(shape, device="meta") for name, shape in published["tensors"].items()}
    assert convert.recognized(sources.Source(inventory, content)) is dit.FAMILY
    sizes, classes = dit._architecture(sources.Source(inventory, content), content)
    assert classes == 1000
    params = {"network": dit.node("diffusion.networks.dit.DiT", **sizes)}
    weights = {
        f"network.{name}": torch.empty(shape, device="meta") for name, shape in shapes(params["network"]).items()
    }
    weights["conditioner.table.weight"] = torch.empty(1001, sizes["hidden_size"], device="meta")
    kept, _ = dit._without_variance(content, sizes)
    computed = {name for name in content if name == "pos_embed" or name.startswith("feat_rope.")}
    back = to_theirs(dit_table.table(sizes, backward=True), weights)
    assert {name: one.shape for name, one in back.items()} == {
        name: one.shape for name, one in kept.items() if name not in computed
    }
    parameters = sum(one.numel() for name, one in content.items() if not name.startswith("feat_rope."))
    expected = {"dit_xl_2_256": 675_129_632, "dit_xl_2_512": 676_014_368, "lightningdit_xl_1": 675_256_736}
    assert parameters == published["parameters"] == expected[inventory.stem]


def test_two_tensors_that_differ_in_a_wrapper_alone(tmp_path):
    tensors = theirs("dit", 64, 1)
    path = saved(tmp_path, tensors | {f"module.{dit.MARKS[0]}": tensors[dit.MARKS[0]] + 1})
    with pytest.raises(CheckpointError, match="differ in a prefix of their names alone"):
        dit.convert(sources.read(path, four_heads(tmp_path)), Request(family="dit"))


def test_an_average_alone_with_its_wrapper_is_known(tmp_path):
    path = saved(tmp_path, {"ema": {f"module.{name}": one for name, one in theirs("dit", 64, 1).items()}})
    assert convert.recognized(sources.read(path)) is dit.FAMILY


@pytest.mark.parametrize(
    ("yaml", "levels", "direction", "std"),
    [
        ("{}", True, True, 2.0),
        ("{transport: {path_type: Linear}}", False, False, 2.0),
        ("{transport: {use_lognorm: true}, data: {latent_norm: true}}", True, False, 2 / 0.18215),
        ("data: {num_classes: 10}", True, True, 1 / 0.18215),
        ("data: {latent_multiplier: 0.5, latent_norm: true}", True, True, 4.0),
    ],
)
def test_what_a_yaml_of_lightningdit_does_not_say(yaml, levels, direction, std, tmp_path):
    """Their code's defaults, where a section is there; the published models', where none is."""
    path = saved(tmp_path, theirs("lightningdit", 64, 1, heads=4))
    scale = saved(tmp_path, {"mean": torch.zeros(4), "std": torch.full((4,), 2.0)}, "s.pt")
    (tmp_path / "net.yaml").write_text(yaml)
    (made,) = dit.convert(sources.read(path), Request(family="lightningdit", statistics=scale))
    params = made.params["objective"]["params"]
    assert ("levels" in params, "direction_weight" in params) == (levels, direction)
    assert made.std == pytest.approx([std] * 4)


@pytest.mark.parametrize("value", ["abc", "0", "-1", "[1]"])
def test_a_multiplier_that_is_none(value, tmp_path):
    path = saved(tmp_path, theirs("lightningdit", 64, 1, heads=4))
    (tmp_path / "net.yaml").write_text(f"latent_multiplier: {value}")
    with pytest.raises(ConfigError, match="latent_multiplier: expected a number above 0"):
        dit.convert(sources.read(path), request(tmp_path, "lightningdit"))


@pytest.mark.parametrize("heads", ["0", "true"])
def test_heads_that_are_none(heads, tmp_path):
    (tmp_path / "net.yaml").write_text(f"num_heads: {heads}")
    with pytest.raises(ConfigError, match="num_heads: expected a divisor of the width 64"):
        dit.convert(sources.read(saved(tmp_path, theirs("dit", 64, 1))), Request(family="dit"))
