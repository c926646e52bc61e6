"""A real browser for tests of pages: Chromium, offline, and no page may complain or ask for another file."""

import os
import shutil
from contextlib import contextmanager

import pytest

ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def chromium():
    """The program's path: that in FFATTR_CHROMIUM, or the installed one. Skips the tests where there is none."""
    pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    program = os.environ.get("FFATTR_CHROMIUM") or shutil.which("chromium")
    if program is None:
        pytest.skip("no chromium in PATH, and FFATTR_CHROMIUM does not name one", allow_module_level=True)
    return program


@contextmanager
def running(program):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=ARGUMENTS, headless=True)
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def opened(browser, path, address="", **options):
    """A tab that shows the file at ``path`` with its map drawn; fails if the page had anything to complain of."""
    context = browser.new_context(**{"offline": True, "viewport": {"width": 1400, "height": 900}, **options})
    complaints = []
    tab = context.new_page()
    tab.set_default_timeout(10_000)
    tab.on("console", lambda message: complaints.append(f"{message.type}: {message.text}"))
    tab.on("pageerror", lambda error: complaints.append(f"error: {error}"))
    tab.on("dialog", lambda dialog: complaints.append(f"dialog: {dialog.message}"))
    asked = []
    tab.on("request", lambda request: asked.append(request.url.split("#")[0]))
    try:
        tab.goto(f"{path.as_uri()}#{address}")
        drawn(tab)
        yield tab
        drawn(tab)
    finally:
        context.close()
    assert complaints == []
    assert [url for url in asked if not url.startswith("data:,")] == [path.as_uri()]


def drawn(tab):
    """Waits until the map is."""
    tab.wait_for_selector("#stage[aria-busy=false]", state="attached")
