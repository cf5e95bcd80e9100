"""One form of a table, three ways to show it."""

import pytest

from eval_lib.tables import Table, as_csv, as_markdown, as_text, number, percent, printable, short


def test_columns_are_padded_numbers_to_the_right_words_to_the_left():
    table = Table("Title", ["run", "n"], [["a", "10"], ["longer", "9"]], ["A note " * 20], words=["run"])
    text = as_text(table, width=40).splitlines()
    assert text[:4] == ["Title", "run      n", "a       10", "longer   9"]
    assert max(map(len, text)) <= 40
    assert "|:--|--:|" in as_markdown(table).replace(" ", "")


def test_hostile_names_stay_inside_their_cell():
    table = Table("a\x1b[31m", ["x|y", "<b>"], [["1|2", "\u202e"]])
    assert "\x1b" not in as_text(table) + as_markdown(table)
    assert "| x\\|y | &lt;b> |" in as_markdown(table)
    assert "\u202e" not in as_markdown(table)
    assert printable("é\n") == "é\n"


def test_csv_keeps_every_digit_and_leaves_out_what_is_not_known():
    assert as_csv([{"run": "a,b", "x": 0.1 + 0.2}, {"run": "c", "x": None}]) == 'run,x\n"a,b",0.30000000000000004\nc,\n'


@pytest.mark.parametrize(
    ("value", "shown"), [(None, "–"), (7, "7"), (1230, "1.23k"), (4.5e12, "4.5T"), (2e21, "2,000E")]
)
def test_large_numbers_are_short(value, shown):
    assert short(value) == shown


def test_what_is_not_known_is_a_dash():
    assert [number(None), number(float("nan")), percent(None)] == ["–"] * 3
    assert [percent(0.458, 0.152), percent(1, 0), percent(0)] == ["45.8 ±15.2", "100.0  ±0.0", "0.0"]
