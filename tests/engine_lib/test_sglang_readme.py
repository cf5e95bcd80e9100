"""README's lines that start SGLang servers start them: the same flags, a tiny model, and what a CPU needs.

Skipped where sglang is not installed: scripts/install_sglang_cpu.sh.
"""

import importlib.util
import json
import shlex
import urllib.request

import pytest
from conftest import ROOT

if importlib.util.find_spec("sglang") is None:
    pytest.skip("sglang is not installed; bash scripts/install_sglang_cpu.sh FOLDER does it", allow_module_level=True)

import tiny
from sglang_host import CPU_FLAGS, Host, Server, free_port, wait_until
from sglang_router import launch_router

SERVER = "python -m sglang.launch_server "
README = (ROOT / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")
LINES = [line for line in README.splitlines() if line.startswith(SERVER)]


def test_the_readme_has_such_lines_and_each_bounds_its_memory():
    assert LINES
    assert all(" --mem-fraction-static " in line and " --skip-tokenizer-init" in line for line in LINES)


def test_the_router_line_is_one_that_the_router_takes():
    text = " ".join(README.split())
    flags = shlex.split(text.split("`python -m sglang_router.launch_router ", 1)[1].split("`", 1)[0])
    args = launch_router.parse_router_args(flags)
    assert args.worker_urls == ["http://node1:30000", "http://node2:30000"]
    assert (args.policy, args.port, args.request_timeout_secs) == ("manual", 30001, 3600)


@pytest.mark.parametrize("line", LINES)
def test_a_server_as_the_readme_starts_it_answers(line, tmp_path):
    flags = shlex.split(line.removeprefix(SERVER))
    port, generator = free_port(), tiny.save_generator(tmp_path / "generator")
    for name, value in (("--model-path", generator), ("--port", port)):
        flags[flags.index(name) + 1] = str(value)
    share = float(flags[flags.index("--mem-fraction-static") + 1])
    for name, value in CPU_FLAGS.items():
        flags += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    host = Host(tmp_path)
    try:
        server = host._add(Server(*host._order(["server", *flags]), port))
        wait_until(server.is_up, 120, server)
        assert server.get("server_info")["mem_fraction_static"] == share
        body = json.dumps({"input_ids": [5, 6, 7], "sampling_params": {"max_new_tokens": 3, "ignore_eos": True}})
        request = urllib.request.Request(
            f"{server.url}/generate", body.encode(), headers={"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as reply:
            assert len(json.load(reply)["output_ids"]) == 3
    finally:
        host.close()
