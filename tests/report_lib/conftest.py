"""The browser that all tests of the page share."""

import pytest
from chromium import Chromium


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    with Chromium(tmp_path_factory.mktemp("profile")) as chromium:
        yield chromium


@pytest.fixture
def page(browser):
    """The browser, with an empty log; afterwards nothing may have gone wrong or left the disk."""
    browser.log.clear()
    yield browser
    assert browser.log == []
