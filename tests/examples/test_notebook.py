"""examples/value_model.ipynb, its code cells run in order with a tiny value model."""

import contextlib
import io
import json
import os
from unittest import mock

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pytest
import tiny
import torch
from conftest import ROOT

from classifier_lib import Qwen2ForClassifier

NOTEBOOK = ROOT / "examples" / "value_model.ipynb"


@pytest.fixture(scope="module")
def notebook():
    return json.loads(NOTEBOOK.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def run(notebook, tmp_path_factory):
    """(names after the last cell, what was printed, figures, model folder)."""
    folder = tiny.save_value_model(tmp_path_factory.mktemp("value"))
    names: dict = {"__name__": "__main__"}
    printed = io.StringIO()
    plt.close("all")
    environment = {"VALUE_MODEL": str(folder), "TOKENIZER": str(folder)}
    with (
        mock.patch.dict(os.environ, environment),
        contextlib.chdir(NOTEBOOK.parent),
        contextlib.redirect_stdout(printed),
        mock.patch.object(plt, "show"),
    ):
        for cell in notebook["cells"]:
            if cell["cell_type"] == "code":
                exec(compile("".join(cell["source"]), f"{NOTEBOOK.name}:{cell['id']}", "exec"), names)
    figures = [plt.figure(number) for number in plt.get_fignums()]
    yield names, printed.getvalue(), figures, folder
    plt.close("all")


def test_it_is_a_notebook_without_stored_results(notebook):
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)


def test_the_text_names_what_changes_for_the_released_model(notebook):
    text = "".join("".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "markdown")
    for words in ("VGS-AI/DeepSeek-VM-1.5B", "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", '`"r1"`', "16,384", "3 GB"):
        assert words in text


def test_every_token_gets_the_value_of_a_plain_forward_pass(run):
    names, _, _, folder = run
    model = Qwen2ForClassifier.from_pretrained(folder).eval()
    for ids, values in ((names["right"], names["values_right"]), (names["wrong"], names["values_wrong"])):
        assert len(values) == len(ids) + 1
        for count in (0, 1, len(ids)):  # the value at a token depends on nothing after it
            with torch.inference_mode():
                alone = model(torch.tensor([names["prompt_ids"] + ids[:count]])).success_probs[0, -1].item()
            assert values[count] == pytest.approx(alone, abs=1e-5)


def test_the_continuations_part_where_they_should_and_cost_each_token_once(run):
    names, printed, _, _ = run
    assert names["tokenizer"].decode(names["prefix"]) == "a2=42;b9"
    assert names["prefix"] + names["go_wrong"] == names["wrong"]
    assert names["value_prefix"] == pytest.approx(names["values_right"][names["shared"]], abs=1e-5)
    assert names["after_right"] == pytest.approx(names["values_right"][-1], abs=1e-5)
    assert names["after_wrong"] == pytest.approx(names["values_wrong"][-1], abs=1e-5)
    new = len(names["prompt_ids"]) + len(names["right"]) + len(names["go_wrong"])
    assert names["usage"].tokens_scored == new
    assert f"Tokens read: {new}, of " in printed


def test_two_plots_show_the_values(run):
    names, _, figures, _ = run
    assert len(figures) == 2
    lines = figures[1].axes[0].get_lines()
    assert list(lines[0].get_ydata()) == names["values_right"]
    assert list(lines[1].get_ydata()) == names["values_wrong"]
    assert figures[1].axes[0].get_ylabel() == "value"
    assert figures[1].axes[0].get_ylim() == (0, 1)
