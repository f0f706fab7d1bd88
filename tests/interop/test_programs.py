"""Programs of decoder and denoiser: what torch.export and onnxruntime compute is what the model computes."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from ldm.cli import export
from ldm.sampling.pipeline import Pipeline
from ldm.sampling.samplers import ddim

onnxruntime = pytest.importorskip("onnxruntime")


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


def test_the_steps_of_the_facts_sample_as_ddim_does(runs, as_onnx):
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

    denoiser, decoder = (onnxruntime.InferenceSession(as_onnx / f"{name}.onnx") for name in ("denoiser", "decoder"))
    vector = np.load(as_onnx / "conditions.npz")["vector"][[label]]
    x = x * steps[0]["sigma"]
    for now, after in pairwise(steps):
        level = np.array([now["noise_level"]], np.float32)
        output = denoiser.run(None, {"x": now["c_in"] * x, "noise_level": level, "vector": vector})[0]
        data = now["c_skip"] * x + now["c_out"] * output
        x = after["alpha"] * data + after["sigma"] / now["sigma"] * (x - now["alpha"] * data)
    images = decoder.run(None, {"latents": 2.0 * x + np.float32(0.5)})[0]
    np.testing.assert_allclose(images, expected, atol=1e-3)
