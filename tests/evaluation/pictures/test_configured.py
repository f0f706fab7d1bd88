"""The data set of a configuration: which part, at which size, in which order."""

import pytest

from ldm.config.load import to_yaml
from ldm.errors import ConfigError
from ldm.evaluation.pictures.configured import NoSuchPart, of_data, of_file


def test_parts_of_a_configuration(autoencoder_tree, tmp_path):
    file = tmp_path / "tree.yaml"
    file.write_text(to_yaml(autoencoder_tree))
    train, validation = (of_file(file, [], (), part) for part in ("train", "validation"))
    assert (len(train.pictures), len(validation.pictures)) == (16, 4)
    assert of_file(file, [], ()).part == "validation"
    assert train.pictures.shape == (3, 16, 16)
    assert 0 < sum(train.pictures.labels()[:8]) < 8  # not one class after another
    small = of_file(file, ["data.params.resolution=8", "data.params.channels=1"], (), "train")
    assert small.pictures.shape == (1, 8, 8)
    with pytest.raises(NoSuchPart, match="has no validation part; take --part train"):
        of_file(file, ["data.params.num_validation=0"], (), "validation")
    assert of_file(file, ["data.params.num_validation=0"], ()).part == "train"


def test_a_run_says_the_size_itself(autoencoder_tree):
    pixels = {"resolution": 8, "channels": 1, "interpolation": "bilinear"}
    autoencoder_tree["data"]["params"]["seed"] = 0
    found = of_data(autoencoder_tree["data"], (), "train", "", pixels)
    assert found.pictures.shape == (1, 8, 8)
    assert found.pictures.description()["pixels"]["interpolation"] == "bilinear"


def test_what_is_no_data_module():
    node = {"target": "ldm.data.transforms.EvalTransform", "params": {"resolution": 8}}
    with pytest.raises(ConfigError, match=r"x.yaml: data.target: expected one of ldm's data modules"):
        of_data(node, (), None, "x.yaml")
