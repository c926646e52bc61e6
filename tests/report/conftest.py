import pytest
from browser import chromium, running
from shown_page import HOSTILE, make_panels, write_page


@pytest.fixture(scope="module")
def browser():
    with running(chromium()) as browser:
        yield browser


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return write_page(tmp_path_factory.mktemp("page") / "page.html", make_panels(), f"Title {HOSTILE}")
