"""Several servers over HTTP, against small fake ones: which gets a request, and what happens when one fails."""

import asyncio
import json
import socket
import threading
import time
from dataclasses import replace

import fake_sglang
import pytest
from fake_sglang import FakeServer, block, fake_servers, run_with, urls_of

from common_lib.cli import UserError
from engine_lib.base import EngineConfig, EngineError, Reply, Request
from engine_lib.retry import RetryPolicy
from engine_lib.seeded import logit_processor
from engine_lib.sglang_remote import Patience, SGLangServerEngine
from engine_lib.sglang_wire import sampling_params

QUICK = Patience(
    retry=RetryPolicy(attempts=5, pause_s=0.0), look_again_s=0.02, look_again_most_s=0.05, probe_every_s=0.05
)  # fmt: skip


@pytest.fixture
def model(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["Qwen2ForCausalLM"]}))
    return EngineConfig(model_path=str(tmp_path), vocab_size=256, request_timeout_s=20.0)


@pytest.fixture
def servers():
    with fake_servers(FakeServer) as make:
        yield make


def new_engine(model, *servers, patience=QUICK, **settings):
    return SGLangServerEngine(replace(model, sglang_urls=urls_of(servers), **settings), patience)


def with_engine(model, servers, main, **settings):
    return run_with(new_engine(model, *servers, **settings), main)


def some_requests(count: int, groups: int = 1000, new: int = 5) -> list[Request]:
    return [Request([i % 200, 3], new, group=f"group {i % groups}") for i in range(count)]


def expected(requests) -> list[Reply]:
    return [Reply(block(r.prompt_ids, r.max_new_tokens), "length", len(r.prompt_ids), 1) for r in requests]


async def until(condition) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


# What is sent


def test_replies_come_in_the_order_of_the_requests(model, servers):
    two = servers(2)
    requests = some_requests(40)
    assert with_engine(model, two, lambda e: e.generate(requests)) == expected(requests)
    assert all(server.bodies for server in two)


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_request_says_all_it_means(model, servers, deterministic):
    server = servers(enable_deterministic_inference=True)
    requests = [
        Request([1, 2], 7, temperature=0.6, top_p=0.95, stop_ids=(4, 5), seed=11, group="3/1"),
        Request([9], 2, temperature=0),
    ]

    async def main(engine):
        for request in requests:
            await engine.generate([request])

    with_engine(model, [server], main, deterministic=deterministic)
    first, second = server.bodies
    seed = {"sampling_seed": 11} if deterministic else {}
    assert first["input_ids"] == [1, 2]
    assert first["sampling_params"] == seed | {
        "max_new_tokens": 7, "temperature": 0.6, "top_p": 0.95, "ignore_eos": False, "stop_token_ids": [4, 5],
    }  # fmt: skip
    assert second["sampling_params"]["ignore_eos"] is True  # no stop ids: nothing may stop it
    assert server.keys == ["3/1", None]


@pytest.mark.parametrize("seeded", [False, True])
def test_seeds_go_with_the_sampler_that_draws_by_them(seeded, model, servers):
    server = servers(enable_custom_logit_processor=True)
    request = Request([1, 2], 7, temperature=0.6, seed=11)
    with_engine(model, [server], lambda engine: engine.generate([request]), seeded=seeded)
    *asked_at_the_start, body = server.bodies
    assert len(asked_at_the_start) == 2 * seeded
    assert body["sampling_params"] == sampling_params(request, False, seeded)
    assert body.get("custom_logit_processor") == (logit_processor() if seeded else None)


def test_bad_requests_are_never_sent(model, servers):
    server = servers()
    for request, message in (
        (Request([], 1), "empty prompt"),
        (Request([256], 1), "token id 256"),
        (Request([1], 2046), "longer than"),  # 2047 of 2046: SGLang would cut it short
    ):
        with pytest.raises(ValueError, match=message):
            with_engine(model, [server], lambda e, r=request: e.generate([r]))
    assert not server.bodies


# Which server


def test_a_group_stays_with_one_server_and_groups_spread(model, servers):
    three = servers(3)

    async def main(engine):
        for _ in range(3):
            for request in some_requests(30, groups=30):
                await engine.generate([request])

    with_engine(model, three, main)
    homes = [{body["input_ids"][0] for body in server.bodies} for server in three]
    assert sum(map(len, homes)) == 30, "a group has been on two servers"
    assert min(map(len, homes)) >= 3


def homes_of(servers) -> list[set[int]]:
    """First tokens of what each was asked: `some_requests` writes the group's number there."""
    return [{body["input_ids"][0] for body in server.bodies} for server in servers]


def test_requests_of_a_group_at_once_are_on_one_server_and_groups_are_dealt_out(model, servers):
    three = servers(3, seconds=0.1)
    with_engine(model, three, lambda e: e.generate(some_requests(36, groups=9) * 2))
    groups = [{first % 9 for first in firsts} for firsts in homes_of(three)]
    assert [len(mine) for mine in groups] == [3, 3, 3]
    assert set.union(*groups) == set(range(9))


def test_a_lost_server_moves_only_its_own_groups_and_gets_some_back(model, servers):
    three = servers(3)
    requests = some_requests(12)

    async def main(engine):
        async def look():
            for server in three:
                server.bodies.clear()
            assert await engine.generate(requests) == expected(requests)
            return homes_of(three)

        before = await look()
        assert list(map(len, before)) == [4, 4, 4]
        engine._lose(engine.servers[0], "for a test")
        without = await look()
        assert not without[0] and without[1] > before[1] and without[2] > before[2]
        await until(lambda: engine.servers[0].up)
        assert list(map(len, await look())) == [2, 5, 5], "six were too many for one, five are within the bound"

    with_engine(model, three, main)


def test_each_rank_of_a_data_parallel_server_is_a_place_of_its_own(model, servers):
    """A server left to itself would go from rank to rank."""
    one, two = servers(dp_size=2), servers()
    requests = some_requests(9, groups=9)

    async def main(engine):
        for _ in range(3):
            for request in requests:
                await engine.generate([request])

    with_engine(model, [one, two], main)
    ranks = {}
    for body in one.bodies:
        ranks.setdefault(body["routed_dp_rank"], set()).add(body["input_ids"][0])
    assert sorted(ranks) == [0, 1] and not ranks[0] & ranks[1]
    assert len(two.bodies) == 9 and all("routed_dp_rank" not in body for body in two.bodies)


@pytest.mark.parametrize(("groups", "said"), [(23, True), (24, False), (0, False)])
def test_few_searches_for_many_servers_are_said(model, servers, groups, said, caplog):
    """Behind a router too, and each data-parallel rank is one."""
    router = servers()
    router.workers = [servers(dp_size=2).url, servers().url]
    new_engine(model, router, groups_at_once=groups)
    assert ("for 3 servers or data-parallel ranks" in caplog.text) is said


# Connections


def test_connections_are_kept_alive_and_used_again(model, servers):
    """By TCP: what stands between would forget one that is silent for minutes. httpx closes all idle connections where
    there are more than its bound, busy ones counted."""
    server = servers(seconds=0.3)
    requests = some_requests(80)

    async def main(engine):
        for _ in range(2):
            await engine.generate(requests)
        response = await engine._client.get(f"{server.url}/health")
        connected = response.extensions["network_stream"].get_extra_info("socket")
        return connected.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)

    quiet = replace(QUICK, probe_every_s=60)  # a probe beside 80 requests has a connection of its own
    assert with_engine(model, [server], main, patience=quiet) != 0
    assert server.accepted <= 82, "80, and what was asked at the start"


# Servers that go and come


def test_a_lost_servers_requests_go_to_the_others_and_it_is_used_again(model, servers, caplog):
    one, two = servers(2)
    one.seconds = two.seconds = 0.3
    requests = some_requests(60)

    async def main(engine):
        running = asyncio.create_task(engine.generate(requests))
        await until(lambda: one.bodies and two.bodies)
        one.kill()
        assert await running == expected(requests)
        count, two.seconds = len(one.bodies), 0.0
        one.seconds = 0.0
        one.start_again()
        await until(lambda: engine.servers[0].up)
        assert await engine.generate(requests) == expected(requests)
        assert len(one.bodies) > count

    with_engine(model, [one, two], main)
    assert f"lost {one.url}" in caplog.text
    assert f"{one.url} is back" in caplog.text


def test_the_only_server_may_be_gone_for_a_while(model, servers):
    server = servers()
    requests = some_requests(8)

    async def main(engine):
        await engine.generate(requests)
        server.kill()
        running = asyncio.create_task(engine.generate(requests))
        await until(lambda: not engine.servers[0].up)
        server.start_again()
        assert await running == expected(requests)

    with_engine(model, [server], main)


def test_all_servers_gone_is_one_line_in_time(model, servers):
    two = servers(2)

    async def main(engine):
        for server in two:
            server.seconds = 30
        running = asyncio.create_task(engine.generate(some_requests(8)))
        await until(lambda: all(server.bodies for server in two))
        for server in two:
            server.kill()
        begin = time.monotonic()
        with pytest.raises(
            EngineError, match=r"all SGLang servers have been out of reach for 0.2 s \(http.*; http.*\)"
        ) as error:
            await running
        assert 0.2 <= time.monotonic() - begin < 5
        assert "\n" not in str(error.value)

    with_engine(model, two, main, patience=replace(QUICK, reconnect_s=0.2))


def test_a_server_that_hangs_is_given_up(model, servers):
    hung, other = servers(2)
    release = threading.Event()
    hung.script = lambda body: release.wait(30) and None
    requests = some_requests(20)

    async def main(engine):
        running = asyncio.create_task(engine.generate(requests))
        await until(lambda: hung.bodies)
        hung.healthy = False
        assert await running == expected(requests)
        assert len(other.bodies) == 20

    with_engine(model, [hung, other], main)
    release.set()


def test_a_server_that_comes_back_with_another_model_is_not_used(model, servers):
    one, two = servers(2)

    async def main(engine):
        await engine.generate(some_requests(10))
        one.kill()
        await engine.generate(some_requests(10))
        one.info["architectures"] = ["LlamaForCausalLM"]
        one.start_again()
        await until(lambda: "LlamaForCausalLM" in engine.servers[0].why)
        assert not engine.servers[0].up
        assert await engine.generate(some_requests(10)) == expected(some_requests(10))
        assert len(two.bodies) >= 20

    with_engine(model, [one, two], main)


def test_a_router_is_asked_for_its_servers(model, servers):
    workers, router = servers(2), servers()
    router.workers = [worker.url for worker in workers]
    workers[1].info["max_req_input_len"] = 1000

    async def main(engine):
        assert engine.context_length == 1004
        assert set(engine.describe()["servers"]) == set(router.workers)
        assert await engine.generate(some_requests(4)) == expected(some_requests(4))

    with_engine(model, [router], main)
    router.workers = []
    with pytest.raises(EngineError, match="the router has no healthy server"):
        new_engine(model, router)


# Errors of servers


def scripted(*answers):
    """One answer after the other, then the model's."""
    left = list(answers)
    return lambda body: left.pop(0) if left else None


@pytest.mark.parametrize(
    "answer",
    [
        (500, {"error": {"message": "out of memory"}}),
        (502, "bad gateway"),
        (429, {"detail": "slow down"}),
        (200, "not JSON"),
        (200, {"text": "no ids"}),
        (200, ["a list"]),
        (200, {"output_ids": None, "meta_info": {"finish_reason": {"type": "length"}, "prompt_tokens": 1}}),
    ],
)
def test_what_may_pass_is_tried_again(model, servers, answer):
    server = servers(script=scripted(answer, answer))
    requests = some_requests(1)
    assert with_engine(model, [server], lambda e: e.generate(requests)) == expected(requests)
    assert len(server.bodies) == 3


def test_a_server_that_always_fails_is_told(model, servers):
    server = servers(script=lambda body: (500, {"error": {"message": "out of memory"}}))
    with pytest.raises(EngineError, match=r"failed 5 times.*out of memory"):
        with_engine(model, [server], lambda e: e.generate(some_requests(1)))
    assert len(server.bodies) == 5


def test_a_starting_server_is_waited_for(model, servers):
    server = servers(script=scripted((503, "starting")))
    requests = some_requests(1)
    assert with_engine(model, [server], lambda e: e.generate(requests)) == expected(requests)


def test_a_router_that_is_well_but_has_no_servers_is_given_up_in_time(model, servers):
    server = servers(script=lambda body: (503, {"error": {"message": "No available workers"}}))

    async def main(engine):
        with pytest.raises(EngineError, match=r"out of reach for 2 s .*No available workers"):
            await engine.generate(some_requests(3))
        assert engine.servers[0].look_again_s == QUICK.look_again_most_s, "it is to be asked ever more rarely"

    with_engine(model, [server], main, patience=replace(QUICK, reconnect_s=2.0))


def test_a_try_that_lasted_shows_that_the_server_was_well(model, servers):
    """Each is lost after a while: the time without servers starts anew."""
    answers = [(503, "lost")] * 5
    server = servers(script=lambda body: time.sleep(0.25) or (answers.pop() if answers else None))
    requests = some_requests(1)
    patience = replace(QUICK, reconnect_s=1.0, lasting_s=0.05)
    assert with_engine(model, [server], lambda e: e.generate(requests), patience=patience) == expected(requests)


@pytest.mark.parametrize("status", [400, 401, 404, 422])
def test_a_refused_request_is_not_sent_again(model, servers, status):
    server = servers(script=lambda body: (status, {"error": {"message": "no such parameter"}}))
    with pytest.raises(EngineError, match=rf"refused a request \({status}\): no such parameter"):
        with_engine(model, [server], lambda e: e.generate(some_requests(1)))
    assert len(server.bodies) == 1


def test_an_aborted_request_is_a_reply(model, servers):
    def abort(body):
        meta = {"finish_reason": {"type": "abort", "message": "by hand"}, "prompt_tokens": 2, "cached_tokens": None}
        return 200, {"output_ids": [4, 5], "meta_info": meta}

    server = servers(script=abort)
    assert with_engine(model, [server], lambda e: e.generate(some_requests(1))) == [Reply([4, 5], "abort", 2, 0)]


def test_a_stop_token_that_was_not_asked_for_is_told(model, servers):
    def stop(body):
        meta = {"finish_reason": {"type": "stop", "matched": 9}, "prompt_tokens": 2, "cached_tokens": 0}
        return 200, {"output_ids": [4, 9], "meta_info": meta}

    server = servers(script=stop)
    (reply,) = with_engine(model, [server], lambda e: e.generate([Request([1, 2], 5, stop_ids=(8, 9))]))
    assert reply == Reply([4, 9], "stop", 2, 0)
    with pytest.raises(EngineError, match="token 9, which is not among the stop tokens"):
        with_engine(model, [server], lambda e: e.generate([Request([1, 2], 5, stop_ids=(8,))]))


# Ends


def test_the_time_limit_of_a_request(model, servers):
    server = servers()
    server.seconds = 5

    async def main(engine):
        begin = time.monotonic()
        with pytest.raises(EngineError, match=r"wrote 5 tokens within --request_timeout 0.5 s"):
            await engine.generate(some_requests(3))
        assert time.monotonic() - begin < 3
        await engine.close()
        assert sorted(server.aborted) == sorted(body["rid"] for body in server.bodies)

    with_engine(model, [server], main, request_timeout_s=0.5)


@pytest.mark.parametrize("how", ["cancel", "close"])
def test_what_still_runs_is_aborted(model, servers, how):
    server = servers()
    server.seconds = 5

    async def main(engine):
        running = asyncio.create_task(engine.generate(some_requests(3)))
        await until(lambda: len(server.bodies) == 3)
        if how == "cancel":
            running.cancel()
        else:
            await engine.close()
        with pytest.raises(asyncio.CancelledError if how == "cancel" else EngineError):
            await running
        await engine.close()
        assert sorted(server.aborted) == sorted(body["rid"] for body in server.bodies)
        await engine.close()
        with pytest.raises(EngineError, match="closed"):
            await engine.generate(some_requests(1))

    with_engine(model, [server], main)


def test_what_waits_for_a_lost_server_ends_as_well(model, servers):
    server = servers()

    async def main(engine):
        server.kill()
        running = asyncio.create_task(engine.generate(some_requests(3)))
        await until(lambda: not engine.servers[0].up)
        await engine.close()
        with pytest.raises(EngineError, match="has been closed"):
            async with asyncio.timeout(5):
                await running

    with_engine(model, [server], main)


def test_it_ends_also_in_the_moment_in_which_a_server_is_lost(model, servers):
    """asyncio.wait_for would forget that its task is cancelled (Python 3.11)."""

    async def main(engine):
        await engine.generate(some_requests(1))
        await asyncio.sleep(0)
        engine.servers[0].lost.set()
        async with asyncio.timeout(5):
            await engine.close()

    with_engine(model, [servers()], main, patience=replace(QUICK, probe_every_s=60))


# The start


def test_nobody_answers(model):
    with pytest.raises(EngineError, match=r"no SGLang server answers \(http://127.0.0.1:9: "):
        new_engine(model, "http://127.0.0.1:9")


def test_one_of_two_answers(model, servers, caplog):
    server = servers()
    requests = some_requests(5)
    assert with_engine(model, ["http://127.0.0.1:9", server], lambda e: e.generate(requests)) == expected(requests)
    assert "http://127.0.0.1:9 does not answer" in caplog.text


def test_another_model_is_refused(model, servers, caplog):
    with pytest.raises(
        UserError, match=r"serves the-model, a LlamaForCausalLM; --piref_model .* is a Qwen2ForCausalLM"
    ):
        new_engine(model, servers(architectures=["LlamaForCausalLM"]))
    new_engine(model, servers())
    assert "only you know that they are the same" in caplog.text


def test_the_same_model_by_another_name(model, servers, caplog, tmp_path):
    cached = tmp_path / "models--owner--name" / "snapshots" / "abc"
    cached.mkdir(parents=True)
    (cached / "config.json").write_text("{}")
    (tmp_path / "link").symlink_to(cached)
    for path, served in ((cached, "owner/name"), (cached, str(tmp_path / "link")), (cached, str(cached))):
        new_engine(replace(model, model_path=str(path)), servers(model_path=served))
    assert "only you know" not in caplog.text


def test_deterministic_needs_servers_that_are(model, servers):
    with pytest.raises(UserError, match="start it with --enable-deterministic-inference"):
        new_engine(model, servers(), deterministic=True)


def test_another_kind_of_server_is_told(model, servers):
    server = servers(max_req_input_len=None)
    with pytest.raises(EngineError, match="does not answer as an SGLang server does"):
        new_engine(model, server)
    for status, message in ((404, "does not answer as an SGLang server does"), (401, "/server_info says 401")):
        with pytest.raises(EngineError, match=message):
            new_engine(model, servers(pages=status))


def test_it_can_be_made_where_a_loop_runs_already(model, servers):
    server = servers()

    async def notebook():
        engine = new_engine(model, server)
        assert await engine.generate(some_requests(2)) == expected(some_requests(2))
        await engine.close()

    asyncio.run(notebook())


def test_the_fake_server_writes_what_the_tests_expect():
    body = {"input_ids": [1, 2], "sampling_params": {"max_new_tokens": 3}}
    assert fake_sglang.generated(body)["output_ids"] == [3, 10, 17]
