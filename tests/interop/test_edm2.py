"""EDM2: its files as runs, the way back, the range of its pictures, and the script that reads its pickles."""

import json
import math
import pickle
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from ldm.autoencoder.codec import Codec
from ldm.config.load import build
from ldm.diffusion.conditioners.base import Conditioning, Unconditional
from ldm.errors import CheckpointError, ConfigError
from ldm.interop import convert, edm2, sources
from ldm.interop.models import Request, node, shapes
from ldm.interop.tables import to_theirs
from ldm.sampling.pipeline import Pipeline
from scripts import edm2_to_safetensors
from tests.interop import edm2_files
from tests.tiny_runs import save_autoencoder

INVENTORIES = Path(__file__).parent / "inventories" / "edm2"
# Karras et al. 2024, table 2, and XXS, which their code alone lists; in millions.
PUBLISHED = {"xxs": 31, "xs": 125, "s": 280, "m": 498, "l": 777, "xl": 1119, "xxl": 1523}
# Width, multipliers, blocks, levels with attention, side, channels, classes.
SIZES = [
    (64, (1, 2), 1, (1,), 8, 4, 10),
    (32, (1, 2, 4), 2, (1, 2), 8, 4, 0),
    (64, (1, 1), 2, (), 8, 3, 5),
]


def theirs(size) -> dict[str, torch.Tensor]:
    torch.manual_seed(7)
    return edm2_files.tensors(*size)


def saved(folder: Path, content, said=None, name="net.safetensors") -> Path:
    save_file(content, folder / name)
    if said is not None:
        (folder / name).with_suffix(".json").write_text(json.dumps(said))
    return folder / name


def converted(file: Path, request: Request, logdir: Path) -> list[Path]:
    lines = [*convert.convert(file, request, config=None, license=None, name=None, logdir=logdir)]
    return [Path(line.partition("  from ")[0]) for line in lines]


@pytest.mark.parametrize("size", SIZES)
def test_every_tensor_comes_and_goes(tmp_path, size):
    content = theirs(size)
    source = sources.read(saved(tmp_path, content))
    assert convert.recognized(source) is edm2.FAMILY
    [one] = edm2.convert(source, Request())
    back = to_theirs(edm2.table(one.params["network"]["params"], 8), one.weights)
    assert content.keys() - back.keys() == {"logvar_fourier.freqs", "logvar_fourier.phases", "logvar_linear.weight"}
    assert all(torch.equal(content[name], tensor) for name, tensor in back.items())
    assert [*one.origin.dropped.values()] == [3]


@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_equals_its_definition(tmp_path, size):
    content = theirs(size)
    [one] = edm2.convert(sources.read(saved(tmp_path, content)), Request())
    parts = nn.ModuleDict({name: build(one.params[name]) for name in ("network", "conditioner")})
    parts.load_state_dict(one.weights)
    sigma = torch.tensor([0.002, 0.1, 1.0, 80.0])
    x = torch.randn(4, size[5], 8, 8) * (0.25 + sigma**2).sqrt()[:, None, None, None]
    labels = None
    if classes := size[6]:
        labels = torch.eye(classes)[[0, 2, 4, 0]]
        labels[3] = 0  # no class
    vector = None if labels is None else labels * math.sqrt(classes)
    found = build(one.params["objective"]).denoise(parts["network"].eval(), x, sigma, Conditioning(vector=vector))
    expected = edm2_files.denoise(content, x, sigma, labels)
    for row in range(4):
        torch.testing.assert_close(found[row], expected[row].float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("inventory", sorted(INVENTORIES.glob("*.json")), ids=lambda path: path.stem)
def test_published_sizes(inventory):
    """Names and shapes of their own code's networks; the counts are the published ones."""
    published = json.loads(inventory.read_text())
    content = {name: torch.empty(shape, device="meta") for name, shape in published["tensors"].items()}
    source = sources.Source(inventory, content)
    assert convert.recognized(source) is edm2.FAMILY
    side, sizes = edm2._architecture(source)
    own = shapes(node("diffusion.networks.edm2.MagnitudePreservingUNet", **sizes))
    weights = {f"network.{name}": torch.empty(shape, device="meta") for name, shape in own.items()}
    back = to_theirs(edm2.table(sizes, side), weights)
    assert {name: one.shape for name, one in back.items()} == {
        name: one.shape for name, one in content.items() if not name.startswith("logvar_")
    }
    buffers = ("freqs", "phases")
    assert sum(one.numel() for name, one in content.items() if not name.endswith(buffers)) == published["parameters"]
    assert round(published["parameters"] / 1e6) == pytest.approx(PUBLISHED[inventory.stem.split("_")[1]], abs=1)


def test_a_converted_run_samples_in_its_own_range(tmp_path):
    """Its latents are of pictures in [0, 1]: the autoencoder is fitted to that, in a run of its own."""
    given = save_autoencoder(tmp_path / "autoencoder")
    file = saved(tmp_path, theirs(SIZES[0]), {"ema_std": 0.135})
    autoencoder, model = converted(file, Request(autoencoder=given), tmp_path / "logs")
    pipeline = Pipeline.load(model)
    assert pipeline.manifest.mean == [5.81, 3.25, 0.12, -2.15]
    assert pipeline.manifest.std == pytest.approx([8.34, 9.24, 7.42, 6.56])
    assert not pipeline.knows_null
    assert [one.size for one in pipeline.generate([1], [{"class_label": 3}], steps=2)] == [(32, 32)]
    assert any("0.135" in note for note in json.loads((model / "origin.json").read_text())["notes"])
    before, after = Codec.load(given), Codec.load(autoencoder)
    origin = json.loads((autoencoder / "origin.json").read_text())
    assert (origin["source"], [*origin["sha256"]]) == ("step=7.ckpt", ["step=7.ckpt"])
    images, latents = 2 * torch.rand(2, 3, 16, 16) - 1, torch.randn(2, 4, 4, 4)
    for found, expected in zip(after.encode(images), before.encode((images + 1) / 2), strict=True):
        torch.testing.assert_close(found, expected)
    expected = (2 * before.decoder(latents) - 1).clamp(-1, 1)
    torch.testing.assert_close(after.decode(latents), expected)
    assert before.weight_hash() != after.weight_hash()


def test_the_fitted_autoencoder_is_taken_as_it_is(tmp_path):
    file = saved(tmp_path, theirs(SIZES[0]))
    first, _ = converted(file, Request(autoencoder=save_autoencoder(tmp_path / "autoencoder")), tmp_path / "a")
    [model] = converted(file, Request(autoencoder=first), tmp_path / "b")
    assert Pipeline.load(model).codec.weight_hash() == Codec.load(first).weight_hash()


def test_pixels_need_no_autoencoder(tmp_path):
    file = saved(tmp_path, theirs(SIZES[2]))
    with pytest.raises(ConfigError, match="takes no autoencoder"):
        edm2.convert(sources.read(file), Request(autoencoder=tmp_path))
    [model] = converted(file, Request(), tmp_path / "logs")
    pipeline = Pipeline.load(model)
    assert [one.size for one in pipeline.generate([1], [{"class_label": 3}], steps=2)] == [(8, 8)]


def test_a_network_without_classes_reads_no_condition(tmp_path):
    """Or previews would ask it for the classes of the pictures that it goes on with."""
    [one] = edm2.convert(sources.read(saved(tmp_path, theirs(SIZES[1]))), Request())
    assert isinstance(build(one.params["conditioner"]), Unconditional)


def test_latents_without_an_autoencoder_are_refused(tmp_path):
    file = saved(tmp_path, theirs(SIZES[0]))
    with pytest.raises(ConfigError, match="--autoencoder RUN"):
        converted(file, Request(), tmp_path / "logs")
    assert not (tmp_path / "logs").exists() or not [*(tmp_path / "logs").iterdir()]


def test_what_the_pickle_knows_is_used(tmp_path):
    said = {"sigma_data": 0.25, "P_mean": -0.8, "encoder_scale": [1, 2, 4, 8], "encoder_bias": [0, 2, 0, -8]}
    [one] = edm2.convert(sources.read(saved(tmp_path, theirs(SIZES[0]), said)), Request())
    assert one.params["objective"]["params"]["sigma_data"] == 0.25
    assert one.params["objective"]["params"]["levels"]["params"] == {"mean": -0.8, "std": 1.0}
    assert one.std == [1, 0.5, 0.25, 0.125]
    assert one.mean == [0, -1, 0, 1]


@pytest.mark.parametrize(
    "said",
    [
        {"sigma_data": "much"},
        {"encoder_scale": [1, 0, 1, 1], "encoder_bias": [0] * 4},
        {"encoder_scale": [1] * 4},
        {"P_std": float("nan")},
        {"P_std": 0},
        {"res_balance": 0.5},
    ],
)
def test_a_description_that_makes_no_sense_is_refused(tmp_path, said):
    with pytest.raises(ConfigError, match="expected"):
        edm2.convert(sources.read(saved(tmp_path, theirs(SIZES[0]), said)), Request())


def test_a_network_that_is_not_whole_is_refused(tmp_path):
    content = theirs(SIZES[0])
    del content["unet.dec.4x4_in0.attn_qkv.weight"]
    with pytest.raises(CheckpointError, match="attn_qkv"):
        edm2.convert(sources.read(saved(tmp_path, content)), Request())
    del content["unet.enc.8x8_conv.weight"]
    with pytest.raises(CheckpointError, match="first convolution"):
        edm2.convert(sources.read(saved(tmp_path, content)), Request())


def test_a_pickle_is_not_opened(tmp_path):
    file = tmp_path / "edm2-img512-xs-2147483-0.135.pkl"
    file.write_bytes(pickle.dumps({"ema": 1}))
    with pytest.raises(CheckpointError, match=r"scripts/edm2_to_safetensors\.py"):
        sources.read(file)


THEIR_CODE = """
import torch

class Network(torch.nn.Module):
    init_kwargs = {"model_channels": 64, "dropout": 0.1, "class_name": object}
    img_resolution, img_channels, label_dim, use_fp16, sigma_data = 8, 4, 10, True, 0.5

class Encoder:
    def __init__(self):
        self.vae_name, self.scale, self.bias = "sd", torch.tensor([1.0, 2.0, 4.0, 8.0]), torch.zeros(4)

class Loss:
    def __init__(self):
        self.P_mean, self.P_std = -0.4, 1.0
"""


@pytest.fixture
def their_code(tmp_path, monkeypatch) -> Path:
    """A folder with modules of the names that EDM2's pickles import; forgotten afterwards."""
    folder = tmp_path / "edm2"
    (folder / "torch_utils").mkdir(parents=True)
    (folder / "dnnlib.py").write_text("")
    (folder / "torch_utils" / "persistence.py").write_text(THEIR_CODE)
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = {*sys.modules}
    yield folder
    for name in {*sys.modules} - before:
        if name.split(".")[0] in ("dnnlib", "torch_utils"):
            del sys.modules[name]


def run_script(monkeypatch, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", ["edm2_to_safetensors.py", *map(str, arguments)])
    edm2_to_safetensors.main()


def test_the_script_needs_their_code(tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match="--code FOLDER"):
        run_script(monkeypatch, tmp_path / "net.pkl")


def test_the_script_s_file_is_converted(tmp_path, monkeypatch, their_code):
    file = tmp_path / "edm2-img512-xs-2147483-0.135.pkl"
    content = theirs(SIZES[0])
    monkeypatch.syspath_prepend(their_code)
    from torch_utils import persistence

    network = persistence.Network()
    for name, tensor in content.items():
        owner = network
        *path, last = name.split(".")
        for part in path:
            if part not in dict(owner.named_children()):
                owner.add_module(part, nn.Module())
            owner = owner.get_submodule(part)
        owner.register_buffer(last, tensor.half())
    file.write_bytes(pickle.dumps({"ema": network, "encoder": persistence.Encoder(), "loss_fn": persistence.Loss()}))
    run_script(monkeypatch, file, "--code", their_code)
    said = json.loads(file.with_suffix(".json").read_text())
    assert (said["ema_std"], said["kimg"], said["P_mean"], said["dropout"]) == (0.135, 2147483, -0.4, 0.1)
    assert "class_name" not in said
    [one] = edm2.convert(sources.read(file.with_suffix(".safetensors")), Request())
    assert one.std == [1, 0.5, 0.25, 0.125]
    assert one.params["network"]["params"]["dropout"] == 0.1
    assert torch.equal(one.weights["network.embed.weight"], content["unet.emb_noise.weight"].half().float())
