"""Devices and their memory."""

import os

import pytest

from cli_utils import UserError
from device_utils import free_memory, hardware_name, resolve_device


def test_a_quarter_of_the_free_memory():
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < free_memory("cpu") <= 0.25 * total


def test_the_processor_has_a_name_and_cores():
    assert hardware_name("cpu").endswith(f", {os.cpu_count()} cores")


def test_devices():
    assert resolve_device("cpu", "--device") == "cpu"
    for name in ("gpu", "cuda:x", "cpu:first"):
        with pytest.raises(UserError, match=f"--device '{name}' is unknown"):
            resolve_device(name, "--device")
