"""The comparison of two trees' outputs: what it overlooks, and what it does not."""

import json

import pytest
from compare_with import compare, cut, difference

LINE = {"step": 1, "loss": 0.5, "seconds": 1.5, "versions": {"torch": "2"}, "text": 'he said "seconds": 3'}


def pair(tmp_path, before: bytes, after: bytes, name: str = "metrics.jsonl"):
    for side, content in (("before", before), ("after", after)):
        (tmp_path / side).mkdir(exist_ok=True)
        (tmp_path / side / name).write_bytes(content)
    return tmp_path / "before" / name, tmp_path / "after" / name


@pytest.mark.parametrize("changes", [{"seconds": 2e-07}, {"versions": {"torch": "3"}}, {"attention": "sdpa"}])
def test_times_versions_and_new_names_are_overlooked(tmp_path, changes):
    texts = (json.dumps(line).encode() for line in (LINE, LINE | changes))
    assert difference(*pair(tmp_path, *texts)) is None


@pytest.mark.parametrize("changes", [{"loss": 0.5000001}, {"step": 2}, {"new": 1}, {"text": 'he said "seconds": 4'}])
def test_anything_else_is_a_difference_and_its_place_is_told(tmp_path, changes):
    texts = (b"{}\n" + json.dumps(line).encode() for line in (LINE, LINE | changes))
    assert difference(*pair(tmp_path, *texts)).startswith("line 2: ")


def test_the_layout_of_a_line_counts_and_so_does_every_byte_of_other_files(tmp_path):
    assert difference(*pair(tmp_path, b'{"a": 1}', b'{"a":1}'))
    assert difference(*pair(tmp_path, b'"seconds": 1', b'"seconds": 2', "rng.pt"))


def test_a_missing_file_is_a_difference_and_texts_of_the_report_are_not_compared(tmp_path, capsys):
    pair(tmp_path, b"{}", b"{}")
    (tmp_path / "before" / "report").mkdir()
    (tmp_path / "before" / "report" / "table.md").write_text("old")
    assert compare(tmp_path / "before", tmp_path / "after")
    (tmp_path / "after" / "run.tree.jsonl").write_text("{}")
    assert not compare(tmp_path / "before", tmp_path / "after")
    assert "run.tree.jsonl, is there after only" in capsys.readouterr().out


def test_a_run_is_cut_as_by_a_kill(tmp_path):
    for suffix in (".jsonl", ".tree.jsonl", ".meta.json"):
        (tmp_path / f"whole{suffix}").write_text("x" * 60)
    cut(tmp_path / "whole", tmp_path / "part")
    sizes = [(tmp_path / f"part{suffix}").stat().st_size for suffix in (".jsonl", ".tree.jsonl", ".meta.json")]
    assert sizes == [20, 30, 60]
