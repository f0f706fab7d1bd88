"""Sheets of samples while training, by what lies on the pictures of held-out items."""

from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.config.load import build
from ldm.data.transforms import EvalTransform
from ldm.diffusion.module import LatentDiffusion
from ldm.images import to_arrays
from ldm.latents.aligned import Boxes, Map, Pixels
from ldm.latents.datamodule import LatentDataModule
from ldm.latents.masked import MaskedLatents
from ldm.optim.ema import EMA, FixedDecay
from ldm.sampling.shown import drawn_map
from ldm.training.callbacks.previews import SampleLogger
from tests.dense_models import Spread
from tests.tiny_dense import CLASSES, Blocks, Halved, Scenes
from tests.tiny_runs import ADAM, node


def module(keys):
    torch.manual_seed(0)
    sizes = {"in_channels": 3, "model_channels": 16, "channel_mult": [1], "num_res_blocks": 1, "attention_levels": []}
    network = build(node("diffusion.networks.unet.UNet", spatial_channels=1, num_heads=2, **sizes))
    objective = build(node("diffusion.objectives.Flow"))
    ema = partial(EMA, profile=FixedDecay())
    return LatentDiffusion(network, Spread(keys, 16), objective, optimizer=ADAM, ema=ema, label_dropout=0.1)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    made = LatentDataModule(
        Scenes(12),
        None,
        batch_size=4,
        resolution=16,
        num_validation=3,
        cache=tmp_path_factory.mktemp("cache"),
        aligned={"map": Map(CLASSES), "boxes": Boxes(), "image": Pixels()},
        drawn={"low_resolution": Halved()},
        masked=MaskedLatents(Blocks(), variants=2),
    )
    made.setup()
    return made


@pytest.mark.parametrize(
    "keys", [("mask", "masked_latent"), ("low_resolution",), ("map", "class_label"), ("boxes", "boxes_mask")]
)
def test_condition_result_and_truth_stand_side_by_side(tmp_path, data, keys):
    trainer = SimpleNamespace(
        global_step=6,
        is_global_zero=True,
        datamodule=data,
        default_root_dir=str(tmp_path),
        loggers=[],
        precision_plugin=SimpleNamespace(forward_context=torch.no_grad),
    )
    model, callback = module(keys), SampleLogger(every_n_steps=3, held_out=2, seeds=[7, 8], steps=2)
    callback.on_fit_start(trainer, model)
    callback.on_step_end(trainer, model, None)
    with Image.open(tmp_path / "images" / "val" / "samples_00000006.png") as image:
        sheet = np.asarray(image)
    side = 256 if "boxes" in keys else 64
    title = (sheet.shape[0] - 2 * (side + 4)) // 2 if "class_label" in keys else 0
    assert sheet.shape[1] == 4 * (side + 2) + 2  # the condition, two samples, the truth
    pictures = [data.validation_dataset[item]["image"] for item in range(3)]
    truths = [to_arrays(EvalTransform(16)(picture)[None])[0] for picture in pictures]
    top, left, times = title + 2, 3 * (side + 2) + 2, side // 16
    shown = sheet[top : top + side : times, left : left + side : times]
    assert any(np.array_equal(shown, truth) for truth in truths)
    if "map" in keys:
        condition = sheet[top : top + side : times, 2 : 2 + side : times]
        labels = [data.transform.labels(data.validation_dataset[item]["map"]) for item in range(3)]
        assert any(np.array_equal(condition, drawn_map(one)) for one in labels)
