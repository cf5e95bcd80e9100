"""A server's vocabulary is held against the model's, and one of roll-ins is used beside a loaded generator: the real client,
a server that is not."""

import asyncio
import json
import re

import pytest
from collect_spy import SpyEngine, SpyGrader, flags, make_inputs
from fake_sglang import FakeServer
from tiny import tiny_tokenizer

import collect_rollouts
from common_lib.cli import UserError
from engine_lib.base import EngineError, Request
from engine_lib.served_vocabulary import check_vocabulary, sample_texts

TOKENIZER = tiny_tokenizer()


@pytest.fixture
def serve():
    """Servers with a vocabulary of so many ids, and, where given, a tokenizer."""
    servers = []

    def start(**settings):
        servers.append(FakeServer(**settings))
        return servers[-1]

    yield start
    for server in servers:
        server.kill()


def check(*servers):
    what = "--roll_in_models M"
    return asyncio.run(check_vocabulary([server.url for server in servers], TOKENIZER, 264, what))


def decode(ids):
    return TOKENIZER.decode(ids, skip_special_tokens=False)


def test_a_server_of_the_same_vocabulary_is_taken(serve, caplog):
    caplog.set_level("INFO", logger="engine_lib")
    check(serve(), serve(decode=lambda ids: f" {decode(ids)}"))  # libraries clean up spaces
    assert [
        record.getMessage().split(" ", 1)[1] for record in caplog.records if record.name.startswith("engine_lib")
    ] == ["has no tokenizer to compare with; it has as many token ids as --roll_in_models M"]
    assert set(sample_texts(TOKENIZER)) == set(range(262))


def test_of_a_large_vocabulary_some_and_all_added_ids_are_asked():
    class Large:
        def get_vocab(self):
            return {str(number): number for number in range(150_000)}

        def get_added_vocab(self):
            return {"<added>": 149_998}

        def decode(self, ids, skip_special_tokens):
            return str(ids[0])

    texts = sample_texts(Large())
    assert 1900 < len(texts) <= 2001 and texts[149_998] == "149998" and max(texts) < 150_000


@pytest.mark.parametrize(("size", "word"), [(263, "fewer"), (265, "more")])
def test_another_number_of_ids_is_refused(size, word, serve):
    server = serve(vocabulary=size)
    told = f"{server.url} has {word} token ids than the 264 of --roll_in_models M: it serves another model"
    with pytest.raises(UserError, match=re.escape(told)):
        check(serve(), server)


def test_another_meaning_is_refused_with_the_first_ids(serve):
    server = serve(decode=lambda ids: {5: "five", 256: "<eos>"}.get(ids[0], decode(ids)))
    with pytest.raises(UserError) as error:
        check(server)
    assert str(error.value) == (
        f"{server.url} has another tokenizer than --roll_in_models M (2 of 262 token ids differ: 5 is 'five' there and "
        f"{decode([5])!r} here; 256 is '<eos>' there and {decode([256])!r} here); all generators must share one"
    )


def test_a_server_that_fails_or_has_gone_is_one_line(serve):
    server = serve(script=lambda body: (500, "broken"))
    with pytest.raises(EngineError, match="does not tell its vocabulary"):
        check(server)
    server.kill()
    with pytest.raises(EngineError, match=f"{server.url}/generate does not answer"):
        check(server)


# ---------------------------------------------------------------------------------------------------------------------
# In a collection


@pytest.fixture
def collect_from(inputs, tmp_path, monkeypatch):
    """Runs a collection whose generator is a spy and whose other roll-in model is served; notes the engines it makes."""
    make, engines = collect_rollouts.make_engine, []

    class Own(SpyEngine):
        async def generate(self, requests):
            return [self.write(request) for request in requests]

    def make_engine(name, config):
        engines.append(make(name, config) if name == "sglang-server" else Own(None, name, config))
        return engines[-1]

    def run(url):
        both = {"roll_in_models": [inputs / "policy", inputs / "other"], "roll_in_url": f"{inputs / 'other'}={url}"}
        return collect_rollouts.main(flags(inputs, tmp_path / "out", keep_unsolved=True, **both))

    monkeypatch.setattr(collect_rollouts, "make_engine", make_engine)
    monkeypatch.setattr(collect_rollouts, "Grader", SpyGrader)
    run.engines = engines
    return run


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"))


def asked_for_roll_ins(server):
    return [body for body in server.bodies if "logit_bias" not in body["sampling_params"]]


def test_roll_ins_of_a_served_model_come_from_its_server(inputs, tmp_path, serve, collect_from, caplog):
    server = serve(decode=decode)
    assert collect_from(server.url) == 0
    served, own = collect_from.engines
    assert own.closed
    with pytest.raises(EngineError, match="has been closed"):
        asyncio.run(served.generate([Request([1], 1)]))
    assert {body["sampling_params"]["temperature"] for body in asked_for_roll_ins(server)} == {0.9}
    assert len(asked_for_roll_ins(server)) == 6
    assert f"{server.url} serves the-model and --roll_in_models is {inputs / 'other'}: only you know" in caplog.text
    assert not list((tmp_path / "out").rglob("roll_ins-*"))


def test_what_the_model_had_written_before_it_was_served_is_not_asked_for_again(tmp_path, serve, collect_from):
    server, journal = serve(decode=decode), tmp_path / "out/.collect/roll_ins-01-00000.jsonl"
    journal.parent.mkdir(parents=True)
    journal.write_text(json.dumps({"i": 2, "roll_ins": {"1": [70, 71, 72, 73]}}) + "\n")
    assert collect_from(server.url) == 0
    assert len(asked_for_roll_ins(server)) == 5


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "serves the-model, a LlamaForCausalLM; --roll_in_models "),
        ({"vocabulary": 300}, "has more token ids than the 264 of --roll_in_models "),
        (
            {"max_req_input_len": 50},
            "more than the 54 that the sglang-server engine takes; give a smaller --max_length",
        ),
    ],
)
def test_a_server_of_something_else_is_refused_before_the_generator_is_loaded(settings, told, serve, collect_from):
    with pytest.raises(UserError, match=told):
        collect_from(serve(**settings).url)
    assert not any(isinstance(engine, SpyEngine) for engine in collect_from.engines)


def test_no_server_at_all_names_the_flag(serve, collect_from, capsys):
    server = serve()
    server.kill()
    assert collect_from(server.url) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert "give the right --roll_in_url" in last and last.endswith("the same command goes on)")
