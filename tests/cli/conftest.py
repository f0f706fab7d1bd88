"""A browser for the tests of the page."""

import shutil
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser


@pytest.fixture(scope="module")  # a loop of events runs as long as it is there, beside which no other can
def browser() -> "Iterator[Browser]":
    from playwright.sync_api import sync_playwright

    place = shutil.which("chromium")
    assert place is not None, "there is no chromium: apt-get install chromium"
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=place, args=["--no-sandbox"])
        yield opened
        opened.close()
