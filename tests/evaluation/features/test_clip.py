import pytest
import torch
from torchvision.transforms.functional import normalize
from transformers import CLIPConfig, CLIPModel

from ldm.errors import CheckpointError
from ldm.evaluation.features.clip import CLIP
from ldm.evaluation.features.resize import Pillow

MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A whole CLIP, text and all, as the published files are."""
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config=tower | {"vocab_size": 50},
        vision_config=tower | {"image_size": 64, "patch_size": 16, "projection_dim": 24},
        projection_dim=24,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CLIPModel(config).eval()
    folder = tmp_path_factory.mktemp("clip")
    model.save_pretrained(folder)
    return folder, model


def test_features_are_projected_image_embeddings(saved, pictures):
    folder, model = saved
    features = CLIP(folder / "model.safetensors")
    pixels = normalize(Pillow(64)(pictures) / 255, MEAN, STD)
    with torch.no_grad():
        expected = model.visual_projection(model.vision_model(pixels).pooler_output)
    seen = features(pictures)
    assert seen.shape == (4, 24)
    assert seen.std() > 1e-3
    torch.testing.assert_close(seen, expected, rtol=1e-5, atol=1e-5)
    assert features.name == "clip-vit-32-16/pillow-64"


def test_another_model_is_refused(tmp_path, saved):
    _, model = saved
    state = {name: tensor for name, tensor in model.state_dict().items() if "visual_projection" not in name}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: not the weights of CLIP: 1 are missing"):
        CLIP(tmp_path / "model.safetensors")
