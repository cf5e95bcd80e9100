"""Devices and their memory."""

import os

import pytest

from common_lib.cli import UserError
from common_lib.devices import default_cache_bytes, hardware_name, resolve_device


def test_a_quarter_of_the_default_cache_bytes():
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < default_cache_bytes("cpu") <= 0.25 * total


def test_the_processor_has_a_name_and_cores():
    assert hardware_name("cpu").endswith(f", {os.cpu_count()} cores")


def test_devices():
    assert resolve_device("cpu", "--device") == "cpu"
    for name in ("gpu", "cuda:x", "cpu:first"):
        with pytest.raises(UserError, match=f"--device '{name}' is unknown"):
            resolve_device(name, "--device")
