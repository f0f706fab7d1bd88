"""`ldm convert`: exit codes, one message, nothing half-written."""

import json
import pickle
import struct
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from ldm.autoencoder.codec import Codec
from ldm.cli import convert
from tests.interop import compvis_files, dit_files, foreign


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def file() -> Path:
    save_file(foreign.first_stage(), "own.safetensors")
    return Path("own.safetensors")


def test_a_first_stage(file, capsys):
    assert convert.main([str(file), "--resolution", "32", "--license", "CC0-1.0", "--name", "mine"]) == 0
    (run,) = Path("logs").glob("*_mine")
    assert f"{run}  from own.safetensors (CompVis first stage; license: CC0-1.0)" in capsys.readouterr().out
    assert Codec.load(run).size == (32, 32)


def test_a_license_is_that_of_both_runs_of_a_file(capsys):
    kind, size = compvis_files.KINDS["celeba"], compvis_files.SIZES["one level"]
    torch.save(compvis_files.tiny(kind, size), "own.ckpt")
    Path("own.yaml").write_text(yaml.safe_dump(compvis_files.yaml_of(kind, size)))
    assert convert.main(["own.ckpt", "--license", "CC0-1.0"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition("  ")[2] for line in lines] == [
        "from own.ckpt (CompVis first stage; license: CC0-1.0)",
        "from own.ckpt (CompVis latent diffusion; license: CC0-1.0)",
    ]
    for run in Path("logs").iterdir():
        assert json.loads((run / "origin.json").read_text())["license"] == "CC0-1.0"


def test_its_yaml_is_found_beside_it_and_nothing_of_it_is_imported(file):
    Path("bomb.py").write_text("open('touched', 'w')")
    sys.path.insert(0, str(Path.cwd()))
    try:
        Path("own.yaml").write_text(
            "model: {target: bomb.Model, params: {ddconfig: {resolution: 48}, lossconfig: {target: bomb.Loss}}}"
        )
        assert convert.main([str(file)]) == 0
    finally:
        sys.path.remove(str(Path.cwd()))
    assert "bomb" not in sys.modules
    assert not Path("touched").exists()
    (run,) = Path("logs").iterdir()
    assert Codec.load(run).size == (48, 48)


def code(path: Path) -> None:
    class Touch:
        def __reduce__(self):
            return open, ("touched", "w")

    path.write_bytes(pickle.dumps({"state_dict": Touch()}, protocol=2))


BROKEN = {
    "code.ckpt": (code, "which is code"),
    "cut.ckpt": (lambda path: _cut(path, torch.save), "it may be cut off"),
    "cut.safetensors": (lambda path: _cut(path, save_file), "cannot be read as safetensors"),
    "header.safetensors": (lambda path: path.write_bytes(struct.pack("<Q", 10**8) + b"{}"), "claims 100000000 bytes"),
    "empty.ckpt": (lambda path: path.touch(), "is empty"),
    "folder": (lambda path: path.mkdir(), "nothing in this folder says what it holds"),
    "unknown.pt": (lambda path: torch.save({"x.weight": torch.zeros(2)}, path), "of no family that is known here"),
    "nan.pt": (lambda path: torch.save(_nan(), path), "not finite (NaN or infinity) (1):"),
    "near.pt": (lambda path: torch.save(_near(), path), "would also have decoder.conv_in.weight"),
    "nothing.ckpt": (lambda path: None, "no such file or folder"),
}


def _cut(path: Path, save) -> None:
    save(foreign.first_stage(), path)
    path.write_bytes(path.read_bytes()[:100_000])


def _nan() -> dict[str, torch.Tensor]:
    tensors = foreign.first_stage()
    return tensors | {"quant_conv.bias": tensors["quant_conv.bias"] * torch.nan}


def _near() -> dict[str, torch.Tensor]:
    return {name: one for name, one in foreign.first_stage().items() if name != "decoder.conv_in.weight"}


@pytest.mark.parametrize("name", BROKEN)
def test_what_cannot_be_converted_is_one_message(name, capsys):
    make, said = BROKEN[name]
    make(Path(name))
    assert convert.main([name]) == 4
    error = capsys.readouterr().err
    assert error.startswith(f"error: {name}")
    assert error.count("error:") == 1
    assert said in error
    assert not Path("touched").exists()
    assert not Path("logs").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--name", "a/b"], "cannot be the name of a run"),
        (["--config", "missing.yaml"], "missing.yaml: cannot be read as a model's description"),
        (["--config", "own.safetensors"], "cannot be read as a model's description"),
        (["--statistics", "missing.json"], "missing.json: cannot be read as the latents' statistics"),
        (["--autoencoder", "logs"], "is a CompVis first stage, of which --autoencoder says nothing; leave it out"),
        (["--text-encoder", "logs"], "is a CompVis first stage, of which --text-encoder says nothing; leave it out"),
        (["--resolution", "0"], "--resolution"),
        (["--resolutoin", "8"], "--resolution"),
    ],
)
def test_what_is_asked_wrongly_is_one_message(words, said, file, capsys):
    assert convert.main([str(file), *words]) == 2
    assert said in capsys.readouterr().err
    assert not Path("logs").exists()


def test_a_model_with_its_first_stage_takes_no_other(capsys):
    kind, size = compvis_files.KINDS["celeba"], compvis_files.SIZES["one level"]
    torch.save(compvis_files.tiny(kind, size), "own.ckpt")
    Path("own.yaml").write_text(yaml.safe_dump(compvis_files.yaml_of(kind, size)))
    assert convert.main(["own.ckpt", "--autoencoder", "elsewhere"]) == 2
    assert "own.ckpt: holds its first stage; leave out --autoencoder" in capsys.readouterr().err
    assert not Path("logs").exists()


def test_nothing_is_left_of_a_model_whose_autoencoder_is_not_there(capsys):
    torch.save(dit_files.tensors(48, 1), "own.pt")
    Path("own.yaml").write_text("num_heads: 4")
    assert convert.main(["own.pt", "--family", "dit", "--autoencoder", "elsewhere"]) == 4
    assert "elsewhere" in capsys.readouterr().err
    assert not Path("logs").exists()
