"""What a browser shows of a page: sizes, cut text, and the findings of axe-core.

Needs the extra `dev` (playwright, axe-playwright-python) and a Chromium on the machine.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, sync_playwright

from ld_common.core.errors import ConfigError

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DESK, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
CUT_TEXT = """() => [...document.querySelectorAll("body *")]
    .filter(node => [...node.childNodes].some(child => child.nodeType === 3 && child.textContent.trim()))
    .filter(node => node.checkVisibility() && getComputedStyle(node).overflowX === "hidden")
    .filter(node => node.scrollWidth > node.clientWidth + 1 && node.clientWidth > 1)
    .map(node => node.tagName + ": " + node.textContent.trim().slice(0, 60))"""
"""Elements whose own text is wider than they are, and hidden beyond."""


@contextmanager
def chromium() -> Iterator[Browser]:
    """Chromium without a window; raises `ConfigError` where there is none."""
    if CHROMIUM is None:
        raise ConfigError("no Chromium on this machine: install chromium to look at pages")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def opened(browser: Browser, address: str | Path, size: dict[str, int] = DESK) -> Iterator[Page]:
    """A page of its own in a browser."""
    page = browser.new_page(viewport={"width": size["width"], "height": size["height"]})
    page.goto(address.resolve().as_uri() if isinstance(address, Path) else address)
    yield page
    page.close()


def width(page: Page) -> int:
    """Width of all that can be scrolled to, in px."""
    return int(page.evaluate("document.documentElement.scrollWidth"))


def cut_text(page: Page) -> list[str]:
    """Text that is cut off."""
    return list(page.evaluate(CUT_TEXT))


def violations(page: Page, outside: str = "") -> list[str]:
    """Findings of axe-core, a line for each rule and element; those within the selector `outside` do not count."""
    context = {"exclude": [[outside]]} if outside else None
    found = Axe().run(page, context=context).response["violations"]
    return [f"{rule['id']}: {node['target']} {node['html'][:120]}" for rule in found for node in rule["nodes"]]
