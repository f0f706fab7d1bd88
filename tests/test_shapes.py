"""Pictures that are neither square nor of one or three channels: both stages, from an array to samples."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import main
from ldm.autoencoder.codec import Codec
from ldm.cli import cache, sample
from ldm.config.load import to_yaml
from ldm.images import FONT_SIZE
from ldm.sampling.pipeline import Pipeline
from tests.conftest import node

SIZE = [16, 24]
TITLE = FONT_SIZE * 5 // 4 + 2  # above each row of a sheet of classes
NETWORKS = {
    "unet": None,
    "dit": node(
        "ldm.diffusion.networks.dit.DiT",
        in_channels="${data:channels}",
        patch_size=2,
        hidden_size=16,
        depth=1,
        num_heads=2,
        rope=True,
        absolute_positions=True,
    ),
    "edm2": node(
        "ldm.diffusion.networks.edm2.MagnitudePreservingUNet",
        in_channels="${data:channels}",
        model_channels=8,
        channel_mult=[1, 2],
        num_res_blocks=1,
        attention_levels=[1],
        vector_channels=16,
    ),
}


@pytest.fixture
def make(tmp_path, monkeypatch, autoencoder_tree, diffusion_tree):
    """make(channels) writes ae.yaml and a stage-2 YAML for each network, on an array of so many channels."""
    monkeypatch.chdir(tmp_path)

    def write(channels: int) -> None:
        random = np.random.default_rng(3)
        coarse = random.integers(0, 256, (20, 5, 7, channels), dtype=np.uint8)
        np.savez("pictures.npz", images=coarse.repeat(4, axis=1).repeat(4, axis=2), labels=np.arange(20) % 2)
        for tree in (autoencoder_tree, diffusion_tree):
            tree["data"]["params"]["train"] = node("ldm.data.sources.arrays.ArrayFile", file="pictures.npz")
            tree["lightning"]["trainer"] |= {"max_steps": 2, "val_check_interval": 2, "log_every_n_steps": 1}
        autoencoder_tree["data"]["params"] |= {"resolution": SIZE, "channels": channels}
        autoencoder_tree["lightning"]["callbacks"] = {
            "images": node("ldm.training.callbacks.previews.ImageLogger", every_n_steps=2, num_images=3)
        }
        discriminator = autoencoder_tree["model"]["params"]["loss"]["params"]["discriminator"]
        discriminator["params"]["in_channels"] = "${data:channels}"
        autoencoder_tree["model"]["params"]["loss"]["params"]["disc_start"] = 1
        Path("ae.yaml").write_text(to_yaml(autoencoder_tree))
        diffusion_tree["lightning"]["callbacks"]["images"] = node(
            "ldm.training.callbacks.previews.SampleLogger", every_n_steps=2, classes=[0, 1], seeds=[0, 1, 2], steps=2
        )
        model = diffusion_tree["model"]["params"]
        for name, network in NETWORKS.items():
            if network is not None:
                model["network"] = network
                model["conditioner"]["params"]["channels"] = 16
            Path(f"{name}.yaml").write_text(to_yaml({**diffusion_tree, "name": name}))

    return write


def run(name: str) -> Path:
    (folder,) = Path("logs").glob(f"*_{name}")
    return folder


def shape_of(picture: Path) -> tuple[int, ...]:
    return np.asarray(Image.open(picture)).shape


@pytest.mark.slow
def test_four_channels_from_an_array_to_samples(make):
    make(4)
    assert main.main(["--base", "ae.yaml"]) == 0
    folder = run("tiny_autoencoder")
    assert Codec.load(folder).size == (16, 24)
    # Four rows of three pictures, each enlarged twice, its channels in gray side by side with a line between them.
    (sheet,) = (folder / "images" / "val").glob("*.png")
    assert shape_of(sheet) == (4 * (32 + 2) + 2, 3 * (4 * 48 + 3 + 2) + 2)

    for number, name in enumerate(NETWORKS):
        assert main.main(["--base", f"{name}.yaml"]) == 0
        assert len([*Path("cache").iterdir()]) == 2, f"{name}: the cache of the first network serves all"
        pipeline = Pipeline.load(run(name))
        assert pipeline.manifest.plan.shape == (2, 8, 12)
        assert pipeline.manifest.plan.pixels["resolution"] == SIZE
        assert shape_of(run(name) / "images/val/samples_00000002.png") == (2 * (36 + TITLE), 3 * 197 + 2)
        words = ["-r", str(run(name)), "-n", "3", "--steps", "2", "--npz", "--out", f"samples{number}"]
        assert sample.main(words) == 0
        out = Path(f"samples{number}")
        assert shape_of(out / "000-000001.png") == (16, 24, 4)
        with np.load(out / "samples.npz") as arrays:
            assert arrays["arr_0"].shape == (6, 16, 24, 4)
            assert np.array_equal(arrays["arr_0"][1], np.asarray(Image.open(out / "000-000001.png")))
        assert shape_of(out / "grid.png") == (2 * (36 + TITLE), 3 * 197 + 2)
    words = ["--image", "samples0/000-000001.png", "--strength", "0.5", "-n", "1", "--steps", "2", "--out", "again"]
    assert sample.main(["-r", str(run("unet")), *words]) == 0
    assert main.main(["-r", str(run("dit")), "lightning.trainer.max_steps=3"]) == 0


@pytest.mark.slow
def test_samples_of_five_channels_lose_none(make):
    make(5)
    assert main.main(["--base", "ae.yaml"]) == 0
    assert main.main(["--base", "unet.yaml"]) == 0
    words = ["-r", str(run("unet")), "-n", "2", "--steps", "2", "--npz"]
    assert sample.main([*words, "--out", "out"]) == 0
    array = np.load("out/001-000001.npy")
    assert (array.shape, array.dtype) == ((16, 24, 5), np.uint8)
    assert shape_of(Path("out/001-000001.png")) == (16, 5 * 24 + 4)
    with np.load("out/samples.npz") as arrays:
        assert np.array_equal(arrays["arr_0"][3], array)
    listed = json.loads(Path("out/samples.json").read_text())["images"]
    assert [image["file"] for image in listed] == [f"{label:03d}-{seed:06d}.png" for label in (0, 1) for seed in (0, 1)]
    assert sample.main([*words, "--image", "out/001-000001.npy", "--out", "again"]) == 0


@pytest.mark.parametrize("number", [2, 5])
def test_files_cannot_have_any_number_of_channels(make, image_folder, capsys, number):
    make(3)
    words = [f"data.params.train={{target: ldm.data.sources.folder.ImageFolder, params: {{root: '{image_folder}'}}}}"]
    assert main.main(["--base", "ae.yaml", *words, f"data.params.channels={number}"]) == 2
    said = capsys.readouterr().err
    assert f"data.params.channels: the model reads pictures of {number} channels, those of the data set" in said
    assert "can have 1 or 3 or 4" in said
    assert not any(Path("logs").glob("*"))


@pytest.mark.parametrize(
    ("resolution", "said"),
    [
        ("[15, 24]", "is 15 x 24, expected multiples of 2: use height 14 or 16"),
        ("[15, 25]", "is 15 x 25, expected multiples of 2: use height 14 or 16 and width 24 or 26"),
        ("17", "is 17, expected multiples of 2: use 16 or 18"),
    ],
)
def test_pictures_that_the_autoencoder_cannot_halve_are_refused_with_sizes_that_it_can(make, capsys, resolution, said):
    make(3)
    word = f"data.params.resolution={resolution}"
    assert main.main(["--base", "ae.yaml", word]) == 2
    assert f"data.params.resolution (command line: {word}) {said}" in capsys.readouterr().err
    assert not any(Path("logs").glob("*"))


@pytest.mark.parametrize(
    ("name", "resolution", "said"),
    [
        ("unet", "[20, 28]", "is 20 x 28, expected multiples of 8: use height 16 or 24 and width 24 or 32"),
        ("edm2", "[24, 20]", "is 24 x 20, expected multiples of 8: use width 16 or 24"),
        ("dit", "[20, 24]", "is 20 x 24, expected multiples of 8: use height 16 or 24"),
        (
            "unet",
            "[20, 30]",
            "multiple of the autoencoder's down factor 4, found 20 x 30. Use width 28 or 32.",
        ),
    ],
)
def test_latents_that_the_network_cannot_halve_are_refused_before_the_cache(make, runs, capsys, name, resolution, said):
    """The autoencoder divides by 4, the network by 2."""
    make(3)
    base = ["--base", f"{name}.yaml", f"data.params.autoencoder={runs.autoencoder}"]
    base.append(f"data.params.resolution={resolution}")
    for program in (main.main, cache.main):
        assert program(base) == 2
        assert said in capsys.readouterr().err
        assert not Path("cache").exists()


def test_lpips_of_four_channels_is_refused_before_the_first_step(make, capsys):
    make(4)
    lpips = "{target: ldm.autoencoder.lpips.LPIPS, params: {pretrained: false}}"
    assert main.main(["--base", "ae.yaml", f"model.params.loss.params.perceptual={lpips}"]) == 2
    assert "LPIPS compares pictures of 1 or 3 channels (gray or color), found 4" in capsys.readouterr().err
    assert not any(Path("logs").glob("*"))


def test_a_discriminator_of_other_channels_is_refused_before_the_first_step(make, capsys):
    make(4)
    key = "model.params.loss.params.discriminator.params.in_channels"
    assert main.main(["--base", "ae.yaml", f"{key}=3"]) == 2
    assert "discriminator" in capsys.readouterr().err
    assert not any(Path("logs").glob("*"))
