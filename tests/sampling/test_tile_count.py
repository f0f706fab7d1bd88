"""How many tiles are denoised, known beforehand, and how they are shown with those that are encoded and decoded."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from ldm.autoencoder.tiling import Tiling
from ldm.sampling.generate import generate
from ldm.sampling.guidance import Guidance
from ldm.sampling.img2img import InitImage
from ldm.sampling.pipeline import Pipeline
from ldm.sampling.repaint import RePaint
from ldm.sampling.samplers import ddim, heun

SIZE = (24, 40)  # 2 x 4 tiles


@pytest.fixture(scope="module")
def pipeline(runs):
    return Pipeline.load(runs.diffusion)


def notes(pipeline, **settings):
    """What is reported of two pictures' tiles: {what is being done: [(done, total), ...]} of the last one."""
    found: dict[str, list[tuple[int, int]]] = {}

    def report(doing, done, total):
        if done <= (found.get(doing) or [(0, 0)])[-1][0]:
            found[doing] = []
        found.setdefault(doing, []).append((done, total))

    given = {"tile": Tiling((16, 16), 8, at_once=3), "size": SIZE, "steps": 4, **settings}
    given["tile"] = replace(given["tile"], report=report)
    assert len([*generate(pipeline, [1, 2], [{"class_label": 0}, {"class_label": 1}], **given)]) == 2
    return found


@pytest.mark.parametrize(
    ("settings", "calls"),
    [
        ({}, 4),
        ({"guidance": Guidance(2.0)}, 4),
        ({"sampler": heun}, 7),
        ({"sampler": RePaint(ddim, 2, 2)}, 2 + 2 * 2),
        ({"sampler": partial(ddim, eta=1.0)}, 4),
    ],
)
def test_as_many_tiles_are_denoised_as_was_said(pipeline, settings, calls):
    found = notes(pipeline, **settings)
    assert {total for _, total in found["denoising"]} == {8 * calls}
    done = [done for done, _ in found["denoising"]]
    assert done == sorted(done)
    assert done[-1] == 8 * calls
    assert [*found] == ["denoising", "decoding"]
    assert found["decoding"] == [(number, 16) for number in range(1, 17)], "once to measure the norms, once to decode"


def test_a_picture_to_begin_with_is_encoded_and_takes_fewer_steps(pipeline):
    found = notes(pipeline, init_image=InitImage(torch.zeros(3, *SIZE), 0.5), tile=Tiling((16, 16), 8, surveys=0))
    assert {name: told[-1] for name, told in found.items()} == {
        "encoding": (8, 8),
        "denoising": (16, 16),
        "decoding": (8, 8),
    }


def test_by_a_guide_there_are_twice_as_many(pipeline):
    assert notes(pipeline, guidance=Guidance(2.0, guide=pipeline))["denoising"][-1] == (64, 64)


def test_one_tile_is_decoded_alone(pipeline):
    assert notes(pipeline, size=None) == {"decoding": [(1, 1)]}


def test_the_bar_says_which_picture_and_what_is_done(pipeline, monkeypatch, capsys):
    monkeypatch.setattr("ldm.runtime.progress.LOG_SECONDS", -1)
    tile = Tiling((16, 16), 8)
    assert len([*generate(pipeline, [1], [{"class_label": 0}], steps=2, size=SIZE, tile=tile, progress=True)]) == 1
    lines = [line.partition("  ")[0] for line in capsys.readouterr().out.splitlines()]
    for expected in (
        "sampling: 0/1",
        "picture 1 of 1, denoising tiles: 16/16",
        "picture 1 of 1, decoding tiles: 3/16",
        "sampling: 1/1",
    ):
        assert expected in lines
