"""requirements.txt resolves for a GPU node, and a file that does not is told from a machine without a network."""

import re

import check_requirements
import pytest
from conftest import ROOT

GPU_PYTHONS = ("3.11", "3.12")


def run(capfd, *flags: str) -> tuple[int, str, str]:
    status = check_requirements.main(list(flags))
    out, err = capfd.readouterr()
    if status == check_requirements.SKIPPED:
        pytest.skip(err.strip())
    return status, out, err


def test_the_gpu_nodes_requirements_resolve_with_readmes_flash_attn_beside_them(capfd, tmp_path):
    (flash_attn,) = re.findall(
        r'pip install "(flash-attn[^"]+)" --no-build-isolation', (ROOT / "README.md").read_text()
    )
    (tmp_path / "all.txt").write_text((ROOT / "requirements.txt").read_text() + f"{flash_attn}\n")
    status, out, _ = run(capfd, "--requirements", str(tmp_path / "all.txt"))
    lines = out.splitlines()
    assert status == 0 and [line.split(",")[0] for line in lines] == [f"Python {python}" for python in GPU_PYTHONS]
    for line in lines:
        assert "x86_64-manylinux_2_34" in line and "torch 2.14.1" in line and "sglang 0.5.23" in line
        assert "transformers 5.19.0" in line and "nvidia-nccl-cu13" in line and "flash-attn 2.8" in line


def test_what_cannot_be_installed_is_named(capfd):
    # The wheels of sglang need a younger glibc than uv's plain `linux`.
    status, out, err = run(capfd, "--platform", "linux")
    assert status == 1 and not out
    assert "does not resolve" in err and "sglang==0.5.23 has no wheels" in err


def test_without_a_network_nothing_is_claimed(capfd, monkeypatch):
    monkeypatch.setenv("UV_DEFAULT_INDEX", "https://127.0.0.1:9/simple")
    monkeypatch.setenv("UV_NO_CACHE", "1")
    monkeypatch.setenv("UV_HTTP_RETRIES", "0")
    assert check_requirements.main([]) == check_requirements.SKIPPED
    out, err = capfd.readouterr()
    assert not out and err.startswith("skipped: uv did not run to its end")
