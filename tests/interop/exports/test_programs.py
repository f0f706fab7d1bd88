"""Programs of decoder and denoiser: what torch.export and onnxruntime compute is what the model computes."""

import json
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from ldm.autoencoder.codec import AutoencoderCodec
from ldm.autoencoder.networks import Decoder, Encoder
from ldm.autoencoder.quantizer import VectorQuantizer
from ldm.cli import export
from ldm.diffusion.conditioners.base import Conditioning
from ldm.diffusion.networks.dit import DiT
from ldm.diffusion.networks.edm2 import MagnitudePreservingUNet
from ldm.diffusion.networks.unet import UNet
from ldm.diffusion.noise_schedules import Cosine, SqrtLinear
from ldm.diffusion.objectives import DDPM, EDM, Flow, Interpolant
from ldm.diffusion.paths import GVP, VP
from ldm.diffusion.predictions import X0, V
from ldm.errors import ConfigError, NumericError
from ldm.interop.exports import onnx_format, programs
from ldm.interop.exports.programs import Program
from ldm.sampling.pipeline import Pipeline
from ldm.sampling.samplers import ddim

onnxruntime = pytest.importorskip("onnxruntime")
EXPORT = Path(__file__).parents[3] / "docs" / "export.md"


def written(run: Path, to: str, out: Path, *words: str) -> Path:
    assert export.main([str(run), "--to", to, "--out", str(out), *words]) == 0
    return out


@pytest.fixture(scope="session")
def as_onnx(runs, tmp_path_factory) -> Path:
    return written(runs.diffusion, "onnx", tmp_path_factory.mktemp("onnx") / "folder")


@pytest.fixture(scope="session")
def as_torch(runs, tmp_path_factory) -> Path:
    return written(runs.diffusion, "torch", tmp_path_factory.mktemp("torch") / "folder")


def facts(folder: Path) -> dict:
    return json.loads((folder / "programs.json").read_text())


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("size", [(4, 4), (8, 4), (32, 16)])
def test_onnx_computes_what_the_model_does_for_any_batch_and_size(runs, as_onnx, rows, size):
    pipeline = Pipeline.load(runs.diffusion)
    x, level = torch.randn(rows, 4, *size), torch.rand(rows) * 999
    labels = torch.arange(rows)
    conditioning = pipeline.conditioner({"class_label": labels})
    expected = pipeline.denoiser["network"](x, level, conditioning)
    vector = np.load(as_onnx / "conditions.npz")["vector"][labels.numpy()]
    denoiser = onnxruntime.InferenceSession(as_onnx / "denoiser.onnx")
    found = denoiser.run(None, {"x": x.numpy(), "noise_level": level.numpy(), "vector": vector})[0]
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-4 * float(expected.abs().max()))
    images = onnxruntime.InferenceSession(as_onnx / "decoder.onnx").run(None, {"latents": x.numpy()})[0]
    np.testing.assert_allclose(images, pipeline.codec.decode(x).numpy(), atol=1e-4)


@pytest.mark.parametrize(("rows", "size"), [(1, (4, 4)), (3, (8, 4)), (2, (32, 16))])
def test_torch_computes_what_the_model_does_for_any_batch_and_size(runs, as_torch, rows, size):
    pipeline = Pipeline.load(runs.diffusion)
    x, level = torch.randn(rows, 4, *size), torch.rand(rows) * 999
    conditioning = pipeline.conditioner.null(rows)
    expected = pipeline.denoiser["network"](x, level, conditioning)
    found = torch.export.load(as_torch / "denoiser.pt2").module()(x=x, noise_level=level, vector=conditioning.vector)
    torch.testing.assert_close(found, expected, atol=1e-5 * float(expected.abs().max()), rtol=0)
    images = torch.export.load(as_torch / "decoder.pt2").module()(latents=x)
    torch.testing.assert_close(images, pipeline.codec.decode(x), atol=1e-5, rtol=0)


def test_the_facts_name_every_input_as_the_file_has_it(as_onnx):
    told = facts(as_onnx)
    for name, output in (("denoiser", "output"), ("decoder", "images")):
        session = onnxruntime.InferenceSession(as_onnx / told[name]["file"])
        assert {one.name: one.shape for one in session.get_inputs()} == {
            key: one["shape"] for key, one in told[name]["inputs"].items()
        }
        assert [one.name for one in session.get_outputs()] == [output] == [told[name]["output"]]
        assert 0 < told[name]["difference from torch"] < 1e-4
        assert "height and width are fixed" not in told[name]
    assert told["latents"] == {"shape": [4, 4, 4], "mean": [0.5] * 4, "std": [2.0] * 4}
    assert told["conditions"]["rows"] == ["cat", "dog", "Ankle boot", "none"]
    table = np.load(as_onnx / "conditions.npz")["vector"]
    assert table.shape == (4, 16)


def test_the_lines_of_the_documentation_sample_as_ddim_does(runs, as_onnx):
    pipeline, told = Pipeline.load(runs.diffusion), facts(as_onnx)
    steps, (label, channels) = told["objective"]["steps"], (1, (4, 4, 4))
    x = np.random.default_rng(0).standard_normal((1, *channels), dtype=np.float32)
    conditioning = pipeline.conditioner({"class_label": torch.tensor([label])})

    def denoise(latents, t):
        return pipeline.objective.denoise(pipeline.denoiser["network"], latents, t, conditioning)

    start = torch.from_numpy(x) * steps[0]["sigma"]
    times = pipeline.objective.timesteps(len(steps) - 1)
    expected = pipeline.codec.decode(
        pipeline.manifest.unstandardize(ddim(denoise, pipeline.objective, start, times))
    ).numpy()

    blocks = re.findall(r"^```python\n(.*?)^```", EXPORT.read_text(), re.DOTALL | re.MULTILINE)
    (code,) = [block for block in blocks if "onnxruntime" in block]
    lines = [line for line in code.splitlines() if line and not line.startswith("import")]
    assert len(lines) <= 15
    start = "noise = numpy.random"
    assert sum(line.startswith(start) for line in lines) == 1
    code = "\n".join("noise = given" if line.startswith(start) else line for line in code.splitlines())
    found = {"given": x}
    exec(code.replace("FOLDER", str(as_onnx)).replace("[[3]]", f"[[{label}]]"), found)
    np.testing.assert_allclose(found["images"], expected, atol=1e-3)


# ---- every network, objective and first stage ----


def of_network(network: torch.nn.Module, slots: dict[str, torch.Tensor], side: int = 8) -> Program:
    """The program of a network whose branches that start at zero do not hide the rest."""
    torch.manual_seed(0)
    for parameter in network.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter.data, std=0.05)
    network.requires_grad_(False).eval()
    example = {"x": torch.randn(2, 4, side, side), "noise_level": torch.tensor([700.0, 3.0]), **slots}
    return Program("denoiser", programs._Denoising(network), example, dict.fromkeys(example, ""), "output")


NETWORKS = {
    "unet with tokens": (
        partial(UNet, 4, 16, [1, 2], 1, [0, 1], num_heads=2, context_dim=8),
        {"tokens": torch.randn(2, 3, 8)},
    ),
    "unet with a mask": (
        partial(UNet, 4, 16, [1, 2], 1, [0, 1], num_heads=2, context_dim=8),
        {"tokens": torch.randn(2, 3, 8), "token_mask": torch.tensor([[True, False, False], [True, True, False]])},
    ),
    "unet with a picture": (
        partial(
            UNet, 4, 16, [1, 2], 1, [1], num_heads=2, spatial_channels=2, scale_shift=True, resample_in_blocks=True
        ),
        {"spatial": torch.randn(2, 2, 8, 8)},
    ),
    "dit": (partial(DiT, 4, 2, 32, 2, 2), {"vector": torch.randn(2, 32)}),
    "lightningdit": (
        partial(DiT, 4, 2, 32, 2, 2, rope=True, swiglu=True, rms_norm=True, qk_norm=True),
        {"vector": torch.randn(2, 32)},
    ),
    "dit across to tokens": (
        partial(DiT, 4, 2, 32, 2, 2, context_dim=8),
        {"tokens": torch.randn(2, 3, 8), "token_mask": torch.tensor([[True, False, False], [True, True, False]])},
    ),
    "dit with tokens in sequence": (
        partial(DiT, 4, 2, 32, 2, 2, rope=True, context_dim=8, tokens_in_sequence=True),
        {"tokens": torch.randn(2, 3, 8), "token_mask": torch.tensor([[True, False, False], [True, True, False]])},
    ),
    "edm2": (
        partial(MagnitudePreservingUNet, 4, 16, (1, 2), 1, (1,), vector_channels=6),
        {"vector": torch.randn(2, 6)},
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_is_traced_for_any_batch_and_size(name):
    make, slots = NETWORKS[name]
    program = of_network(make(), slots)
    assert program.fixed == ""
    loaded = program.traced.module()
    assert program.difference(lambda inputs: loaded(**inputs)) < 1e-5
    # More pixels than attention's own branch for small pictures takes.
    rows = torch.arange(3) % 2
    inputs = {key: one[rows] for key, one in program.example.items()}
    inputs |= {key: torch.randn(3, one.shape[1], 24, 32) for key, one in inputs.items() if one.ndim == 4}
    torch.testing.assert_close(loaded(**inputs), program.module(**inputs), atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_is_the_same_in_onnx(name, tmp_path):
    make, slots = NETWORKS[name]
    program = of_network(make(), slots)
    onnx_format._write(program, tmp_path / "net.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx")
    assert program.difference(partial(onnx_format._run, session)) < 1e-4


def test_a_codebook_is_searched_in_the_program(tmp_path):
    sizes = {"base_channels": 8, "channel_mult": [1, 1], "num_res_blocks": 1, "latent_channels": 3}
    quantizer = VectorQuantizer(64, 3)
    torch.nn.init.normal_(quantizer.codebook.weight)
    codec = AutoencoderCodec(
        Encoder(3, **sizes, moments=False), Decoder(3, **sizes), {"encoder": 1}, quantizer=quantizer
    )
    program = Program(
        "decoder", programs._Decoding(codec), {"latents": torch.randn(2, 3, 8, 8)}, {"latents": ""}, "images"
    )
    onnx_format._write(program, tmp_path / "decoder.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "decoder.onnx")
    assert session.get_inputs()[0].shape == ["batch", 3, "height", "width"]
    assert program.difference(partial(onnx_format._run, session)) < 1e-4


class Stubborn(torch.nn.Module):
    """Its weights are of one height and width."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(4, 8, 8))

    def forward(self, x, noise_level, conditioning):
        return x * self.weight + noise_level[:, None, None, None]


def test_a_network_of_one_size_alone_is_written_with_it_and_says_so():
    program = of_network(Stubborn(), {})
    loaded = program.traced.module()
    told = program.described("denoiser.pt2", lambda inputs: loaded(**inputs))
    assert told["inputs"]["x"]["shape"] == ["batch", 4, 8, 8]
    assert told["height and width are fixed"]


def test_what_cannot_be_traced_is_named():
    class Random(Stubborn):
        def forward(self, x, noise_level, conditioning):
            return x * float(noise_level.sum())

    with pytest.raises(ConfigError, match="the denoiser cannot be traced"):
        _ = of_network(Random(), {}).traced


def test_a_program_that_computes_something_else_is_refused():
    with pytest.raises(NumericError, match="differs from the model by"):
        of_network(Stubborn(), {}).difference(lambda inputs: inputs["x"])


OBJECTIVES = {
    "eps": DDPM(SqrtLinear()),
    "v": DDPM(Cosine(), prediction=V()),
    "x0": DDPM(Cosine(), prediction=X0()),
    "edm": EDM(sigma_data=0.5),
    "flow": Flow(),
    "gvp": Interpolant(GVP()),
    "vp": Interpolant(VP()),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_table_of_steps_is_what_the_objective_computes(name):
    objective = OBJECTIVES[name]
    table = programs.steps(objective, 10)
    assert json.loads(json.dumps(table, allow_nan=False)) == table
    assert (table[-1]["alpha"], table[-1]["sigma"]) == (1.0, 0.0)
    x = torch.randn(1, 4, 8, 8)
    for row in table[:-1]:
        t = torch.tensor(row["t"])
        seen = {}

        def network(scaled, level, conditioning, seen=seen):
            seen["scaled"], seen["level"] = scaled, level
            return torch.sin(scaled)

        expected = objective.denoise(network, x, t, Conditioning())
        torch.testing.assert_close(seen["scaled"], row["c_in"] * x)
        torch.testing.assert_close(seen["level"], torch.tensor([row["noise_level"]]))
        found = row["c_skip"] * x + row["c_out"] * torch.sin(row["c_in"] * x)
        torch.testing.assert_close(found, expected, atol=1e-4 * float(expected.abs().max()), rtol=0)
