"""The HTTP client of servers: what is set on its connections, and how many there may be."""

import asyncio
import resource
import socket
import sys
from types import SimpleNamespace

import pytest

from engine_lib import http_client
from engine_lib.http_client import allow_open_files, keep_alive_options, make_client


async def serve(reader, writer):
    """An HTTP server that says what it was asked."""
    asked = await reader.readuntil(b"\r\n\r\n")
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(asked), asked))
    await reader.read()  # until the client leaves
    writer.close()


def connect(look):
    """`look(response, socket)` of a request by the client to a server on this machine."""

    async def main():
        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server, make_client() as client:
            response = await client.get(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/page")
            return look(response, response.extensions["network_stream"].get_extra_info("socket"))

    return asyncio.run(main())


def test_a_connection_that_is_silent_is_kept_alive():
    """Within 350 s, after which clouds forget it, and one whose peer is gone is noticed within minutes."""
    idle = socket.TCP_KEEPIDLE if hasattr(socket, "TCP_KEEPIDLE") else socket.TCP_KEEPALIVE
    names = (idle, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT, socket.TCP_NODELAY)

    def look(_, connected):
        on = connected.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        return on, *(connected.getsockopt(socket.IPPROTO_TCP, name) for name in names)

    on, first, every, count, no_delay = connect(look)
    assert on and no_delay
    assert 10 <= first < 300
    assert first + every * count < 600


def test_no_pool_holds_many_connections():
    """Each looks at all that it has at every request: 256 requests at once took 2 s of computing, 1,024 took 14 s."""
    busy = most = 0

    async def slow(reader, writer):
        nonlocal busy, most
        busy, most = busy + 1, max(most, busy + 1)
        await asyncio.sleep(0.5)
        busy -= 1
        await serve(reader, writer)

    async def main():
        async with await asyncio.start_server(slow, "127.0.0.1", 0, backlog=256) as server, make_client() as client:
            url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            await asyncio.gather(*(client.get(url) for _ in range(192)))
            return [len(pool._pool.connections) for pool in client._transport.pools]

    assert max(asyncio.run(main())) <= 3
    assert most > 100, "they are to run side by side"


def test_systems_that_have_other_names_or_none(monkeypatch):
    names = ("SOL_SOCKET", "SO_KEEPALIVE", "IPPROTO_TCP")
    have = {name: getattr(socket, name) for name in names}
    monkeypatch.setattr(http_client, "socket", SimpleNamespace(**have, TCP_KEEPALIVE=16, TCP_KEEPINTVL=257))
    always = (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    assert keep_alive_options() == [always, (socket.IPPROTO_TCP, 16, 60), (socket.IPPROTO_TCP, 257, 15)]
    monkeypatch.setattr(http_client, "socket", SimpleNamespace(**have))
    assert keep_alive_options() == [always]


def test_the_key_is_sent_and_proxies_are_not_asked(monkeypatch):
    """A transport of one's own is where httpx could lose either."""
    monkeypatch.setenv("SGLANG_API_KEY", "the-key")
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    asked = connect(lambda response, _: response.text)
    assert asked.startswith("GET /page HTTP/1.1") and "Authorization: Bearer the-key" in asked


@pytest.mark.parametrize(
    ("soft", "hard", "connections", "becomes", "said"),
    [
        (1024, 1 << 20, 14336, 14592, False),
        (1024, 4096, 14336, 4096, True),
        (1024, resource.RLIM_INFINITY, 14336, 14592, False),
        (resource.RLIM_INFINITY, resource.RLIM_INFINITY, 14336, None, False),
        (1024, 1024, 256, None, False),
        (65536, 65536, 14336, None, False),
    ],
)
def test_as_many_files_may_be_open_as_there_are_requests(soft, hard, connections, becomes, said, monkeypatch, caplog):
    changed = []
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (soft, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda kind, limits: changed.append((kind, limits)))
    allow_open_files(connections)
    assert changed == ([(resource.RLIMIT_NOFILE, (becomes, hard))] if becomes else [])
    assert ("14336 requests at once need as many connections" in caplog.text) is said


def test_a_system_without_that_limit(monkeypatch):
    monkeypatch.setitem(sys.modules, "resource", None)
    allow_open_files(1 << 20)
