"""The HTTP client of SGLang servers: long requests that live, connections for all of them, and nothing of the world outside."""

import logging
import os
import socket

import httpx

logger = logging.getLogger(__name__)

# A request may wait an hour for its first byte. What stands between forgets connections that are silent for some minutes
# (350 s and less in clouds), without a word to either end; a peer that is gone is noticed after 60 + 4 x 15 s.
KEEP_ALIVE = {"TCP_KEEPIDLE": 60, "TCP_KEEPALIVE": 60, "TCP_KEEPINTVL": 15, "TCP_KEEPCNT": 4}
POOLS = 64
OTHER_FILES = 256  # that a run may have open besides: models, outputs, pipes of its processes


def keep_alive_options() -> list[tuple[int, int, int]]:
    """What is set on every connection; macOS calls the first TCP_KEEPALIVE, and no system has all four names."""
    times = [
        (socket.IPPROTO_TCP, getattr(socket, name), value)
        for name, value in KEEP_ALIVE.items()
        if hasattr(socket, name)
    ]
    return [(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1), *times]


def authorization() -> dict[str, str]:
    """With the key that the servers were started with (`--api-key`), where they were."""
    key = os.environ.get("SGLANG_API_KEY")
    return {"Authorization": f"Bearer {key}"} if key else {}


def make_client() -> httpx.AsyncClient:
    """With a connection for each request that runs, kept for the next one, whatever the number of servers."""
    return httpx.AsyncClient(
        headers=authorization(),
        trust_env=False,  # proxies are for the world outside; these are machines of ours
        timeout=httpx.Timeout(None, connect=10.0),
        transport=ManyPools(),
    )


class ManyPools(httpx.AsyncBaseTransport):
    """Requests to the least busy of POOLS connection pools: one pool looks at all its connections at each request, so that 3,000 at
    once cost it a minute of computing, and it closes every idle one where there are more than its bound in all."""

    def __init__(self) -> None:
        # The servers close idle connections after 5 s; one that is being closed must not be used.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=3.0)
        certificates = httpx.create_ssl_context(trust_env=False)  # read once for all
        self.pools = [
            httpx.AsyncHTTPTransport(certificates, trust_env=False, limits=limits, socket_options=keep_alive_options())
            for _ in range(POOLS)
        ]
        self._busy = [0] * POOLS

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        least = min(range(POOLS), key=self._busy.__getitem__)
        self._busy[least] += 1
        try:
            return await self.pools[least].handle_async_request(request)
        finally:
            self._busy[least] -= 1

    async def aclose(self) -> None:
        for pool in self.pools:
            await pool.aclose()


def allow_open_files(connections: int) -> None:
    """Many systems let a process have 1,024 files open, connections among them, unless it asks for more: it does."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + OTHER_FILES
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    if allowed < wanted:
        logger.warning(
            "engine: %d requests at once need as many connections, and this system allows %d open files (ulimit -Hn); give a "
            "smaller --batch_size", connections, allowed,
        )  # fmt: skip
