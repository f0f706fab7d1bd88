"""Models of maps, holes, small pictures and layouts: their code's conditions for the same weights, and samples."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from PIL import Image
from safetensors.torch import save_file

from ldm.cli import sample
from ldm.config.load import build
from ldm.errors import CheckpointError
from ldm.interop.compvis import model as compvis_model
from ldm.interop.compvis import text_transformer
from ldm.interop.convert import convert
from ldm.interop.models import Request
from ldm.interop.tables import to_theirs
from ldm.sampling.pipeline import Pipeline
from tests.interop.compvis.test_text_transformer import bert
from tests.interop.compvis_files import SIZES, Kind, inventory, source, tiny, yaml_of

TWO = SIZES["two levels"]
CLASSES, BOXES, WIDTH = 6, 3, 16
MAPPER = torch.randn(2, CLASSES, 1, 1, generator=torch.Generator().manual_seed(0))
LATENT = torch.empty(1, 2, 8, 8, device="meta")
MAPS = Kind({"num_heads": 4, "spatial_channels": 2}, codebook=True)
HOLES = Kind({"num_heads": 4, "spatial_channels": 3, "resample_in_blocks": True}, codebook=True)
SMALL = Kind({"num_head_channels": 32, "spatial_channels": 3}, codebook=True)
LAYOUTS = Kind({"context_dim": WIDTH, "num_head_channels": 32, "transformer_depth": 3}, codebook=True)
# (kind, tensors of `cond_stage_model.`, what their code calls the condition)
TASKS = {
    "map": (MAPS, {"channel_mapper.weight": MAPPER}, "segmentation"),
    "hole": (HOLES, {}, "masked_image"),
    "small": (SMALL, {}, "LR_image"),
    "layout": (LAYOUTS, bert(), "coordinates_bbox"),
}


def of_task(task, **said):
    kind, encoder, key = TASKS[task]
    file = tiny(kind, TWO) | {f"cond_stage_model.{name}": one for name, one in encoder.items()}
    return file, yaml_of(kind, TWO, cond_stage_key=key, **said)


def converted(task, **said):
    file, config = of_task(task, **said)
    (found,) = compvis_model.convert(source(file, config), Request())
    return found


def conditioner(found):
    module = build(found.params["conditioner"]).eval()
    prefix = "conditioner."
    own = {name.removeprefix(prefix): one for name, one in found.weights.items() if name.startswith(prefix)}
    module.load_state_dict(own)
    return module


@torch.no_grad()
def test_a_map_is_halved_and_projected_as_theirs():
    """SpatialRescaler in CompVis/latent-diffusion: bilinear halvings of the one-hot, then a 1x1 convolution."""
    classes = torch.randint(0, CLASSES, (2, 32, 32), dtype=torch.uint8)
    expected = F.one_hot(classes.long(), CLASSES).movedim(-1, 1).float()
    for _ in range(2):
        expected = F.interpolate(expected, scale_factor=0.5, mode="bilinear")
    expected = F.conv2d(expected, MAPPER)
    found = conditioner(converted("map"))({"map": classes, "latent": LATENT.expand(2, -1, -1, -1)}).spatial
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_a_hole_is_told_as_theirs():
    """scripts/inpaint.py: the latent, then the mask, nearest, from -1 to 1."""
    latent, mask = torch.randn(2, 2, 8, 8), (torch.rand(2, 1, 16, 16) < 0.5).float()
    expected = torch.cat([latent, F.interpolate(mask * 2 - 1, size=(8, 8))], 1)
    found = conditioner(converted("hole"))({"masked_latent": latent, "mask": mask}).spatial
    assert torch.equal(found, expected)


@torch.no_grad()
def test_a_small_picture_is_read_as_it_is():
    picture = torch.rand(2, 3, 8, 8) * 2 - 1
    found = conditioner(converted("small"))({"low_resolution": picture, "latent": LATENT.expand(2, -1, -1, -1)})
    assert found.vector is None
    assert torch.equal(found.spatial, picture)


def test_weights_are_mapped_both_ways_to_the_bit():
    for task in ("map", "layout"):
        kind, encoder, _ = TASKS[task]
        found = converted(task)
        own = {name: one for name, one in found.weights.items() if name.startswith("conditioner.")}
        assert own
        if task == "map":
            assert torch.equal(own["conditioner.table.weight"].T[..., None, None], MAPPER)
            continue
        back = to_theirs(
            text_transformer.table(2), {name.removeprefix("conditioner."): one for name, one in own.items()}
        )
        assert all(torch.equal(one, encoder[name]) for name, one in back.items())
        assert found.origin.dropped["the text transformer's prediction of words"] == 2
    assert kind is LAYOUTS


@pytest.mark.parametrize(
    ("said", "encoder"),
    [
        ({"cond_stage_config": {"params": {"method": "nearest"}}}, {}),
        ({"cond_stage_config": {"params": {"multiplier": 2.0}}}, {}),
        ({}, {"channel_mapper.bias": torch.zeros(2)}),
        ({"cond_stage_key": "bbox_img"}, {}),
    ],
)
def test_what_is_no_map_of_ours_is_given_ready_made(said, encoder):
    file, config = of_task("map")
    config["model"]["params"] |= said
    file |= {f"cond_stage_model.{name}": one for name, one in encoder.items()}
    (found,) = compvis_model.convert(source(file, config), Request())
    assert found.params["conditioner"]["target"].endswith("Given")
    assert found.data == {}


def test_a_missing_tensor_is_noticed():
    file, config = of_task("layout")
    lacking = {name: one for name, one in file.items() if "to_out.bias" not in name}
    with pytest.raises(CheckpointError, match="missing"):
        compvis_model.convert(source(lacking, config), Request())


@pytest.mark.parametrize(
    ("name", "params"),
    {
        "bsr_sr": {"channels": 3, "most": 0.0},
        "semantic_synthesis256": {"map_classes": 182, "channels": 3},
        "inpainting_big": {"channels": 3, "outside": -1.0},
    }.items(),
)
def test_published_files_are_known_by_their_shapes(name, params):
    config = {"model": {"params": {"image_size": 64}}} if "semantic" in name else {}
    (found,) = compvis_model.convert(source(inventory(name), config), Request())
    assert found.params["conditioner"]["params"] == params
    assert not any("conditioner.safetensors" in note for note in found.origin.notes)


def saved(task, folder):
    file, config = of_task(task, parameterization="v")
    path = folder / f"{task}.safetensors"
    save_file({name: one.contiguous() for name, one in file.items()}, path)
    path.with_suffix(".yaml").write_text(yaml.safe_dump(config))
    lines = [*convert(path, Request(), config=None, license=None, name=None, logdir=folder / "logs")]
    return Path(lines[1].split("  ")[0])


@pytest.mark.parametrize("task", TASKS)
def test_a_converted_run_is_sampled_from_the_command_line(task, tmp_path, capsys):
    """Pictures of 16 pixels, latents of 8: small pictures have 8."""
    run = saved(task, tmp_path)
    random = np.random.default_rng(0)
    picture, mask, small, classes = (tmp_path / f"{name}.png" for name in ("picture", "mask", "small", "map"))
    Image.fromarray(random.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(picture)
    Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(small)
    Image.fromarray(np.repeat(np.uint8([[0, 255]]), 8, axis=1).repeat(16, axis=0)).save(mask)
    Image.fromarray(random.integers(0, CLASSES, (16, 16), dtype=np.uint8)).save(classes)
    (tmp_path / "boxes.json").write_text('[{"class": 2, "box": [0, 0, 0.5, 1]}]')
    flags = {
        "map": ["--map", str(classes)],
        "hole": ["--image", str(picture), "--mask", str(mask)],
        "small": ["--image", str(small)],
        "layout": ["--layout", str(tmp_path / "boxes.json")],
    }
    command = ["-r", str(run), "-n", "1", "--steps", "2", "--out", str(tmp_path / "out"), *flags[task]]
    assert sample.main(command) == 0, capsys.readouterr().err
    made = [path for path in (tmp_path / "out").glob("*.png") if path.name != "grid.png"]
    assert len(made) == 1
    if task == "hole":
        before, after = (np.asarray(Image.open(path)) for path in (picture, made[0]))
        assert np.array_equal(before[:, :8], after[:, :8])
        assert not np.array_equal(before[:, 8:], after[:, 8:])


def test_the_hole_is_black_before_it_is_encoded(tmp_path):
    pipeline = Pipeline.load(saved("hole", tmp_path))
    assert pipeline.dense.fill == -1
    image, mask = torch.rand(1, 3, 16, 16), torch.zeros(1, 1, 16, 16)
    mask[..., 8:] = 1
    asked = [{"image": image[0], "mask": mask[0]}]
    black = torch.where(mask > 0, -1.0, image)
    latent = pipeline.manifest.standardize(pipeline.codec.encode(black)[0].half().float())
    ready = [{"masked_latent": latent[0], "mask": mask[0]}]
    found, expected = (np.asarray(pipeline.generate([0], one, steps=2)[0]) for one in (asked, ready))
    assert np.array_equal(found[:, 8:], expected[:, 8:])
    gray = replace(pipeline, dense=replace(pipeline.dense, fill=0.0))
    assert not np.array_equal(np.asarray(gray.generate([0], asked, steps=2)[0]), found)
