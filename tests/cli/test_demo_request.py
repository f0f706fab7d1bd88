"""ldm.cli.demo_request: what a visitor asks for as a command line, and its pictures as those of the command."""

import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.cli import sample
from ldm.cli.demo_line import Ticket
from ldm.cli.demo_models import Abilities
from ldm.cli.demo_pictures import begun, shown
from ldm.cli.demo_request import Constants, Limits, Wish, carried_out, checked, command, words
from ldm.cli.sample_conditions import chosen_classes
from ldm.errors import ConfigError
from ldm.sampling.pipeline import Pipeline

PLAIN = Abilities("run.ckpt", 7, (16, 16), captions=False, classes=None, guided=False, begins=True)
CLASSES = replace(PLAIN, classes=["cat", "2", "-v", "it's a boot", "Cat"], guided=True)
CAPTIONS = replace(PLAIN, captions=True, guided=True)
NONE = Constants()
SHORT = Wish(steps=3, number=2, seed=5)


def asked(wish: Wish, abilities: Abilities, constants: Constants = NONE) -> str:
    return shlex.join(words(wish, abilities, constants))


def test_a_model_without_conditions_is_asked_for_nothing_that_it_has_no_use_for():
    wish = Wish(prompt="a cat", negative="a dog", label=2, guidance=3.0, rescale=0.5, width=16, height=16)
    assert asked(wish, PLAIN) == "-r run.ckpt --seed 0 -n 4 --steps 50"


def test_settings_are_flags_where_they_are_not_the_default():
    wish = replace(SHORT, sampler="heun", schedule="karras", label=3, guidance=2.5, rescale=0.7, low=0.2, high="3")
    line = asked(replace(wish, width=32, height=16), CLASSES, Constants("cpu", True, ("house",)))
    assert line == (
        "-r run.ckpt --classes 'it'\"'\"'s a boot' --seed 5 -n 2 --steps 3 --sampler heun --schedule karras "
        "--size 16 32 --guidance 2.5 --rescale 0.7 --interval 0.2 3 --raw --device cpu --trust house"
    )
    assert "--interval 0.2 inf" in asked(replace(wish, high=""), CLASSES)
    wish = replace(SHORT, sampler_settings="eta=0.5", schedule="karras", schedule_settings="rho=5 sigma_max=80.0")
    line = asked(wish, PLAIN, Constants(lora=Path("adapter"), lora_scale=0.5))
    said = "--sampler ddim eta=0.5 --schedule karras rho=5 sigma_max=80.0 --lora adapter --lora-scale 0.5"
    assert line.endswith(said)
    assert asked(SHORT, PLAIN, Constants(precision="bf16-mixed")).endswith("--steps 3 --precision bf16-mixed")


def test_limits_are_those_of_the_flags_or_of_the_model():
    assert Limits().of(PLAIN).side == 32
    assert Limits().of(replace(PLAIN, longest_side=24)).side == 48
    assert Limits(side=20).of(PLAIN).side == 20
    with pytest.raises(ConfigError, match="steps: expected 2 at most on this page, found 3"):
        checked(words(SHORT, PLAIN, NONE), Limits(steps=2))


@pytest.mark.parametrize(("label", "word"), [(0, "cat"), (1, "1"), (2, "2"), (3, "it's a boot"), (4, "Cat")])
def test_a_class_is_named_where_its_name_means_it(label: int, word: str):
    found = checked(words(replace(SHORT, label=label), CLASSES, NONE))
    assert found.classes == [word]
    assert chosen_classes(found.classes, 5, CLASSES.classes) == [label]


@pytest.mark.parametrize("text", ["a red heart", "--prompt", "-1", 'it\'s "so"\n$HOME `x` \\', "قلب ❤️", "", "=x"])
def test_prompts_survive_the_command_line(text: str):
    wish = Wish(prompt=text, negative=text, guidance=2)
    line = command(words(wish, CAPTIONS, NONE))
    program, *arguments = shlex.split(line)
    assert (program, arguments.pop(0)) == ("python", "scripts/sample.py")
    found = checked(arguments)
    assert found.prompt == [text]
    assert found.negative == (text if text.strip() else None)


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ({"steps": 0}, "--steps: expected a whole number of 1 or more, found '0'"),
        ({"steps": 2.5}, "found '2.5'"),
        ({"number": None}, "found ''"),
        ({"number": 65}, "pictures: expected 64 at most on this page, found 65"),
        ({"steps": 1001}, "steps: expected 1000 at most on this page, found 1001"),
        ({"width": 16, "height": 33}, "width and height: expected 32 at most on this page, found 33"),
        ({"sampler_settings": "eta"}, "sampler settings: expected name=number, such as eta=0.5, found 'eta'"),
        ({"sampler_settings": "eta=1 --trust=os"}, "found '--trust=os'"),
        ({"schedule_settings": "rho={target:ldm.x}"}, "schedule settings: expected name=number"),
        ({"seed": -1}, "--seed: expected a whole number from 0 to 2^63 - 1, found '-1'"),
        ({"rescale": 0.5, "guidance": 1}, "--rescale: does nothing at --guidance 1"),
        ({"low": 3, "high": "2"}, "expected LOW < HIGH"),
        ({"high": "much"}, "expected a number of 0 or more, or inf, found 'much'"),
        ({"label": None}, "class: expected one of the list, found none"),
        ({"label": 9}, "class 9: expected 0 to 4"),
        ({"image": Path("x.png"), "strength": 0}, "--strength: expected a number above 0"),
    ],
)
def test_what_cannot_be_is_said_in_the_commands_words(wish: dict, message: str):
    with pytest.raises(ConfigError) as caught:
        checked(words(replace(Wish(label=0, guidance=2), **wish), CLASSES, NONE), Limits().of(CLASSES))
    assert message in str(caught.value)
    assert "--help" not in str(caught.value), "a visitor has no shell"


@pytest.fixture(scope="module")
def pipeline(runs):
    return Pipeline.load(runs.diffusion)


def painted(folder: Path) -> tuple[Path | None, Path | None]:
    """A photo with something painted over."""
    random = np.random.default_rng(3)
    photo = Image.fromarray(random.integers(0, 256, (24, 20, 3), dtype=np.uint8))
    layer = Image.new("RGBA", (20, 24))
    layer.paste((224, 69, 123, 200), (4, 4, 12, 20))
    return begun({"background": photo, "layers": [layer]}, folder)


@pytest.mark.parametrize(
    "settings",
    [
        {"label": 2},
        {"label": 1, "sampler": "heun", "guidance": 1},
        {"label": 0, "sampler": "ancestral", "schedule": "quadratic", "rescale": 0.5, "low": 0.1, "high": "5"},
        {"label": 2, "width": 32, "height": 16},
        {"label": 1, "sampler_settings": "eta=0.5", "schedule": "karras", "schedule_settings": " rho=5  "},
        {"label": 0, "image": True, "strength": 0.5},
        {"label": 0, "image": True, "mask": True, "strength": 1},
    ],
)
def test_the_copied_command_makes_the_same_pixels(pipeline, tmp_path, settings):
    image, mask = painted(tmp_path / "begun")
    files = {"image": image if settings.get("image") else None, "mask": mask if settings.get("mask") else None}
    wish, abilities = replace(SHORT, guidance=2.0), Abilities.of(pipeline)
    wish = replace(wish, **{**settings, **files})
    arguments = words(wish, abilities, NONE)
    ticket: Ticket = Ticket()
    pictures = shown(
        carried_out(pipeline, checked(arguments), ticket), tmp_path / "made", wish, abilities, "run", command(arguments)
    )
    assert (ticket.step, ticket.steps) == ((2, 2) if wish.strength == 0.5 else (3, 3))
    assert sample.main([*shlex.split(pictures[0].command)[2:], "--out", str(tmp_path / "out")]) == 0
    assert len(pictures) == 2
    for one in pictures:
        there = np.asarray(Image.open(tmp_path / "out" / one.file.name))
        assert np.array_equal(np.asarray(Image.open(one.file)), there)
    assert pictures[1].caption == f"{['cat', 'dog', 'Ankle boot'][wish.label]} · seed 6"
    assert pictures[1].settings["Seed"] == "6"


def test_the_copied_command_has_the_precision_of_the_page(runs, tmp_path):
    pipeline = Pipeline.load(runs.diffusion, compute=torch.bfloat16)
    wish, abilities = replace(SHORT, label=2), Abilities.of(pipeline)
    arguments = words(wish, abilities, Constants(precision="bf16-mixed"))
    made = carried_out(pipeline, checked(arguments), Ticket())
    assert sample.main([*arguments, "--out", str(tmp_path)]) == 0
    for one in made:
        assert np.array_equal(one.image, np.asarray(Image.open(tmp_path / f"002-{one.seed:06d}.png")))


def test_paint_becomes_a_mask_of_the_pictures_size(tmp_path):
    image, mask = painted(tmp_path)
    assert image is not None
    assert mask is not None
    white = np.asarray(Image.open(mask))
    assert white.shape == (24, 20)
    assert (white[4:20, 4:12] == 255).all()
    assert (white > 0).sum() == 16 * 8
    assert painted(tmp_path) == (image, mask), "the same picture is the same file"


def test_nothing_painted_is_no_mask_and_paint_alone_is_refused(tmp_path):
    photo, layer = Image.new("RGB", (8, 8)), Image.new("RGBA", (8, 8))
    assert begun(None, tmp_path) == (None, None)
    assert begun({"background": None, "layers": [layer]}, tmp_path) == (None, None)
    assert begun({"background": photo, "layers": [layer]}, tmp_path)[1] is None
    layer.paste((1, 2, 3, 255), (0, 0, 4, 4))
    with pytest.raises(ConfigError, match="found paint and no picture below it"):
        begun({"background": None, "layers": [layer]}, tmp_path)
