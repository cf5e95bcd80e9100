"""Counted figures: those that the issue asks for, those of scripts/baselines, and how a difference is told."""

import json

import pytest
from gpu_parts import baselines, layouts


class NoReport:
    def figure(self, *_, **__):
        pass


@pytest.fixture(scope="module")
def counted():
    return layouts.what_packing_saves(NoReport(), steps=6)


def test_counted_figures_are_those_of_the_baselines(counted):
    names = {key: f"{key[0]}, groups of {key[1]}" for key in counted}
    per_loss_token = {names[key]: counts.per_loss_token for key, counts in counted.items()}
    padded_over_real = {names[key]: counts.padded_over_real for key, counts in counted.items()}
    assert baselines.differences("tokens_per_loss_token", per_loss_token) == []
    assert baselines.differences("padded_over_real", padded_over_real) == []


def test_tries_compute_few_tokens_per_loss_token_in_short_rows_too(counted):
    cost = {(layout, group): counts.per_loss_token for (layout, group), counts in counted.items()}
    assert cost["tree, rows of 128k", 2] <= 1.65 and cost["tree, rows of 128k", 4] <= 1.35
    assert cost["tree, rows of 32k", 2] <= 1.72 and cost["tree, rows of 32k", 4] <= 1.47
    assert all(counts.padded_over_real <= 1.12 for (layout, _), counts in counted.items() if layout == "none")


def test_what_packing_saves_is_counted_over_all_ranks_and_steps(counted):
    """Every layout has the same loss tokens; shared prefixes save what they should."""
    for group in layouts.GROUPS:
        of_group = {layout: counts for (layout, size), counts in counted.items() if size == group}
        assert len({counts.loss for counts in of_group.values()}) == 1
        assert of_group["none"].rows == 6 * 64 / 8
        assert of_group["none"].real == of_group["pack, rows of 32k"].real == of_group["pack, rows of 128k"].real
        assert of_group["pack, rows of 32k"].rows > 3 * of_group["pack, rows of 128k"].rows
        for size in ("32k", "64k", "128k"):
            assert of_group[f"pack, rows of {size}"].computed > 1.3 * of_group[f"tree, rows of {size}"].computed
    assert counted["tree, rows of 32k", 4].computed < 0.9 * counted["tree, rows of 32k", 2].computed


def test_memory_stands_beside_them_for_as_many_tokens_as_a_row_has():
    """Of 128k as of padded micro batches of as many tokens; the budget falls as rows grow, and all fit the card."""
    sizes = [layouts.step_memory(size) for size in (32_768, 65_536, 131_072, None)]
    assert [memory.shape.tokens for memory in sizes] == [32_768, 65_536, 131_072, 131_072]
    assert sizes[0].shape.budget > sizes[1].shape.budget >= sizes[2].shape.budget
    assert all(memory.total < layouts.CARD for memory in sizes) and sizes[2].total == sizes[3].total


def test_a_difference_is_told_with_both_numbers(tmp_path):
    (tmp_path / "some.json").write_text(
        json.dumps({"how": "by hand", "tolerance": 0.01, "figures": {"a": 2.0, "b": 3}})
    )

    def told(**figures):
        return baselines.differences("some", figures, tmp_path)

    assert told(a=2.019, b=3) == []
    assert told(a=2.021, b=3) == ["a: 2.021, was 2 (tolerance 1.0%)"] and told(a=1.97, b=3) != []
    assert told(a=2.0, c=1) == ["b: not counted", "c: not in some.json"]


def test_every_baseline_says_how_it_is_counted():
    for path in baselines.FOLDER.glob("*.json"):
        baseline = json.loads(path.read_text())
        assert (
            baseline.keys() == {"how", "tolerance", "figures"}
            and 0 <= baseline["tolerance"] < 0.2
            and baseline["figures"]
        )
