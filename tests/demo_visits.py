"""The program `ldm demo` as a process, and what a visitor does on its page."""

import os
import re
import subprocess
import sys
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from playwright.sync_api import Browser, Page, expect

from ldm.cli import sample

ROOT = Path(sample.__file__).parents[2]


class Served(NamedTuple):
    """The program, and where its page is."""

    process: subprocess.Popen[str]
    url: str


def start(runs: list[Path], folder: Path, **environment: str) -> Served:
    """`scripts/demo.py` on any free port, with its temporary files in `folder`."""
    words = [sys.executable, "scripts/demo.py", "-r", *map(str, runs), "--port", "0", "--device", "cpu"]
    words += ["--max-pictures", "1000"]  # some are asked for that nobody waits for
    process = subprocess.Popen(
        words,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(folder), **environment},
    )
    assert process.stdout is not None
    for line in process.stdout:
        if found := re.search(r"ldm demo: (http://127\.0\.0\.1:\d+)/", line):
            return Served(process, found[1])
    raise AssertionError(f"ended with {process.wait()}")


def opened_by(browser: Browser, width: int, url: str) -> Page:
    """The page, opened by a visitor of its own; close its `context`."""
    context = browser.new_context(viewport={"width": width, "height": 900})
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    page = context.new_page()
    page.set_default_timeout(120_000)
    expect.set_options(timeout=120_000)
    page.goto(url)
    expect(page.get_by_text("16 pixels, 7 steps of training")).to_be_visible()
    return page


def fill(page: Page, **settings: str) -> None:
    for label, value in settings.items():
        page.get_by_label(label, exact=True).fill(value)
        page.get_by_label(label, exact=True).blur()


def generate(page: Page) -> None:
    page.get_by_role("button", name="Generate").click()


def pictures(page: Page, number: int) -> list[np.ndarray]:
    """The first pictures of the gallery, as they are downloaded."""
    expect(page.locator("#status")).to_contain_text("in ")
    images = page.locator("#gallery button.thumbnail-item img")
    expect(images.nth(number - 1)).to_be_visible()
    sources = [images.nth(place).get_attribute("src") for place in range(number)]
    return [np.asarray(Image.open(BytesIO(page.request.get(str(source)).body()))) for source in sources]


def copied(page: Page) -> str:
    page.get_by_role("button", name="Copy command").click()
    expect(page.get_by_role("button", name="Copied")).to_be_visible()
    return str(page.evaluate("navigator.clipboard.readText()"))
