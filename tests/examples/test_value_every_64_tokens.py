"""examples/value_every_64_tokens.py: a line every so many tokens and at the end, and one line for what is wrong."""

import json

import pytest
import tiny
from fake_sglang import FakeValueServer, value_logits

from common_lib.cli import UserError
from engine_lib.value_wire import value_of
from examples import value_every_64_tokens


@pytest.fixture
def server():
    server = FakeValueServer(cached=70)
    yield server
    server.kill()


def run(server, trace, *flags):
    value_every_64_tokens.main([str(trace), "--url", server.url, "--vocab_size", "264", *flags])


def lines(ids, *ends):
    return [(str(end), "tokens", f"{value_of(value_logits(ids[:end])):.3f}") for end in ends]


def printed(capsys):
    return [tuple(line.split()[:3]) for line in capsys.readouterr().out.splitlines()]


def test_the_values_of_a_file_of_ids(server, tmp_path, capsys):
    ids = [i % 200 for i in range(150)]
    (tmp_path / "trace.json").write_text(json.dumps(ids))
    run(server, tmp_path / "trace.json")
    assert printed(capsys) == lines(ids, 64, 128, 150)
    run(server, tmp_path / "trace.json", "--every", "50")
    assert printed(capsys) == lines(ids, 50, 100, 150)


def test_the_values_of_a_text(server, tmp_path, capsys):
    text = "<｜User｜>3+4<｜Assistant｜><think>\n" + "so it goes on. " * 6
    (tmp_path / "trace.txt").write_text(text)
    tiny.tiny_tokenizer().save_pretrained(tmp_path)
    ids = tiny.tiny_tokenizer()(text, add_special_tokens=False).input_ids
    run(server, tmp_path / "trace.txt", "--tokenizer", str(tmp_path))
    assert printed(capsys) == lines(ids, 64, len(ids))
    with pytest.raises(UserError, match="is text: give the --tokenizer"):
        run(server, tmp_path / "trace.txt")


@pytest.mark.parametrize(
    ("written", "message"), [("[]", "no list of token ids"), ("[1.5]", "no list of"), ("{", "cannot be read"), ("[999]", "token id 999")]
)  # fmt: skip
def test_what_is_wrong_is_one_line(server, tmp_path, written, message):
    (tmp_path / "trace.json").write_text(written)
    with pytest.raises(UserError, match=message):
        run(server, tmp_path / "trace.json")
