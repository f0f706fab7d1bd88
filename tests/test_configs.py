"""Every shipped configuration: its model is built at full size (on the meta device), and it trains two tiny steps."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from pytorch_lightning.strategies import Strategy

import main
from ldm.cli import sample
from ldm.config.load import Config, build, load
from ldm.interop.compvis.published import PUBLISHED as PUBLISHED_MODELS
from tests.tiny_text import (
    BERT_WORDS,
    CLIPS,
    LONGEST,
    WIDTH,
    save_models,
    save_text_encoder,
    save_vocabulary,
)

ROOT = Path(__file__).parents[1]
FILES = {str(path.relative_to(ROOT / "configs")): path for path in sorted((ROOT / "configs").rglob("*.yaml"))}
# To merge after a whole configuration: any of stage 2, the one of FashionMNIST, or either of the quickstart.
FRAGMENTS = [name for name in FILES if name.startswith("cluster/")]
VARIANTS = [name for name in FILES if name.startswith("fashion_mnist/variants/")]
OWN_PICTURES, LORA, BUCKETS = (f"quickstart/{name}.yaml" for name in ("own_pictures", "lora", "buckets"))
TO_MERGE = (*FRAGMENTS, *VARIANTS, OWN_PICTURES, LORA, BUCKETS)
CONFIGS = {name: path for name, path in FILES.items() if name not in TO_MERGE}
STAGE_1 = [name for name in CONFIGS if "autoencoder" in name]
STAGE_2 = [name for name in CONFIGS if "autoencoder" not in name]

DENSE = ("semantic_synthesis256", "semantic_synthesis512", "inpainting_big", "bsr_sr")
SCENES = ("inpainting", "super_resolution", "layout", "semantic_map")

# Millions of parameters as published: encoder and decoder (Rombach et al. 2022 and its released models), the UNet.
PUBLISHED = {
    "autoencoder/kl_f4.yaml": {"encoder": 22.4, "decoder": 33.0},
    "autoencoder/kl_f8.yaml": {"encoder": 34.2, "decoder": 49.5},
    "autoencoder/kl_f16.yaml": {"encoder": 28.3, "decoder": 41.3},
    "autoencoder/kl_f32.yaml": {"encoder": 42.6, "decoder": 61.2},
    "diffusion/celebahq_f4.yaml": {"denoiser.network": 274},
    "diffusion/lsun_churches_f8.yaml": {"denoiser.network": 294},
    "diffusion/imagenet_f8_class.yaml": {"denoiser.network": 395},
    "diffusion/dit_xl2_imagenet256.yaml": {"denoiser": 675},
    "diffusion/sit_xl2_imagenet256.yaml": {"denoiser": 675},
    "diffusion/lightningdit_xl1_f16.yaml": {"denoiser": 675},
    "diffusion/edm2_s_imagenet512.yaml": {"denoiser": 280},
    "diffusion/ldm_ffhq_f4.yaml": {"denoiser.network": 274},
    "diffusion/ldm_lsun_bedrooms_f4.yaml": {"denoiser.network": 274},
    "diffusion/ldm_imagenet_f4.yaml": {"denoiser.network": 400},
    "diffusion/text2img256.yaml": {"denoiser.network": 403.6, "denoiser.conditioner": 166.6},
    # 1.45 billion with the prediction of words, which nothing reads.
    "diffusion/txt2img_1p4b_f8.yaml": {"denoiser.network": 872.3, "denoiser.conditioner": 542.9},
    # The counts of the public code, and of the paper: 306 million together, 387, 169 with 55 of the first stage, 215.
    "diffusion/layout2img_openimages256.yaml": {"denoiser.network": 246.277379, "denoiser.conditioner": 54.656},
    "diffusion/inpainting_big.yaml": {"denoiser.network": 387.245827, "denoiser.conditioner": 0.0},
    "diffusion/bsr_sr.yaml": {"denoiser.network": 113.622563, "denoiser.conditioner": 0.0},
    "diffusion/semantic_synthesis256.yaml": {"denoiser.network": 215.229315, "denoiser.conditioner": 546e-6},
    "diffusion/semantic_synthesis512.yaml": {"denoiser.network": 215.229315, "denoiser.conditioner": 546e-6},
    "diffusion/stable_diffusion_v1.yaml": {"denoiser.network": 859.5},
    "diffusion/stable_diffusion_v2.yaml": {"denoiser.network": 865.9},
}
COUNTED = {f"diffusion/{name}.yaml" for name in (*DENSE, "layout2img_openimages256")}
"""Whose numbers are exact."""
# The latents of each stage-2 configuration's own stage 1: channels, side.
LATENTS = {
    "diffusion/bsr_sr.yaml": (3, 64),
    "diffusion/celebahq_f4.yaml": (3, 64),
    "diffusion/dit_xl2_imagenet256.yaml": (4, 32),
    "diffusion/edm2_s_imagenet512.yaml": (4, 64),
    "diffusion/imagenet_f8_class.yaml": (4, 32),
    "diffusion/inpainting_big.yaml": (3, 64),
    "diffusion/layout2img_openimages256.yaml": (3, 64),
    "diffusion/ldm_ffhq_f4.yaml": (3, 64),
    "diffusion/ldm_imagenet_f4.yaml": (3, 64),
    "diffusion/ldm_lsun_bedrooms_f4.yaml": (3, 64),
    "diffusion/lightningdit_xl1_f16.yaml": (16, 16),
    "diffusion/semantic_synthesis256.yaml": (3, 64),
    "diffusion/semantic_synthesis512.yaml": (3, 128),
    "diffusion/sit_xl2_imagenet256.yaml": (4, 32),
    "diffusion/lsun_churches_f8.yaml": (4, 32),
    "diffusion/stable_diffusion_v1.yaml": (4, 64),
    "diffusion/stable_diffusion_v2.yaml": (4, 96),
    "diffusion/text2img256.yaml": (3, 64),
    "diffusion/txt2img_1p4b_f8.yaml": (4, 32),
    **{f"emoji_scenes/{name}.yaml": (4, 16) for name in SCENES},
    "fashion_mnist/diffusion.yaml": (4, 8),
    "fluent_emoji/diffusion.yaml": (8, 8),
    "quickstart/diffusion.yaml": (4, 8),
    "text_to_emoji/diffusion.yaml": (4, 8),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """Where there are the text encoders that configurations name."""
    root = tmp_path_factory.mktemp("text")
    save_models(root)
    return root


@pytest.fixture(autouse=True)
def beside_models(models, monkeypatch):
    monkeypatch.chdir(models)


def shipped(name: str) -> Config:
    # No run of stage 1 exists here; its place is all that the model needs to know.
    return load([CONFIGS[name]], ["data.params.autoencoder=logs/none"] if name in STAGE_2 else [])


def facts(name: str) -> dict[str, int]:
    channels, side = LATENTS.get(name, (1 if "fashion_mnist" in name else 3, 32))
    return {"channels": channels, "resolution": side, "num_classes": 1000, "batch_size": 8, "num_items": 100}


def test_every_config_is_of_one_stage():
    assert set(LATENTS) == set(STAGE_2), "a new stage-2 configuration: say in LATENTS what latents it is for"
    assert STAGE_1


@pytest.mark.parametrize("name", FILES)
def test_header_says_how_to_run_it(name):
    header = [line for line in FILES[name].read_text().splitlines() if line.startswith("#")]
    assert any("main.py --base configs/" in line and f"configs/{name}" in line for line in header)


@pytest.mark.parametrize("fragment", FRAGMENTS)
@pytest.mark.parametrize("name", STAGE_2)
def test_fragments_merge_with_every_config_of_stage_2(name, fragment):
    config = load([CONFIGS[name], FILES[fragment]], ["data.params.autoencoder=logs/none"])
    config.check(facts(name))
    strategy = build(config.resolved(facts(name))["lightning"]["strategy"], key="lightning.strategy")
    assert isinstance(strategy, Strategy)


@pytest.mark.parametrize("name", [name for name in STAGE_2 if "edm2" not in name])
def test_an_adapter_fits_every_network_of_torch_s_layers(name):
    config = load([CONFIGS[name], FILES[LORA]], ["data.params.autoencoder=logs/none", "init_from=logs/none"])
    config.check(facts(name))
    with torch.device("meta"):
        model = build(config.resolved(facts(name))["model"], key="model")
    trained = {key for key, weight in model.denoiser.named_parameters() if weight.requires_grad}
    assert trained
    assert all(".lora_" in key for key in trained)


@pytest.mark.slow
def test_both_stages_train_two_steps_in_buckets(many_sizes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    short = ["max_steps=2", "val_check_interval=2", "accelerator=cpu", "devices=1"]
    words = [f"data.params.train.params.root={many_sizes}", "data.params.num_validation=6", "data.params.batch_size=4"]
    words += [*(f"lightning.trainer.{word}" for word in short), "lightning.logger=null"]
    merged = [str(FILES[OWN_PICTURES]), str(FILES[BUCKETS])]
    for stage, more in (("autoencoder", ["model.params.loss.params.perceptual=null"]), ("diffusion", [])):
        base = ["--base", str(CONFIGS[f"quickstart/{stage}.yaml"]), *merged, "--logdir", f"logs/{stage}"]
        if stage == "diffusion":
            more = [f"data.params.autoencoder={next((tmp_path / 'logs' / 'autoencoder').iterdir())}"]
        assert main.main([*base, *words, *more]) == 0
        state = json.loads(next((tmp_path / "logs" / stage).glob("*/run_state.json")).read_text())
        assert (state["status"], state["step"]) == ("finished", 2)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_trains_two_steps(variant, image_folder, runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = "fashion_mnist/diffusion.yaml"
    words = [*overrides(base, image_folder), f"data.params.autoencoder={runs.autoencoder}", "data.params.resolution=32"]
    assert main.main(["--base", str(CONFIGS[base]), str(FILES[variant]), *words]) == 0
    check_run(tmp_path)
    (run,) = (tmp_path / "logs").iterdir()
    assert run.name.endswith(f"_fashion_mnist_{Path(variant).stem}")


@pytest.mark.parametrize("name", CONFIGS)
def test_builds_at_full_size_with_the_published_number_of_parameters(name):
    config = shipped(name)
    config.check(facts(name))
    with torch.device("meta"):
        model = build(config.resolved(facts(name))["model"], key="model")
    for part, millions in PUBLISHED.get(name, {}).items():
        count = sum(parameter.numel() for parameter in model.get_submodule(part).parameters()) / 1e6
        # As many digits as the source gives; the lineage rounds 394.98 up and 294.97 down.
        exact = name in COUNTED
        assert count == pytest.approx(millions, abs=1e-9 if exact else 0.06 if millions < 100 else 1.0), (part, count)


@pytest.mark.parametrize(
    ("name", "layers", "millions"),
    [("stable_diffusion_v1", 12, 123.06), ("stable_diffusion_v2", 23, 340.39)],
)
def test_stable_diffusion_reads_the_tokens_of_an_encoder_of_the_published_size(name, layers, millions):
    transformers = pytest.importorskip("transformers")
    text = shipped(f"diffusion/{name}.yaml").resolved()["data"]["params"]["features"]["text"]["params"]
    width = text["channels"]
    assert CLIPS[text["encoder"]] == width
    assert text["padding"]
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
    with torch.device("meta"):
        config = transformers.CLIPTextConfig(vocab_size=49408, num_attention_heads=width // 64, **sizes)
        encoder = transformers.CLIPTextModel(config)
    assert sum(weight.numel() for weight in encoder.parameters()) / 1e6 == pytest.approx(millions, abs=0.01)


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("text2img256", "text2img256 (vq-f4)"),
        ("txt2img_1p4b_f8", "txt2img-1p4B (kl-f8)"),
        ("stable_diffusion_v1", "Stable Diffusion 1"),
        ("stable_diffusion_v2", "Stable Diffusion 2"),
    ],
)
def test_models_of_captions_are_those_that_can_be_converted(name, published):
    tree = shipped(f"diffusion/{name}.yaml").resolved(facts(f"diffusion/{name}.yaml"))
    (known,) = [one for one in PUBLISHED_MODELS if one.name == published]
    network, objective = (tree["model"]["params"][part]["params"] for part in ("network", "objective"))
    assert {"num_res_blocks": 2, "spatial_channels": 0, **network} == {
        "num_res_blocks": 2,
        "spatial_channels": 0,
        **known.unet,
        **known.heads,
    }
    ends = {"start": known.params["linear_start"], "end": known.params["linear_end"]}
    assert objective["schedule"]["params"] == ends
    assert ("prediction" in objective) == (known.params["parameterization"] == "v")
    scales = tree["data"]["params"]["statistics"]["std"]
    assert scales == [pytest.approx(1 / known.params["scale_factor"])] * network["in_channels"]
    assert tree["model"]["params"]["label_dropout"] == 0.1


@pytest.mark.parametrize(
    ("name", "published"),
    {
        "layout2img_openimages256": "layout2img (vq-f4)",
        "semantic_synthesis256": "semantic_synthesis256 (vq-f4)",
        "semantic_synthesis512": "semantic_synthesis512 (vq-f4)",
        "inpainting_big": "inpainting_big (vq-f4)",
        "bsr_sr": "bsr_sr (vq-f4)",
    }.items(),
)
def test_models_of_dense_conditions_are_those_that_can_be_converted(name, published):
    tree = shipped(f"diffusion/{name}.yaml").resolved(facts(f"diffusion/{name}.yaml"))
    (known,) = [one for one in PUBLISHED_MODELS if one.name == published]
    network, objective = (tree["model"]["params"][part]["params"] for part in ("network", "objective"))
    usual = {"num_res_blocks": 2, "spatial_channels": 0}
    assert usual | network == usual | {**known.unet, **known.heads}
    ends = {"start": known.params["linear_start"], "end": known.params["linear_end"]}
    assert objective["schedule"]["params"] == ends
    assert ("distance" in objective) == (known.params["loss_type"] == "l1")
    assert tree["data"]["params"]["resolution"] == 4 * known.params["image_size"]
    # Pictures of the tasks that others were trained for are never dropped.
    assert "label_dropout" not in tree["model"]["params"]


def test_lightningdit_is_as_published():
    """Places added and turning, no norms of queries and keys, time from 0 to 1 (not 1000 of it)."""
    name = "diffusion/lightningdit_xl1_f16.yaml"
    with torch.device("meta"):
        model = build(shipped(name).resolved(facts(name))["model"], key="model")
    network, objective = model.denoiser["network"], model.objective
    assert network.rope
    assert network.absolute_positions
    assert not [weight for weight, _ in network.named_parameters() if "norm_q" in weight or "norm_k" in weight]
    assert objective.path.c_noise(torch.tensor(0.25)) == 0.25
    assert objective.direction_weight == 1


@pytest.mark.parametrize(
    ("name", "flags"),
    {
        "lightningdit_xl1_f16": "--sampler euler --steps 249 --schedule shifted shift=3.3333333 --guidance 10 "
        "--guidance-channels 3 --interval 0 9",
        "sit_xl2_imagenet256": "--steps 125 --sampler heun --guidance 1.5 --guidance-channels 3",
        "dit_xl2_imagenet256": "--steps 250 --sampler ancestral --guidance 1.5 --guidance-channels 3",
    }.items(),
)
def test_transformers_are_sampled_as_published(name, flags):
    text = CONFIGS[f"diffusion/{name}.yaml"].read_text()
    (command,) = re.findall(r"sample\.py (.*?[^\\])\n", text, re.DOTALL)
    words = shlex.split(command.replace("\\\n#", ""))
    assert words == ["-r", f"logs/*_{name}", *flags.split()]
    assert sample.parse(words).guidance_channels == 3


def overrides(name: str, image_folder: Path) -> list[str]:
    """What makes two steps of the configuration take a second."""
    folder = {"target": "ldm.data.sources.folder.ImageFolder", "params": {"root": str(image_folder)}}
    if aligned := on_pictures(name, image_folder):
        folder["params"]["aligned"] = aligned
    data = {"batch_size": 2, "resolution": 64, "num_workers": 0}
    if "EmojiScenes" in CONFIGS[name].read_text():
        data |= {"train.params.length": 8, "validation.params.length": 4}
    else:
        data |= {"train": folder, "num_validation": 4}
        if "validation:" in CONFIGS[name].read_text().replace("num_validation:", ""):
            data["validation"] = None
    if name in STAGE_1 and "transform:" in CONFIGS[name].read_text():
        data["transform"] = None
    trainer = {"max_steps": 2, "val_check_interval": 2, "limit_val_batches": 1, "accelerator": "cpu", "devices": 1}
    words = [f"data.params.{key}={json.dumps(value)}" for key, value in data.items()]
    words += [f"lightning.trainer.{key}={json.dumps(value)}" for key, value in trainer.items()]
    return [*words, *of_captions(name, image_folder), *of_dense(name), "lightning.logger=null"]


def on_pictures(name: str, image_folder: Path) -> dict[str, Any]:
    """Boxes or maps of the pictures, as the configuration reads them: `aligned` of its data set."""
    text, pictures = CONFIGS[name].read_text(), sorted(image_folder.rglob("*.png"))
    beside = image_folder.parent / "beside"
    if "CocoBoxes" in text:
        beside.mkdir(exist_ok=True)
        images, boxes = [], []
        for number, path in enumerate(pictures):
            width, height = Image.open(path).size
            images.append({"id": number, "file_name": str(path.relative_to(image_folder)), "width": width})
            images[-1]["height"] = height
            boxes.append({"image_id": number, "category_id": 5, "bbox": [0, 0, width / 2, height]})
        whole = {"images": images, "annotations": boxes, "categories": [{"id": 5, "name": "cat"}]}
        (beside / "boxes.json").write_text(json.dumps(whole))
        return {"boxes": {"target": "ldm.data.sources.coco.CocoBoxes", "params": {"file": str(beside / "boxes.json")}}}
    if "MapFiles" in text:
        for path in pictures:
            place = beside / path.relative_to(image_folder)
            place.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", Image.open(path).size, 1).save(place)
        params = {"root": str(beside), "classes": ["sky", "sea"]}
        return {"map": {"target": "ldm.data.sources.maps.MapFiles", "params": params}}
    return {}


def of_dense(name: str) -> list[str]:
    """Smaller conditioners, and no pictures of 50 steps in between."""
    if Path(name).stem not in (*DENSE, *SCENES, "layout2img_openimages256"):
        return []
    found = ["lightning.callbacks={images: null}"]
    if "layout_transformer" in CONFIGS[name].read_text():
        sizes = {"channels": 32, "depth": 1}
        found += [f"model.params.conditioner.params.{key}={value}" for key, value in sizes.items()]
    if name == "diffusion/inpainting_big.yaml":
        found.append("model.params.network.params.spatial_channels=5")  # the tiny latents have 4 channels
    return found


def of_captions(name: str, image_folder: Path) -> list[str]:
    """The same of what reads them, and a caption beside each picture."""
    text = CONFIGS[name].read_text()
    if "conditioners.text" not in text:
        return []
    few = "lightning.callbacks={images: null}"  # up to 32 pictures of 50 steps
    for picture in image_folder.rglob("*.png"):
        picture.with_suffix(".txt").write_text("a red cat")
    if "text_transformer" in text:
        sizes = {"channels": 32, "depth": 1, "vocab_size": len(BERT_WORDS)}
        return [
            few,
            f"model.params.conditioner.params.tokenizer={save_vocabulary(image_folder / 'words.txt')}",
            *(f"model.params.conditioner.params.{key}={value}" for key, value in sizes.items()),
        ]
    encoder = save_text_encoder(image_folder.parent / "encoder")
    sizes = {"encoder": encoder, "channels": WIDTH, "max_length": LONGEST}
    return [few, *(f"data.params.features.text.params.{key}={value}" for key, value in sizes.items())]


@pytest.mark.slow
@pytest.mark.parametrize("name", STAGE_1)
def test_stage_1_trains_two_steps(name, own_images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["model.params.encoder.params.base_channels=16", *overrides(name, own_images)]
    words.append("data.params.channels=3")
    text = CONFIGS[name].read_text()
    if "disc_start:" in text:
        words.append("model.params.loss.params.disc_start=1")
    assert main.main(["--base", str(CONFIGS[name]), *words]) == 0
    check_run(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", STAGE_2)
def test_stage_2_trains_two_steps(name, own_images, runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    edm2 = "ldm.diffusion.networks.edm2" in CONFIGS[name].read_text()
    width = "hidden_size" if "ldm.diffusion.networks.dit" in CONFIGS[name].read_text() else "model_channels"
    wide = edm2 or "num_head_channels: 64" in CONFIGS[name].read_text()
    words = [f"model.params.network.params.{width}={64 if wide else 32}", *overrides(name, own_images)]
    words += ["model.params.network.params.num_res_blocks=1", "data.params.resolution=32"] if edm2 else []
    if "ldm.diffusion.networks.dit.DiT" in CONFIGS[name].read_text():
        words += ["model.params.network.params.depth=2", "model.params.network.params.num_heads=4"]
    words.append(f"data.params.autoencoder={runs.autoencoder}")
    words += ["data.params.statistics=null"] if "statistics:" in CONFIGS[name].read_text() else []
    assert main.main(["--base", str(CONFIGS[name]), *words]) == 0
    check_run(tmp_path)


def check_run(root: Path) -> None:
    (run,) = (root / "logs").iterdir()
    assert json.loads((run / "run_state.json").read_text())["status"] == "finished"
    assert list((run / "checkpoints").glob("*.ckpt"))
    assert "val/" in (run / "metrics.csv").read_text()
