"""ValueClient against small fake servers: values at the end and at positions, cached ones too, and its one-line errors."""

import asyncio
import time

import pytest
from fake_sglang import VALUE_VOCABULARY, FakeServer, FakeValueServer, reply_of, value_logits

from common_lib.cli import UserError
from engine_lib import value_client
from engine_lib.base import EngineError
from engine_lib.retry import RetryPolicy
from engine_lib.value_client import ValueClient
from engine_lib.value_wire import value_of

IDS = [5, 6, 7, 8, 9, 10, 11, 12]


@pytest.fixture
def servers():
    made = []

    def make(kind=FakeValueServer, **settings):
        made.append(kind(**settings))
        return made[-1]

    yield make
    for server in made:
        server.kill()


def client_of(server, **settings) -> ValueClient:
    client = ValueClient(server.url, VALUE_VOCABULARY, retry=RetryPolicy(3, 0.0), **settings)
    server.bodies.clear()  # it asked for the number of labels
    return client


def expected(ends) -> list[float]:
    return [value_of(value_logits(IDS[:end])) for end in ends]


def test_the_value_at_the_last_token(servers):
    client = client_of(servers())
    assert client.values(IDS) == expected([8])
    assert client.values(tuple(IDS[:3])) == expected([3])


@pytest.mark.parametrize("cached", [0, 3, 7])
def test_values_at_positions_wherever_the_cache_ends(servers, cached):
    """Cached ones have no hidden state: their prefixes are asked for, in one request."""
    server = servers(cached=cached)
    assert client_of(server).values(IDS, [6, 0, 7, 2, 2]) == expected([7, 1, 8, 3, 3])
    first, *others = server.bodies
    assert first == {"input_ids": IDS, "token_indices_to_pool": [6, 0, 7, 2, 2]}
    prefixes = [IDS[:end] for end in (7, 1, 3, 3) if end <= cached]
    assert [body["input_ids"] for body in others] == ([prefixes] if prefixes else [])


def test_long_prefixes_are_not_sent_all_at_once(servers, monkeypatch):
    monkeypatch.setattr(value_client, "TOKENS_A_POST", 9)
    server = servers(cached=7)
    assert client_of(server).values(IDS, list(range(8))) == expected(range(1, 9))
    assert [list(map(len, body["input_ids"])) for body in server.bodies[1:]] == [[1, 2, 3], [4, 5], [6], [7]]


def test_one_label(servers):
    server = servers(row=lambda ids: [0.25, 3.0])
    assert client_of(server).values(IDS) == [value_of([0.25])]


def test_it_works_where_a_loop_runs_already(servers):
    client = client_of(servers())

    async def notebook():
        return client.values(IDS, [1, 3])

    assert asyncio.run(notebook()) == expected([2, 4])


def test_arrays_are_taken(servers):
    torch = pytest.importorskip("torch")
    assert client_of(servers()).values(torch.tensor(IDS), torch.tensor([3, 7])) == expected([4, 8])


def test_bad_ids_and_positions_are_never_sent(servers):
    server = servers(max_total_num_tokens=20)
    client = client_of(server)
    for ids, positions, message in (
        ([], None, "empty"),
        ([], [0], "empty"),
        ([264], None, "token id 264 is outside"),
        ([1] * 19, None, "19 tokens is longer than the 18"),
        (IDS, [8], "position 8 is outside the trace of 8 tokens"),
        (IDS, [-1], "position -1 is outside"),
    ):
        with pytest.raises(ValueError, match=message):
            client.values(ids, positions)
    assert client.values(IDS, []) == []
    assert not server.bodies
    assert client.values(IDS) == expected([8])


def test_a_router_gives_values_at_the_end_and_refuses_positions(servers):
    worker, router = servers(), servers()
    router.workers = [worker.url]
    client = client_of(router)
    assert client.values(IDS) == expected([8])
    with pytest.raises(
        UserError, match=f"^{router.url} is a router, which drops positions; give the URL of one of its serv"
    ):
        client.values(IDS, [3])


def test_what_may_pass_is_tried_again_and_then_told(servers):
    answers = [(500, "Internal Server Error")] * 2
    server = servers(script=lambda body: answers.pop() if answers and len(body["input_ids"][0]) > 1 else None)
    client = client_of(server)
    assert client.values(IDS) == expected([8])
    answers += [(200, [{"meta_info": {"finish_reason": {"type": "abort", "message": "by hand"}}}])] * 3
    with pytest.raises(EngineError, match=f"^{server.url} failed 3 times, last with it was aborted: by hand"):
        client.values(IDS)
    assert client.values(IDS) == expected([8])
    server.kill()
    with pytest.raises(EngineError, match=f"^{server.url} is out of reach: "):
        client.values(IDS)


def test_it_is_closed_by_hand_by_a_with_and_where_it_cannot_start(servers, monkeypatch):
    server = servers()
    with client_of(server) as client:
        assert client.values(IDS) == expected([8])
    assert client._http.is_closed
    client.close()
    closed = []
    monkeypatch.setattr(ValueClient, "close", lambda client: closed.append(client))
    with pytest.raises(UserError):
        ValueClient(servers(kind=FakeServer).url)
    assert len(closed) == 1
    closed[0]._http.close()


def test_its_time_limit(servers):
    server = servers()
    client = client_of(server, timeout_s=0.3)
    server.seconds, begin = 3.0, time.monotonic()
    with pytest.raises(EngineError, match="did not answer within 0.3 s"):
        client.values(IDS)
    assert time.monotonic() - begin < 2


def test_the_vocabulary_is_the_served_checkpoints_or_must_be_given(servers, value_folder):
    assert ValueClient(servers(model_path=str(value_folder)).url).vocab_size == 264
    with pytest.raises(UserError, match="serves the-value-model, which is not on this machine: give vocab_size"):
        ValueClient(servers().url)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": FakeServer}, "serves the-model, a Qwen2ForCausalLM, which is no value model"),
        ({"row": lambda ids: [0.1] * 32}, "answers 32 numbers, which are no values"),
        ({"pages": 401}, "no server answers"),
        ({"max_req_input_len": None}, "does not answer as an SGLang server does"),
    ],
)
def test_another_server_is_refused(servers, settings, message):
    with pytest.raises(UserError, match=message) as error:
        client_of(servers(**settings))
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="no server answers at http://127.0.0.1:9 .*start one with python -m"):
        ValueClient("http://127.0.0.1:9")


def test_an_answer_that_is_no_row_is_told(servers):
    server = servers()
    client = client_of(server)
    server.script = lambda body: (200, [reply_of([1.0, 2.0])])
    with pytest.raises(EngineError, match="has 2 numbers, and a value model of 3 labels writes 4"):
        client.values(IDS)
