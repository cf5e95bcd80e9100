"""Devices and their memory."""

import os
from pathlib import Path

import pytest
import torch

from common_lib.cli import UserError
from common_lib.devices import check_device_name, default_cache_bytes, hardware_name, limit_cpu_threads, resolve_device


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


@pytest.mark.parametrize(
    ("name", "gpus", "expected"),
    [
        ("auto", 0, "cpu"), ("auto", 2, "cuda"), ("cpu", 2, "cpu"), ("cuda", 1, "cuda"), ("cuda:0", 1, "cuda:0"),
        ("cuda:1", 2, "cuda:1"), ("cuda:1", 1, None), ("cuda:2", 2, None), ("cuda", 0, None),
    ],
)  # fmt: skip
def test_a_gpu_that_is_there_and_one_that_is_not(name, gpus, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    check_device_name(name, "--device")
    if expected:
        assert resolve_device(name, "--device") == expected
    else:
        with pytest.raises(UserError, match=f"--device {name}: this machine has {gpus} usable GPUs"):
            resolve_device(name, "--device")


def test_shares_of_free_memory(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: {"cuda:1": (1000, 5000)}[device])
    assert default_cache_bytes("cuda:1") == 600  # of what is free, not of all
    text = "MemTotal:  900 kB\nMemFree:  10 kB\nMemAvailable:  800 kB\n"
    monkeypatch.setattr(Path, "read_text", lambda path, **_: text)
    assert default_cache_bytes("cpu") == 200 * 1024


def test_half_of_the_cores_unless_the_user_says_otherwise(monkeypatch):
    given = []
    monkeypatch.setattr(torch, "set_num_threads", given.append)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    limit_cpu_threads()
    monkeypatch.delenv("OMP_NUM_THREADS")
    for cores in (1, 2, 9):
        monkeypatch.setattr(os, "cpu_count", lambda cores=cores: cores)
        limit_cpu_threads()
    assert given == [1, 1, 4]


def test_the_name_of_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"card of {device}")
    assert hardware_name("cuda:1") == "card of cuda:1"
