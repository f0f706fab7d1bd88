import pytest
import timm
import torch
from safetensors.torch import save_file
from torchvision.transforms.functional import normalize

from ldm.errors import CheckpointError, ConfigError
from ldm.evaluation.features.base import LOGITS, MAIN
from ldm.evaluation.features.resize import Clean
from ldm.evaluation.features.timm_model import TimmModel
from ldm.weights import cache


@pytest.fixture(params=["test_efficientnet.r160_in1k", "test_vit.r160_in1k"])
def saved(request, tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model(request.param).eval()
    path = tmp_path / "model.safetensors"
    save_file(model.state_dict(), path)
    return request.param, model, path


def test_features_and_logits_are_the_models(saved, pictures):
    name, model, path = saved
    features = TimmModel(name, path)
    data = timm.data.resolve_data_config(model.pretrained_cfg)
    pixels = normalize(Clean(160)(pictures) / 255, data["mean"], data["std"])
    with torch.no_grad():
        logits = model(pixels)
        expected = model.forward_head(model.forward_features(pixels), pre_logits=True)
    seen = features(pictures)
    torch.testing.assert_close(seen[:, features.parts[MAIN]], expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(seen[:, features.parts[LOGITS]], logits, rtol=1e-5, atol=1e-5)
    assert seen.shape[1] == features.parts[LOGITS].stop
    assert features.name == f"timm:{name}/clean-160"


def test_an_encoder_without_classifier_has_no_logits(tmp_path, pictures):
    model = timm.create_model("test_vit", num_classes=0)
    path = tmp_path / "model.safetensors"
    save_file(model.state_dict(), path)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: not the weights of timm's test_vit"):
        TimmModel("test_vit", path)


def test_real_weights_of_a_package_fit(pictures):
    path = cache.find("efficientnet-lite0")
    features = TimmModel("tf_efficientnet_lite0")
    assert features.parts == {MAIN: slice(0, 1280), LOGITS: slice(1280, 2280)}
    # The file's own names come in the order of timm's: equal tensors, so the difference is zero.
    for ours, theirs in zip(features.network.state_dict().values(), cache.read(path).values(), strict=True):
        assert torch.equal(ours, theirs)
    assert features(pictures).softmax(1).max() > 0


def test_an_unknown_model_is_a_mistake_in_the_name():
    with pytest.raises(ConfigError, match="timm has no model 'resnet5O': did you mean 'resnet50'"):
        TimmModel("resnet5O")
    with pytest.raises(ConfigError, match=r"timm:test_vit\.nothing"):
        TimmModel("test_vit.nothing")


def test_missing_weights_say_where_to_get_them(tmp_path, monkeypatch):
    with pytest.raises(CheckpointError, match=r"nowhere: no weights of timm's test_vit.*hf download timm/test_vit"):
        TimmModel("test_vit", tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="Hugging Face's cache: no weights of timm's test_vit"):
        TimmModel("test_vit")
