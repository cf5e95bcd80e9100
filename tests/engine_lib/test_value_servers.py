"""Value servers over HTTP, against small fake ones: what is sent, what is refused, and what happens when one fails."""

import asyncio
import json
import logging
import time
from dataclasses import replace

import pytest
from fake_sglang import (
    VALUE_VOCABULARY,
    FakeServer,
    FakeValueServer,
    fake_servers,
    reply_of,
    run_with,
    urls_of,
    value_logits,
)

from common_lib.cli import UserError
from engine_lib import sglang_value_remote
from engine_lib.base import EngineError
from engine_lib.retry import RetryPolicy
from engine_lib.server_pool import Patience
from engine_lib.sglang_value_remote import SGLangValueServers
from engine_lib.value_base import ValueConfig, Valued
from engine_lib.value_wire import value_of

QUICK = Patience(
    retry=RetryPolicy(attempts=3, pause_s=0.0), look_again_s=0.02, look_again_most_s=0.05, probe_every_s=0.05
)  # fmt: skip
TRACES = [[1, 2], [1, 2, 3, 4, 5], [9]]


@pytest.fixture
def model(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["Qwen2ForClassifier"]}))
    return ValueConfig(str(tmp_path), VALUE_VOCABULARY, 3, request_timeout_s=20.0)


@pytest.fixture
def servers():
    with fake_servers(FakeValueServer) as make:
        yield make


def new_engine(model, *servers, patience=QUICK, **settings):
    return SGLangValueServers(replace(model, urls=urls_of(servers), **settings), patience)


def with_engine(model, servers, main, **settings):
    return run_with(new_engine(model, *servers, **settings), main)


def expected(traces) -> list[Valued]:
    return [Valued(value_of(value_logits(ids)), len(ids)) for ids in traces]


async def until(condition) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


# What is sent


def test_a_round_is_one_post_and_comes_back_in_order(model, servers):
    server = servers()
    assert with_engine(model, [server], lambda e: e.values(TRACES, "3/1")) == expected(TRACES)
    (body,) = server.bodies
    assert body["input_ids"] == TRACES
    assert len(set(body["rid"])) == 3
    assert server.keys == ["3/1"]


def test_one_trace_is_a_list_too_and_none_is_not_sent(model, servers):
    server = servers()

    async def main(engine):
        assert await engine.values([], "g") == []
        assert await engine.values([(7, 8)], "") == expected([(7, 8)])

    with_engine(model, [server], main)
    assert [body["input_ids"] for body in server.bodies] == [[[7, 8]]]
    assert server.keys == [None]


def test_a_router_is_asked_by_its_own_page_with_the_key(model, servers):
    workers, router = servers(2), servers()
    router.workers = [worker.url for worker in workers]
    workers[0].info["max_req_input_len"] = 100

    async def main(engine):
        assert await engine.values(TRACES, "7/0") == expected(TRACES)
        assert set(engine.describe()["servers"]) == set(router.workers)
        assert engine.context_length == 104

    with_engine(model, [router], main)
    (body,) = router.bodies
    assert body["input"] == TRACES and router.keys == ["7/0"]
    assert [worker.known for worker in workers] == [1, 1], "each server behind it is to be asked for the known values"


def test_what_would_kill_or_hang_a_server_is_never_sent(model, servers):
    server = servers(max_req_input_len=5000, max_total_num_tokens=600)

    async def main(engine):
        assert engine.context_length == 598, "a longer one than the pool less two would wait for ever"
        for trace, message in (
            ([], "empty"),
            ([1, VALUE_VOCABULARY], "token id 264 is outside"),
            ([-1], "token id -1 is outside"),
            ([1] * 599, "599 tokens is longer than the 598"),
        ):
            with pytest.raises(ValueError, match=message):
                await engine.values([[1], trace], "g")
        assert not server.bodies
        assert await engine.values([[1] * 598], "g") == expected([[1] * 598])

    with_engine(model, [server], main)


def test_the_pool_is_that_of_all_servers(model, servers):
    one, two = servers(max_total_num_tokens=1000), servers(max_total_num_tokens=700)
    engine = new_engine(model, one, two)
    assert engine.pool_tokens == 1700
    told = json.loads(json.dumps(engine.describe()))
    assert (told["name"], told["kv_pool_tokens"], told["urls"]) == ("sglang-server", 1700, [one.url, two.url])
    assert told["servers"][two.url]["prefix_cache"] is True


# Errors of servers


def scripted(*answers):
    """One answer after the other, then the model's."""
    left = list(answers)
    return lambda body: left.pop(0) if left else None


ABORT = {"meta_info": {"finish_reason": {"type": "abort", "message": "by hand"}}}


@pytest.mark.parametrize(
    "answer",
    [
        (500, "Internal Server Error"),
        (502, {"error": {"message": "bad gateway"}}),
        (200, [reply_of([0.0, 1.0, 0.0, 2.0]), ABORT, ABORT]),
        (200, [reply_of([0.0, 1.0, 0.0, 2.0]) | ABORT] * 3),  # of the chunk before
        (200, [reply_of([0.0, 1.0, 0.0, 2.0])]),
        (200, "not JSON"),
        (200, {"text": "of a generator"}),
    ],
)
def test_what_may_pass_is_tried_again(model, servers, answer):
    server = servers(script=scripted(answer, answer))
    assert with_engine(model, [server], lambda e: e.values(TRACES, "g")) == expected(TRACES)
    assert len(server.bodies) == 3
    assert len({rid for body in server.bodies for rid in body["rid"]}) == 9, "an id that is still known is an error"


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((500, "Internal Server Error"), r"failed 3 times .*500: Internal Server Error \(values .* NaN"),
        ((200, [ABORT] * 3), "failed 3 times .*it was aborted: by hand"),
        ((400, {"error": {"message": "too long"}}), r"refused a request \(400\): too long"),
        ((200, [reply_of([0.0] * 32)] * 3), "has 32 numbers, and a value model of 3 labels writes 4"),
    ],
)
def test_what_does_not_pass_is_one_line_and_the_next_request_is_answered(model, servers, answer, message):
    failing = True
    server = servers(script=lambda body: answer if failing else None)

    async def main(engine):
        nonlocal failing
        with pytest.raises(EngineError, match=message) as error:
            await engine.values(TRACES, "g")
        assert "\n" not in str(error.value)
        failing = False
        assert await engine.values(TRACES, "g") == expected(TRACES)

    with_engine(model, [server], main)


def test_a_value_that_is_no_number_is_told_at_once_through_a_router(model, servers):
    worker, router = (
        servers(),
        servers(script=lambda body: (200, {"data": [reply_of([None, 0.0, 0.0, 1.0]) | {"index": 0}]})),
    )
    router.workers = [worker.url]
    with pytest.raises(EngineError, match=r"gave \[nan, 0.0, 0.0\], which are no numbers"):
        with_engine(model, [router], lambda e: e.values([[1]], "g"))
    assert len(router.bodies) == 1


# Servers that go and come


def test_groups_spread_stay_and_move_only_from_a_lost_server(model, servers):
    two = servers(2)

    def homes():
        return [{body["input_ids"][0][0] for body in server.bodies} for server in two]

    async def main(engine):
        async def rounds():
            for server in two:
                server.bodies.clear()
            for _ in range(2):
                for group in range(6):
                    assert await engine.values([[group, 5]], f"{group}") == expected([[group, 5]])
            return homes()

        before = await rounds()
        assert list(map(len, before)) == [3, 3] and not before[0] & before[1]
        two[0].kill()
        lost = asyncio.create_task(engine.values([[min(before[0])]], f"{min(before[0])}"))
        assert await lost == expected([[min(before[0])]])
        assert (await rounds())[1] == set(range(6))
        two[0].start_again()
        await until(lambda: engine.servers[0].up)
        assert await rounds() == [set(), set(range(6))]  # to move back would be to read them again
        for group in (6, 7, 8):
            await engine.values([[group]], f"{group}")
        assert homes()[0] == {6, 7, 8}

    with_engine(model, two, main)


PARENTS = [[1, 2], [1, 2, 3]]
ROUND = [[1, 2, 9], [1, 2, 3, 8], [1, 2, 3, 7]]


def test_prefixes_go_first_alone_where_the_groups_server_is_another_or_was_lost(model, servers):
    """Requests that arrive together do not share what none of them has been computed of."""
    two = servers(2)
    anew = [[PARENTS[0]], [PARENTS[1]], ROUND]
    first = Valued(expected(ROUND)[0].value, 3 + 2 + 3)

    async def main(engine):
        async def sent(server):
            server.bodies.clear()
            valued = await engine.values(ROUND, "g", PARENTS)
            assert valued[1:] == expected(ROUND)[1:]
            assert valued[0] == (first if len(server.bodies) > 1 else expected(ROUND)[0])
            return [body["input_ids"] for body in server.bodies]

        await engine.values([PARENTS[0]], "g")
        home, other = two if two[0].bodies else two[::-1]
        assert await sent(home) == [ROUND], "they are cached"
        home.kill()
        assert await sent(other) == anew
        assert await sent(other) == [ROUND]
        home.start_again()
        await until(lambda: all(server.up for server in engine.servers))
        assert await sent(other) == [ROUND]
        engine._lose(engine.servers[two.index(other)], "for a moment")
        await until(lambda: all(server.up for server in engine.servers))
        assert await sent(other) == anew
        assert await sent(other) == [ROUND]
        with pytest.raises(ValueError, match="token id 264 is outside"):
            await engine.values(ROUND, "g", [[VALUE_VOCABULARY]])

    with_engine(model, two, main)


def test_prefixes_of_a_group_that_is_new_or_forgotten_go_first(model, servers, monkeypatch):
    monkeypatch.setattr(sglang_value_remote, "REMEMBERED", 2)
    server = servers()

    async def main(engine):
        for group, posts in (("a", 3), ("b", 3), ("a", 1), ("c", 3), ("a", 1), ("b", 3)):
            server.bodies.clear()
            await engine.values(ROUND, group, PARENTS)
            assert len(server.bodies) == posts, group

    with_engine(model, [server], main)


def test_all_gone_is_one_line_in_time_that_names_them(model, servers):
    two = servers(2, seconds=30)

    async def main(engine):
        running = [asyncio.create_task(engine.values([[i]], f"{i}")) for i in range(4)]
        await until(lambda: two[0].bodies and two[1].bodies)
        begin = time.monotonic()
        for server in two:
            server.kill()
        for task in running:
            with pytest.raises(EngineError, match=r"out of reach for 0.3 s .*the value servers \(--value_url\)$"):
                await task
        assert time.monotonic() - begin < 5

    with_engine(model, two, main, patience=replace(QUICK, reconnect_s=0.3))


def test_the_time_limit_aborts_every_request_of_the_batch(model, servers):
    server = servers(seconds=5)

    async def main(engine):
        with pytest.raises(EngineError, match="no value server valued 3 traces within --request_timeout 0.4 s"):
            await engine.values(TRACES, "g")
        await engine.close()
        assert sorted(server.aborted) == sorted(server.bodies[0]["rid"])

    with_engine(model, [server], main, request_timeout_s=0.4)


def test_a_server_that_comes_back_with_another_value_model_is_not_used(model, servers):
    one, two = servers(2)

    async def main(engine):
        assert await engine.values(TRACES, "g") == expected(TRACES)
        one.kill()
        one.row = lambda ids: [0.0, 3.0, 0.0, 1.0]
        assert await engine.values(TRACES, "g") == expected(TRACES)
        one.start_again()
        await until(lambda: "serve different value models" in engine.servers[0].why)
        assert not engine.servers[0].up
        assert await engine.values(TRACES, "g") == expected(TRACES)

    with_engine(model, [one, two], main)


# The start


@pytest.mark.parametrize(
    ("info", "message"),
    [
        (
            {"is_generation": True, "architectures": ["Qwen2ForCausalLM"]},
            "a Qwen2ForCausalLM that writes text; .* is a Qwen2",
        ),
        (
            {"architectures": ["Qwen2ForCausalLM"]},
            "a Qwen2ForCausalLM that embeds; .* start one with `python -m engine_lib.v",
        ),
        ({"is_generation": True}, "that writes text"),
        ({"dtype": "bfloat16"}, "computes in bfloat16, and --value_dtype is fp32; start it with --dtype float32"),
        ({"dtype": "auto"}, "computes in auto"),
        ({"row": lambda ids: [0.1] * 32}, "has 32 numbers, and .* engine_lib.sglang_value_model failed to load"),
        ({"row": lambda ids: [0.1, 1.0]}, "has 2 numbers"),
    ],
)
def test_what_is_no_server_of_this_value_model_is_refused(model, servers, info, message):
    server = servers(**info)
    with pytest.raises(UserError, match=message) as error:
        new_engine(model, server)
    assert f"--value_url {server.url}" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("routed", [False, True])
def test_another_vocabulary_is_refused_wherever_the_servers_folder_lies(model, servers, routed):
    """It takes the ids of the known sequence; a greater one would end it in the middle of the run."""
    server = servers(vocabulary=200)
    router = servers() if routed else server
    if routed:
        router.workers = [server.url]
    message = f"^--value_url {server.url} serves the-value-model with a vocabulary of 200; .* has 264: give the server"
    with pytest.raises(UserError, match=message):
        new_engine(model, router)


def test_a_checkpoint_that_can_be_seen_is_compared_by_its_config(model, servers, value_folder, tmp_path):
    import tiny

    served = tiny.save_value_model(tmp_path / "served", tokenizer=False, num_labels=1)
    with pytest.raises(UserError, match=f"serves {served} with 1 labels; --classifier_ckpt_path .* has 3"):
        new_engine(model, servers(model_path=str(served)))
    new_engine(model, servers(model_path=str(value_folder)))


def test_too_few_searches_are_told_of_value_servers_and_ranks_are_none(model, servers, caplog):
    two = servers(2, dp_size=4)
    new_engine(model, *two, groups_at_once=16)
    assert "at once" not in caplog.text
    new_engine(model, *two, groups_at_once=15)
    assert "value model: 15 at once for 2 value servers are 7.5 each" in caplog.text


def test_two_servers_of_two_value_models_are_refused(model, servers):
    one, two = servers(), servers(row=lambda ids: [0.0, 0.2, 0.0, 1.0])
    with pytest.raises(UserError, match=r"--value_url .* and .* serve different value models: 0\.\d{6} and 0\.\d{6}"):
        new_engine(model, one, two)


def test_a_generator_server_of_the_fake_kind_is_refused(model, servers):
    with pytest.raises(UserError, match="serves the-model, a Qwen2ForCausalLM that writes text"):
        new_engine(model, servers(kind=FakeServer))


def test_nobody_answers_names_the_flag(model):
    with pytest.raises(
        EngineError, match=r"no SGLang server answers .*start a value server, or give the right --value_url"
    ):
        new_engine(model, "http://127.0.0.1:9")


@pytest.mark.parametrize(
    ("info", "said"),
    [({"disable_radix_cache": True}, "reads every trace whole"), ({"dp_size": 2}, "2 data-parallel ranks")],
)
def test_what_costs_tokens_is_said(model, servers, info, said, caplog):
    caplog.set_level(logging.WARNING)
    server = servers(**info)

    async def main(engine):
        assert engine._places_of(engine.servers[0]) == [(engine.servers[0], None)], "a rank cannot be named"
        assert await engine.values(TRACES, "g") == expected(TRACES)

    with_engine(model, [server], main)
    assert caplog.text.count(said) == 1
