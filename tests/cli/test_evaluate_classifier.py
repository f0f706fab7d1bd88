"""`ldm evaluate classifier`: it learns the classes of a configuration, and is one that --classifier reads."""

import numpy as np
import pytest
from PIL import Image

from ldm.cli import evaluate
from ldm.config.load import to_yaml
from ldm.errors import ConfigError, ResourceError
from ldm.evaluation.features.choose import choose
from ldm.evaluation.pictures import configured


@pytest.fixture
def config(tmp_path, monkeypatch, autoencoder_tree):
    """Bright and dark pictures, told apart at a glance."""
    monkeypatch.chdir(tmp_path)
    random = np.random.default_rng(0)
    for index in range(300):
        name, low = (("bright", 150), ("dark", 0))[index % 2]
        (tmp_path / "pictures" / name).mkdir(exist_ok=True, parents=True)
        pixels = random.integers(low, low + 100, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "pictures" / name / f"{index}.png")
    autoencoder_tree["data"]["params"]["train"]["params"]["root"] = str(tmp_path / "pictures")
    autoencoder_tree["data"]["params"]["num_validation"] = 40
    (tmp_path / "x.yaml").write_text(to_yaml(autoencoder_tree))
    return tmp_path / "x.yaml"


def test_it_is_trained_and_says_how_good_it_is(config, tmp_path, capsys):
    assert evaluate.main(["classifier", str(config), "--out", "c.safetensors", "--epochs", "8"]) == 0
    printed = capsys.readouterr().out
    assert "c.safetensors: 2 classes, 8 epochs of 260 pictures" in printed
    assert "accuracy on 40 pictures that it has not seen (validation): 100.0%" in printed
    space = choose("classifier:c.safetensors")
    assert space.name.startswith("classifier")


def test_without_a_validation_part(config, capsys):
    words = ["classifier", str(config), "--epochs", "1", "data.params.num_validation=0"]
    assert evaluate.main(words) == 0
    assert "its accuracy is not known" in capsys.readouterr().out


def test_pictures_without_classes(config, tmp_path, capsys):
    words = ["classifier", str(config), f"data.params.train.params.root={tmp_path / 'pictures' / 'dark'}"]
    assert evaluate.main(words) == ConfigError.exit_code
    assert "its data set has no classes" in capsys.readouterr().err
    assert not (tmp_path / "classifier.safetensors").exists()


def test_a_place_that_cannot_be_written_to_is_refused_before_anything_is_read(config, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(configured, "of_file", None)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    assert evaluate.main(["classifier", str(config), "--out", "folder"]) == ConfigError.exit_code
    assert "--out folder: is a folder" in capsys.readouterr().err
    assert evaluate.main(["classifier", str(config), "--out", "file/c.safetensors"]) == ResourceError.exit_code
    assert "choose another one with --out" in capsys.readouterr().err


def test_a_judge_that_is_replaced_is_named(config, tmp_path, capsys):
    (tmp_path / "c.safetensors").write_bytes(b"another")
    words = ["classifier", str(config), "--out", "c.safetensors", "--epochs", "1", "data.params.num_validation=0"]
    assert evaluate.main(words) == 0
    assert "c.safetensors: is there, and will be replaced" in capsys.readouterr().out
