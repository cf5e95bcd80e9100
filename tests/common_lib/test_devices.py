"""Devices and their memory."""

import os
from pathlib import Path

import pytest
import torch

from common_lib.cli import UserError
from common_lib.devices import (
    check_device_name,
    hardware_name,
    limit_cpu_threads,
    memory_of,
    resolve_device,
    use_expandable_segments,
)


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


def test_what_is_free(monkeypatch):
    free, total = memory_of("cpu")
    assert 0 < free <= total == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: {"cuda:1": (1000, 5000)}[device])
    assert memory_of("cuda:1") == (1000, 5000)
    text = "MemTotal:  900 kB\nMemFree:  10 kB\nMemAvailable:  800 kB\n"
    monkeypatch.setattr(Path, "read_text", lambda path, **_: text)
    assert memory_of("cpu") == (800 * 1024, total)


@pytest.mark.parametrize("variable", ["", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_segments_grow_unless_the_user_has_settings_of_his_own(variable, monkeypatch):
    """And no other process hears of it: the environment stays as it is."""
    given = []
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", given.append)
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    if variable:
        monkeypatch.setenv(variable, "max_split_size_mb:512")
    before = dict(os.environ)
    use_expandable_segments()
    assert given == ([] if variable else ["expandable_segments:True"])
    assert dict(os.environ) == before


def test_a_torch_that_cannot_be_told_is_said(monkeypatch, caplog):
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    monkeypatch.delattr(torch._C, "_accelerator_setAllocatorSettings")
    use_expandable_segments()
    assert "PYTORCH_ALLOC_CONF=expandable_segments:True" in caplog.text


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
