"""README: its commands that need neither a GPU nor the hub, run as they are written."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import quickstart
from conftest import ROOT

from search_lib import arguments
from training_lib import arguments as training_args

README = (ROOT / "README.md").read_text(encoding="utf-8")
TINY = dict(generator_steps=250, train_problems=80, test_problems=20, held_out=20, value_steps=20)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A folder like a checkout in which a (very small) quickstart has run, with room for what commands write."""
    folder = tmp_path_factory.mktemp("checkout")
    for entry in ROOT.iterdir():
        if not entry.name.startswith(".") and entry.name not in ("quickstart_out", "runs"):
            (folder / entry.name).symlink_to(entry)
    run = folder / "quickstart_out" / "seed1"
    run.mkdir(parents=True)
    quickstart.run_steps(quickstart.STEPS, run, 1, TINY)
    return folder


def bash(line: str, folder: Path) -> str:
    """What it prints; it must end well. `python` and `torchrun` are this environment's."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", line],
        cwd=folder,
        env=os.environ | {"PATH": path},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def readme_block(text: str) -> str:
    """The first block of commands after `text`."""
    return README.split(text, 1)[1].split("```bash\n", 1)[1].split("```", 1)[0]


def test_the_readmes_commands_for_ones_own_generator(checkout):
    marker = "<!-- after the quickstart -->\n```bash\n"
    blocks = [part.split("```", 1)[0] for part in README.split(marker)[1:]]
    assert len(blocks) == 3
    for block in blocks:
        assert "weighted" in bash(block, checkout)
    assert (checkout / "my_report" / "report.html").is_file()
    assert (checkout / "my_comparison" / "report.html").is_file()
    assert (checkout / "runs" / "mine" / "latest" / "model.safetensors").is_file()


def test_every_file_that_the_readme_names_is_there():
    named = set(re.findall(r"[\w./-]+\.(?:py|sh|md|txt|png)\b", README)) - {"gpu_check.md"}
    paths = {name for name in named if "/" in name and not name.startswith(("quickstart_out", "http", "/"))}
    assert len(paths) > 10 and not [
        path for path in paths if not any(ROOT.glob(path)) and not any(ROOT.glob(f"*/{path}"))
    ]


def test_the_papers_training_command_as_written_with_overriding_flags(checkout, monkeypatch):
    command = readme_block("Train the value model on 4 GPUs")
    words = shlex.split(command.replace("\\\n", " "))
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert training_args.parse_args(words[words.index("train_classifier.py") + 1 :]).num_steps == 12170
    bash(
        f"{command.rstrip()} --data_path quickstart_out/seed1/rollouts --model_path quickstart_out/seed1/generator "
        "--data_num_response 4 --max_length 80 --total_batch_size 16 --micro_batch_size 4 --num_steps 2 --no-compile "
        "--no-track --no-push_to_hub --device cpu",
        checkout,
    )
    assert (checkout / "runs" / "single_node_run" / "latest" / "model.safetensors").is_file()


def test_the_papers_commands_are_the_released_ones(shared):
    released = shared("RELEASED_README.md").read_text(encoding="utf-8").split("```")[1::2]
    commands = [block.lstrip("\n") for block in released if ".py" in block]
    assert commands == [readme_block("Search AIME-24 with it"), readme_block("Train the value model on 4 GPUs")]


def test_the_papers_search_command_as_written_with_overriding_flags(checkout):
    command = readme_block("Search AIME-24 with it")
    words = shlex.split(command.replace("\\\n", " "))
    args = arguments.parse_args(words[words.index("inference_eval.py") + 1 :])
    assert (args.num_blocks, args.batch_size, args.seed, args.piref_gpu_util) == (8, 10, 7996, 0.75)
    assert args.tracker == "neptune"
    bash(
        f"{command.rstrip()} --benchmark quickstart_out/seed1/problems_test.jsonl --max_problems 5 --engine transformers "
        "--piref_model quickstart_out/seed1/generator --classifier_ckpt_path quickstart_out/seed1/value_model/latest "
        "--prompt_format bare --max_length 60 --block_size 6 --device cpu --num_repetitions 3",
        checkout,
    )
    assert len((checkout / "inference_outputs.jsonl").read_text().splitlines()) == 15
