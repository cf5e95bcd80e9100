"""README's lines that start SGLang servers and its recipes for a node of 8, as written, but for a tiny model and what a CPU needs.

What the recipes' tests replace is listed below. Skipped where sglang is not installed: scripts/install_sglang_cpu.sh.
"""

import importlib.util
import json
import shlex
import urllib.request
from pathlib import Path

import pytest
from conftest import ROOT

if importlib.util.find_spec("sglang") is None:
    pytest.skip("sglang is not installed; bash scripts/install_sglang_cpu.sh FOLDER does it", allow_module_level=True)

import kill_test
from recipes import README as TEXT
from recipes import Call, recipe
from sglang_host import CPU_FLAGS, TWO_RANKS, Child, Host, Server, free_port, wait_until
from sglang_router import launch_router

SERVER = "python -m sglang.launch_server "
README = TEXT.replace("\\\n", " ")
LINES = [line for line in README.splitlines() if line.startswith(SERVER)]
# What a recipe's test replaces. Of a server: its model and its port; and it is told of the CPU.
ON_A_CPU = [
    word
    for name, value in CPU_FLAGS.items()
    for word in (f"--{name.replace('_', '-')}", *([] if value is True else [str(value)]))
]
WRITER, READER = "sglang.launch_server", "engine_lib.value_server"
GENERATORS, VALUE_SERVERS = 2, 1  # instead of 6 and 2
# Of the search: these and the URLs; its models and the lengths of traces are added.
REPLACED = ("--benchmark", "--output_path")
REPLACED_IN_PROCESS = {
    "dp_size=6": ["dp_size=2", "max_total_tokens=16384", "max_running_requests=64"],
    "cuda:6": ["cpu"],
    "cuda:7": ["cpu"],
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> dict[str, str]:
    """Flags that name tiny models and a benchmark, and make traces short."""
    words = kill_test.make_inputs(tmp_path_factory.mktemp("inputs"), problems=1)
    found = dict(zip(words[::2], words[1::2], strict=True)) | {"--max_length": "32"}
    return {name: value for name, value in found.items() if name not in ("--num_repetitions", "--batch_size")}


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
def test_a_server_as_the_readme_starts_it_answers(line, host, inputs):
    server = start_server(
        host, shlex.split(line.removeprefix(SERVER)), ["server"], "--model-path", inputs["--piref_model"]
    )
    wait_until(server.is_up, 120, server)
    words = line.split()
    assert server.get("server_info")["mem_fraction_static"] == float(words[words.index("--mem-fraction-static") + 1])
    body = json.dumps({"input_ids": [5, 6, 7], "sampling_params": {"max_new_tokens": 3, "ignore_eos": True}})
    request = urllib.request.Request(
        f"{server.url}/generate", body.encode(), headers={"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as reply:
        assert len(json.load(reply)["output_ids"]) == 3
    server.kill()


# ---------------------------------------------------------------------------------------------------------------------
# Recipes


def after(call: Call, program: str) -> list[str]:
    return call.argv[call.argv.index(program) + 1 :]


def without(flags: list[str], *names: str) -> list[str]:
    """Flags of one value each, and their values, are left out."""
    gone = {place for i, word in enumerate(flags) if word in names for place in (i, i + 1)}
    return [word for i, word in enumerate(flags) if i not in gone]


def start_server(host: Host, flags: list[str], argv: list[str], model_flag: str, model: str) -> Server:
    port = free_port()
    flags = without(flags, model_flag, "--port")
    argv = [*argv, model_flag, model, "--port", str(port), *flags, *ON_A_CPU]
    return host._add(Server(*host._order(argv), port))


def search(host: Host, flags: list[str], inputs: dict[str, str], output: Path, **environment: str) -> Child:
    """The search as a recipe has it, with this test's models, problems and lengths."""
    own = [word for pair in inputs.items() for word in pair]
    argv = [str(ROOT / "inference_eval.py"), *without(flags, *REPLACED), *own, "--output_path", str(output)]
    return host._add(Child(*host._order(argv, **environment)))


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").rstrip("\n").split("\n")]


def results(child: Child, output: Path) -> list[dict]:
    assert child.wait(180) == 0, child.output
    lines = rows(output)
    assert len(lines) == 16
    assert all(0 < value < 1 for line in lines for value in line["generated_scores"])
    return lines


def cached_share(output: Path) -> float:
    """Of the prompts of all rounds but a search's first one: what came from the generator's cache."""
    lengths, given, cached = {}, 0, 0
    for row in rows(output.with_name(f"{output.stem}.tree.jsonl")):
        nodes = lengths.setdefault((row["data_idx"], row["repeat_idx"]), [len(row.get("prompt_ids", []))])
        if row["round"]:
            given += sum(nodes[parent] for parent in row["parent"])
            cached += row["tokens_cached"]
        nodes += [nodes[parent] + len(tokens) for parent, tokens in zip(row["parent"], row["tokens"], strict=True)]
    return cached / given


def test_a_node_of_eight_in_servers(host, inputs, tmp_path):
    calls = recipe("node", tmp_path)
    writers = [
        start_server(host, after(call, WRITER), ["server"], "--model-path", inputs["--piref_model"])
        for call in [call for call in calls if WRITER in call.argv][:GENERATORS]
    ]
    script = [str(ROOT / "engine_lib/value_server.py")]
    readers = [
        start_server(host, after(call, READER), script, "--classifier_ckpt_path", inputs["--classifier_ckpt_path"])
        for call in [call for call in calls if READER in call.argv][:VALUE_SERVERS]
    ]
    for server in [*writers, *readers]:
        wait_until(server.is_up, 180, server)
    assert {server.get("server_info")["mem_fraction_static"] for server in [*writers, *readers]} == {0.85}
    urls = [f"--sglang_url={server.url}" for server in writers] + [f"--value_url={server.url}" for server in readers]
    flags = without(after(calls[-1], "inference_eval.py"), "--sglang_url", "--value_url")
    output = tmp_path / "node.jsonl"
    child = search(host, [*flags, *urls], inputs, output)
    assert sum(line["tokens_reread"] for line in results(child, output)) == 0
    assert cached_share(output) > 0.95
    assert all('POST /generate HTTP/1.1" 200' in server.output for server in writers), "both wrote"
    assert 'POST /encode HTTP/1.1" 200' in readers[0].output
    for server in [*writers, *readers]:
        server.kill()


def test_a_node_of_eight_in_one_process(host, inputs, tmp_path):
    """Each search stays on one data-parallel rank: left to itself SGLang goes from one to the other."""
    (call,) = recipe("process", tmp_path)
    flags = [other for word in after(call, "inference_eval.py") for other in REPLACED_IN_PROCESS.get(word, [word])]
    assert {"dp_size=2", "cpu"} <= set(flags)
    output = tmp_path / "process.jsonl"
    child = search(host, [*flags, "--device", "cpu"], inputs, output, **TWO_RANKS)
    results(child, output)
    assert cached_share(output) > 0.95
    meta = json.loads((tmp_path / "process.meta.json").read_text())
    described = json.dumps(meta)
    assert '"dp_size": 2' in described and '"devices": ["cpu", "cpu"]' in described
