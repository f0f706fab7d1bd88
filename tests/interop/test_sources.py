"""Foreign files are read without running them, and whatever is wrong with one is a message."""

import json
import os
import pickle
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ldm.errors import CheckpointError, ConfigError
from ldm.interop import sources, weight_files

TENSORS = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(3)}


def refusal(path, config=None, error=CheckpointError) -> str:
    with pytest.raises(error) as caught:
        sources.read(path, config)
    return str(caught.value)


@pytest.mark.parametrize("name", ["a.safetensors", "a.ckpt", "a.pt", "a.pth", "a.bin"])
def test_tensors_of_each_kind_of_file(name, tmp_path):
    path = tmp_path / name
    (save_file if name.endswith("safetensors") else torch.save)(TENSORS, path)
    source = sources.read(path)
    assert source.name == "a"
    assert source.tensors.keys() == TENSORS.keys()
    assert all(torch.equal(source.tensors[key], one) for key, one in TENSORS.items())
    assert [*source.sha256] == [name]


def test_what_a_file_says_besides_its_tensors(tmp_path):
    saved = {
        "state_dict": TENSORS,
        "global_step": 7,
        "empty": {},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(2)}}}],
        "nested": {"list": [1, {"x": "y"}]},
    }
    torch.save(saved, tmp_path / "a.ckpt")
    (tmp_path / "a.yaml").write_text("model: {target: os.system, params: {scale_factor: 0.5}}")
    source = sources.read(tmp_path / "a.ckpt")
    assert source.tensors.keys() == TENSORS.keys()
    assert source.optimizer_tensors == 1
    assert (source.rest["global_step"], source.rest["nested.list.1.x"]) == (7, "y")
    assert source.described("model", "params", "scale_factor") == 0.5
    assert source.described("model", "target", "x") is None


def test_a_folder_with_its_config_and_files_in_parts(tmp_path):
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    index = {"weight_map": {"a.weight": "one.safetensors", "b": "two.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({"a.weight": TENSORS["a.weight"]}, tmp_path / "one.safetensors")
    assert "names two.safetensors, which is not there" in refusal(tmp_path)
    save_file({"b": TENSORS["b"]}, tmp_path / "two.safetensors")
    assert sources.read(tmp_path).tensors.keys() == TENSORS.keys()
    for broken in ({}, {"weight_map": [1]}, {"weight_map": {"a": 3}}):
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(broken))
        assert "expected `weight_map`, which says the file of each tensor" in refusal(tmp_path)


# ---- files that are not what they should be ----


@pytest.mark.parametrize(
    ("saved", "said"),
    [
        ({"state_dict": TENSORS, "b": torch.tensor(4)}, "in a prefix of their names alone.\n  there twice (1):\n"),
        ({"a": {"weight": torch.zeros(1)}, "a.weight": torch.ones(1)}, "two values under one name"),
        ({1: torch.zeros(1), "1": torch.ones(1)}, "once flat: 1"),
    ],
)
def test_two_tensors_that_would_get_one_name(saved, said, tmp_path):
    torch.save(saved, tmp_path / "a.ckpt")
    assert said in refusal(tmp_path / "a.ckpt")


def test_a_tensor_in_two_files_of_a_folder(tmp_path):
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    index = {"weight_map": {"a.weight": "one.safetensors", "b": "two.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    for name in ("one", "two"):
        save_file(TENSORS, tmp_path / f"{name}.safetensors")
    assert "two.safetensors: a.weight is in another file of the folder" in refusal(tmp_path)


class Touch:
    """Runs code when it is unpickled by anything that runs code."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_would_run_code_is_refused_and_not_run(zipped, tmp_path):
    touched, path = tmp_path / "touched", tmp_path / "a.ckpt"
    torch.save({**TENSORS, "x": Touch(touched)}, path, _use_new_zipfile_serialization=zipped)
    text = refusal(path)
    assert "it names posix.system, which is code. Nothing of it was run." in text
    assert "add_safe_globals" not in text
    assert not touched.exists()


@pytest.mark.parametrize("name", ["builtins.eval", "builtins.getattr", "subprocess.Popen", "numpy.load"])
def test_no_stand_in_lets_code_through(name, tmp_path):
    module, function = name.rsplit(".", 1)
    code = f"c{module}\n{function}\n(S'x'\ntR.".encode()
    (tmp_path / "a.ckpt").write_bytes(b"\x80\x02" + code)
    assert not sys.flags.safe_path
    assert "was run" in refusal(tmp_path / "a.ckpt") or "cannot be read" in refusal(tmp_path / "a.ckpt")


def test_the_variable_that_permits_code_is_refused(tmp_path, monkeypatch):
    torch.save(TENSORS, tmp_path / "a.ckpt")
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    assert "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD is set" in refusal(tmp_path / "a.ckpt")


@pytest.mark.parametrize("name", ["a.ckpt", "a.safetensors"])
@pytest.mark.parametrize("content", ["empty", "text", "pointer", "half"])
def test_a_broken_file(name, content, tmp_path):
    path = tmp_path / name
    (save_file if name.endswith("safetensors") else torch.save)({"a": torch.randn(1000)}, path)
    whole = path.read_bytes()
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n"
    half = whole[: len(whole) // 2]
    path.write_bytes({"empty": b"", "text": b"<html>Not found", "pointer": pointer, "half": half}[content])
    text = refusal(path)
    assert str(path) in text
    assert "Get " in text
    assert len(text.splitlines()) == 1


def test_a_header_that_claims_more_than_there_is(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", 100_000_000) + b'{"a":')
    assert "its header claims 100000000 bytes of 13" in refusal(path)


def test_what_refers_to_itself_ends(tmp_path, monkeypatch):
    circle: dict = {"a": torch.zeros(1)}
    circle["again"] = circle
    torch.save(circle, tmp_path / "a.ckpt")
    assert "holds itself" in refusal(tmp_path / "a.ckpt")
    doubled: dict = {}
    for _ in range(40):
        doubled = {"x": doubled, "y": doubled}
    monkeypatch.setattr(weight_files, "_LEAVES", 1000)
    torch.save(doubled, tmp_path / "b.ckpt")
    assert "more than 1,000 values" in refusal(tmp_path / "b.ckpt")


def test_a_tensor_alone_is_no_checkpoint(tmp_path):
    torch.save(torch.zeros(2), tmp_path / "a.pt")
    assert "expected a dictionary of tensors, found Tensor" in refusal(tmp_path / "a.pt")


def test_places_without_weights(tmp_path):
    assert "no such file or folder" in refusal(tmp_path / "nothing.ckpt")
    assert "nothing in this folder says what it holds" in refusal(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert "no weights in this folder" in refusal(tmp_path)
    (tmp_path / "a.txt").write_text("x")
    assert "expected a file of weights (.safetensors" in refusal(tmp_path / "a.txt")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("!!python/object/apply:os.system ['touch touched']", "could not determine a constructor"),
        ("a: [", "while parsing"),
        ("- 1", "expected a mapping"),
        ("[" * 5000, "cannot be read as a model's description"),
        (b"\xff\xfe\x00", "cannot be read as a model's description"),
    ],
)
def test_descriptions_that_cannot_be_read(text, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(TENSORS, tmp_path / "a.ckpt")
    (tmp_path / "own.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    message = refusal(tmp_path / "a.ckpt", tmp_path / "own.yaml", ConfigError)
    assert said in message
    assert not (tmp_path / "touched").exists()


def test_parts_of_a_pipeline_stay_in_its_folder(tmp_path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "config.json").write_text("{}")
    (tmp_path / "pipe").mkdir()
    (tmp_path / "pipe" / "model_index.json").write_text('{"../outside": ["diffusers", "UNet2DModel"]}')
    assert sources.read(tmp_path / "pipe").tensors == {}


# ---- checkpoints of the lineage: objects of other programs besides the weights ----

LIGHTNING_1 = """
import argparse, collections, pathlib, sys, types, typing
import numpy, torch

def fake(name, *classes):
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        sys.modules.setdefault(".".join(parts[:end]), types.ModuleType(".".join(parts[:end])))
    for one in classes:
        one.__module__ = name
        setattr(sys.modules[name], one.__name__, one)

class ModelCheckpoint: pass
class EarlyStopping: pass
class AttributeDict(dict): pass
class DictConfig: pass
class ListConfig: pass
class AnyNode: pass
class ContainerMetadata: pass
fake("pytorch_lightning.callbacks.model_checkpoint", ModelCheckpoint)
fake("pytorch_lightning.callbacks.early_stopping", EarlyStopping)
fake("pytorch_lightning.utilities.parsing", AttributeDict)
fake("omegaconf.dictconfig", DictConfig)
fake("omegaconf.listconfig", ListConfig)
fake("omegaconf.nodes", AnyNode)
fake("omegaconf.base", ContainerMetadata)

def made(cls, **state):
    one = cls()
    one.__dict__.update(state)
    return one

node = made(AnyNode, _val=3, _metadata=made(ContainerMetadata, ref_type=typing.Any, object_type=dict, key_type=str))
config = made(DictConfig, _content={"lr": node, "list": made(ListConfig, _content=[node])})
torch.save({
    "epoch": 3,
    "global_step": 100,
    "pytorch-lightning_version": "1.4.2",
    "state_dict": collections.OrderedDict({"a.weight": torch.ones(2, 2)}),
    "callbacks": {
        ModelCheckpoint: {"best_model_score": torch.tensor(0.5), "dirpath": pathlib.Path("x")},
        EarlyStopping: {"wait_count": 0, "best_score": numpy.float64(0.5)},
    },
    "optimizer_states": [{"state": {0: {"step": 1, "exp_avg": torch.zeros(2)}}, "rates": [numpy.float32(1)]}],
    "lr_schedulers": [],
    "hparams_name": "kwargs",
    "hyper_parameters": AttributeDict(lr=0.5, config=config),
    "args": argparse.Namespace(model="x", lr=1),
    "counts": collections.defaultdict(list, a=[1]),
    "array": numpy.arange(3),
}, sys.argv[1])
"""


def test_a_checkpoint_of_lightning_1_opens_without_its_programs(tmp_path):
    path, script = tmp_path / "a.ckpt", tmp_path / "make.py"
    script.write_text(LIGHTNING_1)
    subprocess.run([sys.executable, str(script), str(path)], check=True, cwd=tmp_path)
    before = {*sys.modules}
    source = sources.read(path)
    assert not {name for name in {*sys.modules} - before if name.startswith(("omegaconf", "pytorch_lightning.call"))}
    assert torch.equal(source.tensors["a.weight"], torch.ones(2, 2))
    assert source.rest["global_step"] == 100
    assert source.rest["hyper_parameters.lr"] == 0.5
    assert (source.rest["counts.a.0"], source.rest["args.model"]) == (1, "x")
    assert source.optimizer_tensors == 1
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)  # the stand-ins are for that one reading alone
