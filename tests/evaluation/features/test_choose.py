import sys

import pytest
import torch

from ldm.errors import CheckpointError, ConfigError
from ldm.evaluation.features.choose import KNOWN, choose
from ldm.evaluation.features.classifier import Classifier, save

MISSING = {
    "inception": r"weights-inception-2015-12-05-6726825d\.pth",
    "inception-clean": r"weights-inception-2015-12-05-6726825d\.pth",
    "alexnet": r"ldm weights --fetch lpips-alexnet(.|\n)*alexnet-owt-7be5be79\.pth",
    "vgg16": r"ldm weights --fetch lpips-vgg16(.|\n)*vgg16-397923af\.pth",
    "dinov2": "hf download facebook/dinov2-large",
    "dinov2-base": "hf download facebook/dinov2-base",
    "clip": "hf download openai/clip-vit-large-patch14",
    "clip-base": "hf download openai/clip-vit-base-patch32",
    "timm:test_vit": "hf download timm/test_vit",
    "classifier:nothing.safetensors": "no such file",
}


@pytest.fixture(autouse=True)
def _no_caches(tmp_path, monkeypatch):
    monkeypatch.setenv("LDM_WEIGHTS", str(tmp_path / "weights"))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf"))


@pytest.mark.parametrize("name", MISSING)
def test_missing_weights_are_one_message(name, tmp_path):
    with pytest.raises(CheckpointError, match=MISSING[name]):
        choose(name)
    with pytest.raises(CheckpointError, match="given"):
        choose(name, weights=tmp_path / "given.safetensors")


def test_every_known_name_was_tried():
    assert {name.split(":")[0] for name in KNOWN} == {name.split(":")[0] for name in MISSING}


@pytest.mark.parametrize(
    ("name", "near"), [("alexnt", "'alexnet'"), ("dino", "'dinov2'"), ("timm:", "timm:<model>"), ("xyz", "valid: ")]
)
def test_an_unknown_name_is_answered_by_the_nearest(name, near):
    with pytest.raises(ConfigError, match=f"features '{name}' are unknown: .*{near}"):
        choose(name)


@pytest.mark.parametrize(
    ("name", "package"),
    [
        ("inception", "torch_fidelity"),
        ("dinov2", "transformers"),
        ("clip", "transformers"),
        ("timm:test_vit", "timm"),
    ],
)
def test_a_missing_package_says_what_to_install(name, package, tmp_path, monkeypatch):
    for module in [module for module in sys.modules if module.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr("ldm.weights.cache.find", lambda name, given=None: tmp_path / "file")
    with pytest.raises(ConfigError, match=rf"need the package {package}.*: pip install -e .\[evaluation\]"):
        choose(name)


def test_a_classifier_is_named_by_its_file(tmp_path):
    file = tmp_path / "shapes.safetensors"
    save(Classifier(3, 5, 8), (16, 24), file)
    before = torch.get_rng_state()
    features = choose(f"classifier:{file}")
    assert torch.equal(torch.get_rng_state(), before)
    assert features.name == "classifier/clean-16x24"
    assert features(torch.zeros(2, 3, 16, 24, dtype=torch.uint8)).shape == (2, 37)
