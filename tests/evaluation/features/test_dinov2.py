"""Against transformers on a tiny model, and against the arithmetic of DINOv2's own repository."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torchvision.transforms.functional import normalize
from transformers import Dinov2Config, Dinov2Model

from ldm.errors import CheckpointError
from ldm.evaluation.features.dinov2 import DINOv2
from ldm.evaluation.features.resize import Pillow

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def tiny(folder, image_size: int) -> Dinov2Model:
    config = Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=image_size, patch_size=14
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Dinov2Model(config).eval()
    torch.nn.init.normal_(model.embeddings.position_embeddings, generator=torch.Generator().manual_seed(0))
    model.save_pretrained(folder)
    return model


def cls(model, pictures) -> torch.Tensor:
    with torch.no_grad():
        return model(normalize(Pillow(224)(pictures) / 255, MEAN, STD)).pooler_output


def test_features_are_the_class_token(tmp_path, pictures):
    model = tiny(tmp_path, image_size=224)
    features = DINOv2(tmp_path / "model.safetensors")
    seen = features(pictures)
    assert seen.shape == (4, 32)
    assert seen.std() > 0.1
    torch.testing.assert_close(seen, cls(model, pictures), rtol=1e-5, atol=1e-5)
    assert features.name == "dinov2-vit-32-14-cls/pillow-224"


def test_position_embeddings_are_resized_as_in_its_repository(tmp_path, pictures):
    model = tiny(tmp_path, image_size=518)  # as the published ones: 37 x 37 patches
    features = DINOv2(tmp_path / "model.safetensors")
    positions = model.embeddings.position_embeddings.detach()
    square = positions[:, 1:].reshape(1, 37, 37, 32).permute(0, 3, 1, 2)
    scale = float(16 + 0.1) / 37
    resized = F.interpolate(square, mode="bicubic", antialias=False, scale_factor=(scale, scale))
    expected = torch.cat((positions[:, :1], resized.permute(0, 2, 3, 1).view(1, -1, 32)), dim=1)
    assert torch.equal(features.network.embeddings.position_embeddings, expected)
    difference = (features(pictures) - cls(model, pictures)).abs().max().item()
    assert 0 < difference < 0.1  # small, but transformers' own would be another space


def test_the_hash_is_of_the_file_not_of_what_was_computed_from_it(tmp_path):
    tiny(tmp_path / "a", image_size=518)
    tiny(tmp_path / "b", image_size=224)
    one, other, again = (DINOv2(tmp_path / folder / "model.safetensors") for folder in "aba")
    assert one.weights == again.weights != other.weights


def test_what_a_file_lacks_is_not_replaced_by_random_numbers(tmp_path):
    model = tiny(tmp_path, image_size=224)
    state = {name: tensor for name, tensor in model.state_dict().items() if "layer.1.mlp.fc1" not in name}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(CheckpointError, match=r"not the weights of DINOv2: 2 are missing, the first .*fc1\.bias"):
        DINOv2(tmp_path / "model.safetensors")


def test_a_broken_file_is_named(tmp_path):
    tiny(tmp_path, image_size=224)
    file = tmp_path / "model.safetensors"
    file.write_bytes(np.random.default_rng(0).bytes(1000))
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be read as DINOv2"):
        DINOv2(file)
