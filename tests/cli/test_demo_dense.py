"""The page's pictures, masks, maps and layouts, up to the command line that they become."""

import json
from dataclasses import replace

import gradio as gr
import numpy as np
import pytest
from PIL import Image

from ldm.cli.demo_controls import Controls
from ldm.cli.demo_line import Ticket
from ldm.cli.demo_models import Abilities
from ldm.cli.demo_pictures import begun, drawn_layout, layout_file, painted_map, tuned
from ldm.cli.demo_request import Constants, Limits, Wish, carried_out, checked, words
from ldm.errors import ConfigError
from ldm.sampling import shown
from ldm.sampling.dense import Dense
from ldm.sampling.pipeline import Pipeline
from tests.dense_models import load_dense, save_dense
from tests.upscalers import save_upscaler, unet

SHORT = Wish(steps=2, number=2)
DENSE = Dense(["sky", "sea"], ["cat", "dog"], 2, 30)


@pytest.fixture(scope="module")
def pipelines(runs, tmp_path_factory):
    """pipelines(*keys) -> a pipeline that reads them."""

    def load(*keys):
        return replace(load_dense(save_dense(tmp_path_factory.mktemp("dense") / "run", runs, keys)), dense=DENSE)

    return load


def made(pipeline, wish):
    abilities = Abilities.of(pipeline)
    return carried_out(pipeline, checked(words(wish, abilities, Constants(trust=("tests",)))), Ticket())


def layer(color, box, size=(32, 32)):
    found = Image.new("RGBA", size)
    found.paste((*color, 255), box)
    return found


def test_paint_is_the_condition_of_a_model_of_masked_pictures(pipelines, tmp_path):
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    image, mask = begun({"background": photo, "layers": [layer((9, 9, 9), (0, 0, 4, 16), (16, 16))]}, tmp_path)
    wish = replace(SHORT, image=image, mask=mask)
    pipeline = pipelines("mask", "masked_latent")
    assert "--strength" not in words(wish, Abilities.of(pipeline), Constants())
    for sample in made(pipeline, wish):
        assert np.array_equal(sample.image[:, 4:], np.asarray(photo)[:, 4:])
    with pytest.raises(ConfigError, match="say it with --mask FILE"):
        made(pipeline, replace(wish, mask=None))


def test_paint_becomes_a_map_of_the_nearest_colors(pipelines, tmp_path):
    near = tuple(level + (-3 if level > 3 else 3) for level in shown.color(1))
    layers = [layer(shown.color(0), (0, 0, 16, 32)), layer(near, (16, 0, 32, 16))]
    file = painted_map({"layers": layers}, ["sky", "sea"], (16, 16), tmp_path)
    found = np.asarray(Image.open(file))
    assert (found[:, :8] == 0).all()
    assert (found[:8, 8:] == 1).all()
    assert (found[8:, 8:] == 255).all(), "what is not painted has no class"
    assert painted_map({"layers": []}, ["sky"], (16, 16), tmp_path) is None
    assert len(made(pipelines("map"), replace(SHORT, map=file))) == 2


def test_a_table_becomes_a_layout(pipelines, tmp_path):
    rows = [["dog", 0, 0, 0.5, "1"], ["", None, None, None, None]]
    file = layout_file(rows, tmp_path)
    assert json.loads(file.read_text()) == [{"class": "dog", "box": [0, 0, 0.5, 1]}]
    assert drawn_layout(rows, ["cat", "dog"], (16, 16)).shape == (256, 256, 3)
    assert drawn_layout([["cow", 0, 0, 1, 1]], ["cat", "dog"], (16, 16)) is None
    assert layout_file([["", 0, 0, 1, 1]], tmp_path) is None
    with pytest.raises(ConfigError, match="box of dog: expected four numbers"):
        layout_file([["dog", 0, 0, None, 1]], tmp_path)
    assert len(made(pipelines("boxes", "boxes_mask"), replace(SHORT, layout=file))) == 2


def test_noise_on_a_small_picture_is_asked_for_where_it_is_not_the_usual(runs, pipelines, tmp_path):
    pipeline = Pipeline.load(save_upscaler(tmp_path / "run", runs.autoencoder, unet(), 16))
    abilities = Abilities.of(pipeline)
    assert abilities.noise == (0.0, 0.5)
    assert Abilities.of(pipelines("low_resolution")).noise is None
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)).save(tmp_path / "small.png")
    clean = replace(SHORT, image=tmp_path / "small.png")
    noisy = replace(clean, noise=0.25)
    assert "--noise-level" not in words(clean, abilities, Constants())
    assert "--noise-level 0.25" in " ".join(words(noisy, abilities, Constants()))
    assert tuned(noisy, abilities)["Noise level"] == "0.25"
    assert made(pipeline, noisy)[0].image.shape == (16, 24, 3)
    assert not np.array_equal(made(pipeline, clean)[0].image, made(pipeline, noisy)[0].image)
    with pytest.raises(ConfigError, match=r"--noise-level 0\.75: expected 0 to 0\.5, the levels"):
        made(pipeline, replace(clean, noise=0.75))
    options = checked(words(clean, abilities, Constants()))
    with pytest.raises(ConfigError, match="width and height: expected 20 at most on this page, found 24"):
        carried_out(pipeline, options, Ticket(), Limits(side=20))


def test_the_controls_of_each_model():
    plain = Abilities("run.ckpt", 7, (16, 16), captions=False, classes=None, guided=False, begins=True)
    with gr.Blocks():
        controls = Controls(["run"])
        shown_for = {
            "plain": controls.updates(plain),
            "masked": controls.updates(replace(plain, picture=True, hole=True)),
            "maps": controls.updates(replace(plain, map_classes=["<sky>", "sea"])),
            "boxes": controls.updates(replace(plain, box_classes=["cat"])),
            "small": controls.updates(replace(plain, picture=True, noise=(0.1, 0.4))),
        }
    assert {*shown_for["plain"]} == {*controls.of_model}
    visible = {name: [key for key in updates if isinstance(updates[key], dict)] for name, updates in shown_for.items()}
    assert all(visible.values())
    strength = controls.of_wish["strength"]
    assert shown_for["plain"][strength]["visible"]
    assert not shown_for["masked"][strength]["visible"]
    assert shown_for["masked"][controls.starting]["open"]
    assert shown_for["maps"][controls.map]["visible"]
    assert "&lt;sky&gt;" in shown_for["maps"][controls.legend]["value"]
    assert not shown_for["maps"][controls.boxes]["visible"]
    assert ">cat</span>" in shown_for["boxes"][controls.legend]["value"]
    assert shown_for["small"][controls.start]["brush"] is False, "nothing is painted anew"
    assert shown_for["masked"][controls.start]["brush"].default_size == 2, "not larger than the picture"
    noise = controls.of_wish["noise"]
    assert not shown_for["masked"][noise]["visible"]
    assert (shown_for["small"][noise]["value"], shown_for["small"][noise]["maximum"]) == (0.1, 0.4)
    assert shown_for["boxes"][controls.boxes]["value"][0][0] == "cat"
