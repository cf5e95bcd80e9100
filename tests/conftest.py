"""Shared by all tests: no network, one thread, and the optional folder of third-party data."""

import logging
import multiprocessing
import os
import shutil
import subprocess
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
# Minutes each: they begin first, so that no worker is left with one at the end.
LONG_FILES = ("test_quickstart.py", "test_readme.py", "test_ranks.py", "test_train.py", "test_sglang_seeded.py")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in LONG_FILES)


@pytest.fixture
def shared():
    """Path of a file beside the checkout that only some machines have; the test skips where it is absent."""

    def find(name: str) -> Path:
        path = SHARED / name
        if not path.exists():
            pytest.skip(f"needs third-party data that is not here: ../shared/{name}")
        return path

    return find


@pytest.fixture(scope="session")
def generator_folder(tmp_path_factory) -> Path:
    """A tiny generator with its tokenizer; not to be changed."""
    import tiny  # imports torch

    return tiny.save_generator(tmp_path_factory.mktemp("tiny") / "generator")


@pytest.fixture(scope="session")
def value_folder(tmp_path_factory) -> Path:
    """A tiny value model with its tokenizer; not to be changed."""
    import tiny  # imports torch

    return tiny.save_value_model(tmp_path_factory.mktemp("tiny") / "value")


@pytest.fixture(scope="module")
def fork():
    """sglang's processes are forked, not spawned: 2 s instead of 25."""
    set_start_method = multiprocessing.set_start_method
    patch = pytest.MonkeyPatch()
    patch.setattr(multiprocessing, "set_start_method", lambda method, force=False: set_start_method("fork", force=True))
    yield
    patch.undo()
    set_start_method("spawn", force=True)


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    """Starts real SGLang servers, routers and this project's scripts, and ends them."""
    from sglang_host import Host  # psutil comes with sglang

    host = Host(tmp_path_factory.mktemp("host"))
    yield host
    host.close()


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    """Headless Chromium, one for all tests of the report's page."""
    from chromium import Chromium

    with Chromium(tmp_path_factory.mktemp("profile")) as chromium:
        yield chromium


@pytest.fixture
def page(browser):
    """The browser, with an empty log; afterwards nothing may have gone wrong or left the disk."""
    browser.log.clear()
    yield browser
    assert browser.log == []


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 256 KiB (needs root and mount)."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if shutil.which("mount") is None:
        pytest.skip("needs the mount command")
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"cannot mount a small file system here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture(autouse=True)
def log_levels():
    """What a script run in this process does to log levels ends with its test."""
    loggers = [logging.getLogger(name) for name in (None, "classifier_lib", "transformers")]
    levels = [logger.level for logger in loggers]
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)
