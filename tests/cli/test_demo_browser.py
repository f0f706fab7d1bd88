"""The page of `ldm demo` as a visitor has it: served by the program, in a headless Chromium."""

import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Page, expect

from ldm.cli import sample
from tests.demo_visits import ROOT, Served, copied, fill, generate, opened_by, pictures, start

pytestmark = pytest.mark.slow

LONG = "900"  # steps
MANY = "1000"  # pictures: with so many steps minutes even of the tiny model, which a slow browser does not miss


@pytest.fixture(scope="module")
def server(runs, make_runs, tmp_path_factory) -> Iterator[Served]:
    served = start([runs.diffusion, make_runs(classes=None).diffusion], tmp_path_factory.mktemp("demo"))
    yield served
    served.process.kill()
    served.process.wait()


@pytest.fixture
def visit(browser, server) -> Iterator[Callable[..., Page]]:
    """visit(width=1280) -> the page, opened by a visitor of its own."""
    pages = []

    def opened(width: int = 1280) -> Page:
        pages.append(opened_by(browser, width, server.url))
        return pages[-1]

    yield opened
    for page in pages:
        page.context.close()


def test_pictures_are_those_of_the_copied_command(visit, tmp_path):
    page = visit()
    page.get_by_role("button", name="Ankle boot").click()
    expect(page.get_by_label("Class", exact=True)).to_have_value("Ankle boot")
    fill(page, Pictures="3", Steps="5", Seed="11")
    generate(page)
    made = pictures(page, 3)
    line = copied(page)
    assert "--classes 'Ankle boot' --seed 11 -n 3 --steps 5 --guidance 2" in line
    program, *words = shlex.split(line)
    assert program == "python"
    subprocess.run([sys.executable, *words, "--out", str(tmp_path / "out")], cwd=ROOT, check=True, timeout=200)
    files = [tmp_path / "out" / f"002-{seed:06d}.png" for seed in (11, 12, 13)]
    assert all(np.array_equal(one, np.asarray(Image.open(file))) for one, file in zip(made, files, strict=True))
    page.locator("#gallery button.thumbnail-item").nth(1).click()
    expect(page.locator("#settings")).to_contain_text("Seed12")


def test_a_picture_to_begin_with_and_paint_on_it(visit, tmp_path):
    random = np.random.default_rng(5)
    photo = random.integers(0, 256, (40, 48, 3), dtype=np.uint8)
    Image.fromarray(photo).save(tmp_path / "photo.png")
    page = visit()
    fill(page, Pictures="1", Steps="4")
    page.get_by_role("button", name="Begin with a picture").click()
    # The editor takes nothing before its canvas is there, which says how far it is enlarged.
    expect(page.get_by_role("button", name=re.compile(r"^\d+%$"))).to_be_visible()
    page.locator("#start input[type=file]").first.set_input_files(tmp_path / "photo.png")
    enlarged = re.compile(r"^\d{3,}%$")  # as soon as the small picture is on the canvas
    expect(page.get_by_role("button", name=enlarged)).to_be_visible()
    page.get_by_role("button", name="Brush", exact=True).click()
    box = page.locator("#start canvas").first.bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 2 + 9, box["y"] + box["height"] / 2, steps=4)
    page.mouse.up()
    time.sleep(1)  # the editor sends what was painted after a moment
    generate(page)
    (made,) = pictures(page, 1)
    words = shlex.split(copied(page))
    given = {flag: words[words.index(flag) + 1] for flag in ("--image", "--mask")}
    assert np.array_equal(np.asarray(Image.open(given["--image"])), photo), "not resampled on the way"
    assert 0 < np.asarray(Image.open(given["--mask"])).mean() < 255
    assert sample.main([*words[2:], "--out", str(tmp_path / "out")]) == 0
    assert np.array_equal(made, np.asarray(Image.open(tmp_path / "out" / "000-000000.png")))


def test_progress_stop_and_the_next_request(visit):
    page = visit()
    fill(page, Steps=LONG, Pictures=MANY)
    generate(page)
    expect(page.locator("#status")).to_contain_text(re.compile(rf"Step \d+ of {LONG}"))
    before = page.get_by_role("progressbar").get_attribute("value")
    expect(page.get_by_role("progressbar")).not_to_have_attribute("value", str(before))
    stop = page.get_by_role("button", name="Stop")
    began = time.monotonic()
    stop.click()
    expect(page.locator("#status")).to_contain_text("Stopped")
    assert time.monotonic() - began < 5
    expect(stop).to_be_disabled()
    fill(page, Steps="3", Pictures="2")
    generate(page)
    assert len(pictures(page, 2)) == 2


def test_two_visitors_get_their_own_and_the_second_sees_the_line(visit):
    one, other = visit(), visit()
    other.get_by_role("button", name="dog").click()
    fill(one, Steps="1000", Pictures=MANY)  # for as long as nobody stops it
    fill(other, Steps="3", Pictures="1", Seed="50")
    generate(one)
    expect(one.locator("#status")).to_contain_text("Step")
    generate(other)
    expect(other.locator("#status")).to_contain_text("Waiting: 1 request before yours")
    one.get_by_role("button", name="Stop").click()
    expect(one.locator("#status")).to_contain_text("Stopped")
    pictures(other, 1)
    fill(one, Steps="3", Pictures="1", Seed="1")
    generate(one)
    pictures(one, 1)
    for page, name in ((one, "cat · seed 1"), (other, "dog · seed 50")):
        expect(page.get_by_alt_text(name)).to_be_visible()
        assert page.locator("#gallery button.thumbnail-item").count() == 1


def test_who_closes_the_page_is_no_longer_waited_for(visit):
    one, other = visit(), visit()
    fill(one, Steps="1000", Pictures=MANY)
    generate(one)
    expect(one.locator("#status")).to_contain_text("Step")
    one.close()
    fill(other, Steps="2", Pictures="1")
    generate(other)
    pictures(other, 1)


def test_errors_are_said_on_the_page_and_the_server_goes_on(visit):
    page = visit()
    fill(page, Steps="0")
    generate(page)
    message = "--steps: expected a whole number of 1 or more, found '0'"
    expect(page.locator("#status")).to_contain_text(message)
    expect(page.get_by_role("status").filter(has_text="Warning")).to_contain_text(message)
    assert "Traceback" not in page.inner_text("body")
    fill(page, Steps="3", Pictures="1")
    generate(page)
    pictures(page, 1)


def test_a_model_without_conditions_has_neither_class_nor_guidance(visit):
    page = visit()
    page.get_by_label("Model", exact=True).click()
    page.get_by_role("option").nth(1).click()
    expect(page.get_by_label("Class", exact=True)).to_be_hidden()
    expect(page.get_by_label("Guidance")).to_have_count(0)
    fill(page, Steps="3", Pictures="1")
    generate(page)
    pictures(page, 1)
    assert "--classes" not in copied(page)


@pytest.mark.parametrize("width", [390, 768, 1280])
def test_nothing_is_wider_than_the_screen(visit, width):
    page = visit(width)
    for name in ("More settings", "Begin with a picture"):
        page.get_by_role("button", name=name).click()
    fill(page, Steps="2", Pictures="2")
    generate(page)
    pictures(page, 2)
    expect(page.get_by_role("button", name="Copy command")).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_every_control_has_a_name_and_the_keyboard_reaches_generate(visit):
    page = visit()
    page.get_by_role("button", name="More settings").click()
    expect(page.get_by_label("Sampler", exact=True)).to_be_visible()
    unnamed = [
        line
        for line in page.locator("#controls").aria_snapshot().splitlines()
        if re.match(r"\s*- (button|textbox|combobox|spinbutton|slider|checkbox)(:| \[|$)", line)
    ]
    assert unnamed == []
    assert page.evaluate("document.documentElement.lang") == "en"
    fill(page, Steps="2", Pictures="1")
    page.get_by_label("Class", exact=True).focus()
    page.keyboard.press("Escape")
    for _ in range(40):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "generate":
            break
    page.keyboard.press("Enter")
    pictures(page, 1)


def test_no_request_leaves_this_machine(runs, browser, tmp_path):
    """Neither of the page, nor of the server, which would go through the proxy that the environment names."""
    asked: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as proxy:

        def listen() -> None:
            while True:
                try:
                    connection, _ = proxy.accept()
                except OSError:
                    return
                asked.append(connection.recv(200))
                connection.close()

        threading.Thread(target=listen, daemon=True).start()
        address = f"http://127.0.0.1:{proxy.getsockname()[1]}"
        served = start([runs.diffusion], tmp_path, HTTP_PROXY=address, HTTPS_PROXY=address, http_proxy=address)
        context = browser.new_context()
        page, urls = context.new_page(), []
        page.on("request", lambda request: urls.append(request.url))
        page.goto(served.url)
        expect(page.get_by_text("16 pixels, 7 steps of training")).to_be_visible(timeout=60_000)
        fill(page, Steps="2", Pictures="1")
        generate(page)
        pictures(page, 1)
        context.close()
        served.process.send_signal(signal.SIGINT)
        assert served.process.wait(30) == 128 + signal.SIGINT
    assert urls
    assert [url for url in urls if not url.startswith((served.url, "data:", "blob:"))] == []
    assert asked == []
    assert [*tmp_path.glob("ldm_demo_*")] == [], "what was made for visitors is gone"


def test_ctrl_c_ends_a_request_in_the_middle(runs, browser, tmp_path):
    served = start([runs.diffusion], tmp_path)
    context = browser.new_context()
    page = context.new_page()
    page.goto(served.url)
    expect(page.get_by_text("16 pixels, 7 steps of training")).to_be_visible(timeout=60_000)
    fill(page, Steps="1000", Pictures=MANY)
    generate(page)
    expect(page.locator("#status")).to_contain_text("Step", timeout=60_000)
    began = time.monotonic()
    served.process.send_signal(signal.SIGINT)
    output, _ = served.process.communicate(timeout=60)
    assert time.monotonic() - began < 15
    assert served.process.returncode == 128 + signal.SIGINT
    assert "stopped by SIGINT" in output
    assert "Traceback" not in output
    context.close()
