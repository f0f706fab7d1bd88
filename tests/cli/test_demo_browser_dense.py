"""Masks, maps, boxes and small pictures on the page of `ldm demo`, as a visitor makes them in a headless Chromium."""

import json
import re
import shlex
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Locator, Page, expect

from ldm.data.transforms import EvalTransform
from ldm.images import to_arrays
from tests.demo_visits import Served, copied, fill, generate, opened_by, pictures, start
from tests.dense_models import save_reading
from tests.tiny_runs import node

pytestmark = pytest.mark.slow

FACTS = {
    "aligned": {"map": {"num_classes": 3}, "boxes": {"most": 30}},
    "map_class_names": ["sky", "sea", "land"],
    "box_class_names": ["red heart", "cat"],
    "drawn": {"low_resolution": {"factor": 4}},
}
MODELS = {
    "masked": (node("diffusion.conditioners.inpainting.MaskedPicture", channels=4), {"spatial_channels": 5}),
    "maps": (node("diffusion.conditioners.maps.SemanticMap", map_classes=3), {"spatial_channels": 3}),
    "boxes": (node("diffusion.conditioners.layout.LayoutTokens", box_classes=2, channels=16), {"context_dim": 16}),
    "small": (
        node("diffusion.conditioners.low_resolution.LowResolution"),
        {"spatial_channels": 3, "vector_channels": 128},
    ),
}


@pytest.fixture(scope="module")
def server(runs, tmp_path_factory) -> Iterator[Served]:
    root = tmp_path_factory.mktemp("models")
    folders = [save_reading(root / name, runs, *parts, {"facts": FACTS}) for name, parts in MODELS.items()]
    served = start(folders, tmp_path_factory.mktemp("demo"))
    yield served
    served.process.kill()
    served.process.wait()


@pytest.fixture
def visit(browser, server) -> Iterator[Callable[[str], Page]]:
    """visit(model) -> the page, on which it is chosen."""
    pages = []

    def opened(model: str) -> Page:
        pages.append(page := opened_by(browser, 1280, server.url))
        if model != "masked":
            page.get_by_label("Model", exact=True).click()
            page.get_by_role("option", name=model, exact=True).click()
        expect(page.get_by_label("Model", exact=True)).to_have_value(model)
        fill(page, Pictures="1", Steps="2")
        return page

    yield opened
    for page in pages:
        page.context.close()


def upload(page: Page, picture: np.ndarray, file: Path) -> None:
    Image.fromarray(picture).save(file)
    editor = page.locator("#start")
    # It takes nothing before its canvas is there, which says how far it is enlarged.
    expect(editor.get_by_role("button", name=re.compile(r"^\d+%$"))).to_be_visible()
    editor.locator("input[type=file]").first.set_input_files(file)
    expect(editor.get_by_role("button", name=re.compile(r"^\d{3,}%$"))).to_be_visible()  # small ones are


def stroke(page: Page, editor: Locator) -> None:
    """Paint a little, in the middle."""
    box = editor.locator("canvas").first.bounding_box()
    assert box is not None
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + 9, y, steps=4)
    page.mouse.up()
    time.sleep(1)  # the editor sends what was painted after a moment


def given(words: list[str], flag: str) -> Path:
    return Path(words[words.index(flag) + 1])


def fits(page: Page) -> None:
    """Nothing is wider than a telephone's screen."""
    page.set_viewport_size({"width": 390, "height": 900})
    expect(page.get_by_role("button", name="Copy command")).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_a_mask_is_painted_on_a_picture(visit, tmp_path):
    page = visit("masked")
    photo = np.random.default_rng(5).integers(0, 256, (48, 48, 3), dtype=np.uint8)
    upload(page, photo, tmp_path / "photo.png")
    page.locator("#start").get_by_role("button", name="Brush", exact=True).click()
    stroke(page, page.locator("#start"))
    generate(page)
    (made,) = pictures(page, 1)
    mask = Image.open(given(shlex.split(copied(page)), "--mask"))
    stays = EvalTransform(16)(mask)[0].numpy() <= 0
    assert 0 < stays.mean() < 1
    kept = to_arrays(EvalTransform(16)(Image.fromarray(photo))[None])[0]
    assert np.array_equal(made[stays], kept[stays])
    assert not np.array_equal(made[~stays], kept[~stays])
    fits(page)


def test_a_map_is_painted_in_the_colors_of_its_classes(visit):
    page = visit("maps")
    expect(page.locator("#legend")).to_contain_text("skysealand")
    editor = page.locator("#map")
    expect(editor.get_by_role("button", name=re.compile(r"^\d+%$"))).to_be_visible()
    editor.get_by_role("button", name="Color").click()
    editor.locator("button.color").nth(1).click()
    editor.get_by_role("button", name="Brush", exact=True).click()
    stroke(page, editor)
    generate(page)
    pictures(page, 1)
    painted = np.asarray(Image.open(given(shlex.split(copied(page)), "--map")))
    assert {*np.unique(painted).tolist()} == {1, 255}, "the sea, and what has no class"
    fits(page)


def test_boxes_are_written_into_a_table_and_drawn(visit):
    page = visit("boxes")
    expect(page.locator("#legend")).to_contain_text("red heartcat")
    expect(page.locator("#drawn img")).to_be_visible()
    before = page.locator("#drawn img").get_attribute("src")
    for place, text in enumerate(("cat", "0", "0", "0.5", "1"), 5):  # the second row
        cell = page.locator("#boxes").get_by_role("gridcell").nth(place)
        cell.dblclick()
        expect(cell.get_by_label("Edit cell")).to_be_focused()  # what is typed before is lost
        page.keyboard.type(text)
        page.keyboard.press("Enter")
        expect(cell.locator("span[data-editable]")).to_have_text(text)
    expect(page.locator("#drawn img")).not_to_have_attribute("src", str(before))
    generate(page)
    pictures(page, 1)
    assert json.loads(given(shlex.split(copied(page)), "--layout").read_text()) == [
        {"class": "red heart", "box": [0.25, 0.25, 0.75, 0.75]},
        {"class": "cat", "box": [0, 0, 0.5, 1]},
    ]
    fits(page)


def test_a_small_picture_is_made_larger_with_noise_that_hides_its_faults(visit, tmp_path):
    page = visit("small")
    expect(page.get_by_label("number input for Noise level")).to_be_visible()
    expect(page.locator("#start").get_by_role("button", name="Brush", exact=True)).to_have_count(0)
    upload(page, np.random.default_rng(5).integers(0, 256, (4, 6, 3), dtype=np.uint8), tmp_path / "small.png")
    page.get_by_label("number input for Noise level").fill("0.2")
    page.get_by_label("number input for Noise level").blur()
    time.sleep(1)
    generate(page)
    (made,) = pictures(page, 1)
    assert made.shape == (16, 24, 3)
    assert "--noise-level 0.2" in copied(page)
    expect(page.locator("#settings")).to_contain_text("Noise level0.2")
    fits(page)
