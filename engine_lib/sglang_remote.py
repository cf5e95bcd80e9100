"""SGLang servers, or an sglang-router in front of many, as the generator.

Nothing is scheduled here but the choice of a URL: a search stays with the server whose cache is warm for it, as far as
no server gets much more than its share (sglang_http.choose_server). The servers queue and batch by themselves.

httpx is the client because every installation of this project has it already: huggingface_hub needs it.
"""

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

import httpx

from common_lib.cli import UserError
from engine_lib.base import EngineConfig, EngineError, Reply, Request, check_requests
from engine_lib.sglang_http import (
    RequestFailed,
    ServerInfo,
    ServerLost,
    architectures_of,
    check_url,
    choose_server,
    headers,
    not_sglang,
    read_info,
    read_json,
    read_reply,
    same_model,
    say,
)
from engine_lib.sglang_wire import sampling_params

logger = logging.getLogger(__name__)

MAX_TRIES = 5  # of a request that servers answer with an error of their own; a lost server is not counted
BACKOFF_S, BACKOFF_MOST_S = 0.25, 10.0
PROBE_EVERY_S, PROBE_TIMEOUT_S, PROBES_MISSED = 15.0, 30.0, 3  # of a busy server; /health answers after 1 to 20 s
LASTING_S = 5.0  # a try that ran so long shows that the server was well in between


@dataclass(eq=False)
class Server:
    """One URL: a server, or a router with servers behind it."""

    url: str
    up: bool = True
    why: str = ""  # it is not up
    backoff: float = BACKOFF_S  # until it is looked at again; grows until a request succeeds
    suspect: asyncio.Event = field(default_factory=asyncio.Event)
    tries: set[asyncio.Task] = field(default_factory=set)
    info: dict[str, ServerInfo] = field(default_factory=dict)  # of each server behind this URL

    @property
    def load(self) -> int:
        return len(self.tries)


class SGLangServerEngine:
    """Generation by HTTP `/generate`. A request whose server is lost goes to another; a server that is back is used."""

    name = "sglang-server"

    def __init__(self, config: EngineConfig, *, reconnect_timeout_s: float = 300.0, start_timeout_s: float = 30.0):
        """Ask every server what it runs: it should be `config.model_path`.

        Where all servers are lost, `reconnect_timeout_s` is waited for one to come back, at most `request_timeout_s`.
        Raises UserError for a server of another model, EngineError where none answers.
        """
        self.servers = [Server(url) for url in dict.fromkeys(map(check_url, config.sglang_urls))]
        self.model_path, self.vocab_size = Path(config.model_path), config.vocab_size
        self.deterministic, self.request_timeout_s = config.deterministic, config.request_timeout_s
        self.reconnect_timeout_s = min(reconnect_timeout_s, config.request_timeout_s)
        self._client: httpx.AsyncClient | None = None
        self._watchers: list[asyncio.Task] = []
        self._aborts: set[asyncio.Task] = set()
        self._change = asyncio.Event()
        self._closed = False
        self._told: set[str] = set()
        with ThreadPoolExecutor(1) as thread:  # a notebook has an event loop already
            thread.submit(asyncio.run, self._ask_all(start_timeout_s)).result()
        self.context_length = min(info.longest for server in self.servers for info in server.info.values())

    def describe(self) -> dict[str, object]:
        return {
            "name": self.name,
            "urls": [server.url for server in self.servers],
            "servers": {url: asdict(info) for server in self.servers for url, info in server.info.items()},
            "deterministic": self.deterministic,
            "context_length": self.context_length,
        }

    async def generate(self, requests: Sequence[Request]) -> list[Reply]:
        check_requests(requests, self.context_length, self.vocab_size)
        if self._closed:
            raise EngineError("the SGLang engine has been closed")
        self._start()
        tasks = [asyncio.create_task(self._generate_one(request)) for request in requests]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            await _cancel(tasks)

    async def close(self) -> None:
        """Abort what still runs here; the servers go on for others."""
        if self._closed:
            return
        self._closed = True
        await _cancel([*self._watchers, *(task for server in self.servers for task in server.tries)])
        await asyncio.gather(*self._aborts)
        if self._client is not None:
            await self._client.aclose()

    # -----------------------------------------------------------------------------------------------------------------
    # One request: tried until it is answered. Generation depends on nothing but the request, so any try may be repeated.

    async def _generate_one(self, request: Request) -> Reply:
        try:
            async with asyncio.timeout(self.request_timeout_s):
                return await self._try_until_answered(request)
        except TimeoutError:
            if not any(server.up for server in self.servers):
                raise self._out_of_reach(self.request_timeout_s) from None
            raise EngineError(
                f"no SGLang server wrote {request.max_new_tokens} tokens within --request_timeout "
                f"{self.request_timeout_s:g} s"
            ) from None

    async def _try_until_answered(self, request: Request) -> Reply:
        failures, trouble_since = 0, None
        while True:
            server = await self._choose(request.group, trouble_since or time.monotonic())
            begin = time.monotonic()
            try:
                reply = await self._try(server, request)
                server.backoff = BACKOFF_S
                return reply
            except ServerLost as error:
                self._suspect(server, say(error))
                if trouble_since is None or time.monotonic() - begin > LASTING_S:
                    trouble_since = time.monotonic()
            except RequestFailed as error:
                failures += 1
                if failures == MAX_TRIES:
                    raise EngineError(
                        f"SGLang failed {failures} times on a request, last at {server.url}: {error}"
                    ) from None
                logger.warning("%s failed on a request (%s); trying again", server.url, error)
                await asyncio.sleep(BACKOFF_S * 2**failures)

    async def _choose(self, group: str, since: float) -> Server:
        """A server for a request that has been without one `since`; waits where there is none."""
        deadline = since + self.reconnect_timeout_s
        while time.monotonic() < deadline:
            if up := [server for server in self.servers if server.up]:
                return choose_server(up, group)
            self._change.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._change.wait(), deadline - time.monotonic())
        raise self._out_of_reach(self.reconnect_timeout_s)

    def _out_of_reach(self, seconds: float) -> EngineError:
        reasons = "; ".join(f"{server.url}: {server.why}" for server in self.servers)
        return EngineError(f"all SGLang servers have been out of reach for {seconds:g} s ({reasons})")

    async def _try(self, server: Server, request: Request) -> Reply:
        """One try at one server, as a task of its own that the watcher can end where the server hangs."""
        task = asyncio.create_task(self._post(server, request))
        server.tries.add(task)
        try:
            await asyncio.wait({task})
        finally:
            server.tries.discard(task)
            await _cancel([task])
        if not task.cancelled():
            return task.result()
        if self._closed:
            raise EngineError("the SGLang engine has been closed")
        raise ServerLost(server.why)

    async def _post(self, server: Server, request: Request) -> Reply:
        assert self._client is not None
        rid = uuid.uuid4().hex
        body = {
            "input_ids": request.prompt_ids,
            "sampling_params": sampling_params(request, self.deterministic),
            "rid": rid,
        }
        # The router's `manual` policy keeps requests of one key on one server; a server ignores the header.
        key = {"x-smg-routing-key": request.group} if request.group else {}
        try:
            response = await self._client.post(f"{server.url}/generate", json=body, headers=key)
        except httpx.HTTPError as error:
            raise ServerLost(say(error)) from error
        except asyncio.CancelledError:
            if server.up:  # by a task of its own: this one may be cancelled again
                task = asyncio.create_task(self._abort(server, rid))
                self._aborts.add(task)
                task.add_done_callback(self._aborts.discard)
            raise
        return read_reply(server.url, request, response)

    async def _abort(self, server: Server, rid: str) -> None:
        """Best effort: some seconds later a server aborts by itself what was asked over a closed connection."""
        assert self._client is not None
        with contextlib.suppress(httpx.HTTPError):
            await self._client.post(f"{server.url}/abort_request", json={"rid": rid}, timeout=2.0)

    # -----------------------------------------------------------------------------------------------------------------
    # Which servers are there

    def _start(self) -> None:
        """Client and watchers belong to the running loop, so they are made at the first request."""
        if self._client is None:
            self._client = _make_client(httpx.Timeout(None, connect=10.0))
            self._watchers = [asyncio.create_task(self._watch(server)) for server in self.servers]

    def _suspect(self, server: Server, why: str) -> None:
        """New requests avoid the server until it has been looked at; what runs there may still be answered."""
        if server.up:
            server.up, server.why = False, why
            left = sum(other.up for other in self.servers)
            logger.warning("lost %s (%s); %d of %d servers left", server.url, why, left, len(self.servers))
        server.suspect.set()

    async def _watch(self, server: Server) -> None:
        """Look whether a busy server still lives, and, more and more rarely, whether a lost one is back."""
        assert self._client is not None
        missed = 0
        while True:
            if server.up:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(server.suspect.wait(), PROBE_EVERY_S)
            if not server.up:
                await asyncio.sleep(server.backoff)
                server.backoff = min(2 * server.backoff, BACKOFF_MOST_S)
            server.suspect.clear()
            try:
                if server.up:
                    if server.load:
                        await self._check_health(self._client, server, PROBE_TIMEOUT_S)
                else:
                    await self._ask(self._client, server, PROBE_TIMEOUT_S)
                missed = 0
                if not server.up:
                    server.up = True
                    self._change.set()
                    logger.warning("%s is back", server.url)
            except (ServerLost, EngineError, UserError) as error:
                missed += 1
                server.why = say(error)
                if missed >= PROBES_MISSED:
                    self._suspect(server, f"{missed} health checks failed: {server.why}")
                    await _cancel(list(server.tries))

    async def _ask_all(self, timeout_s: float) -> None:
        """At the start: what every server is. Those that do not answer are left for later, but not all may."""
        async with _make_client(httpx.Timeout(timeout_s)) as client:
            asked = [self._ask(client, server, timeout_s) for server in self.servers]
            outcomes = await asyncio.gather(*asked, return_exceptions=True)
        for server, outcome in zip(self.servers, outcomes, strict=True):
            if isinstance(outcome, ServerLost):
                server.up, server.why = False, say(outcome)
            elif isinstance(outcome, BaseException):
                raise outcome
        lost = [server for server in self.servers if not server.up]
        if len(lost) == len(self.servers):
            reasons = "; ".join(f"{server.url}: {server.why}" for server in lost)
            raise EngineError(f"no SGLang server answers ({reasons}); start one, or give the right --sglang_url")
        for server in lost:
            logger.warning("%s does not answer (%s); it is used once it does", server.url, server.why)

    async def _ask(self, client: httpx.AsyncClient, server: Server, timeout_s: float) -> None:
        """Is it well, and does it, or do the servers behind a router, run the right model?

        Raises ServerLost, UserError (another model), EngineError (no SGLang server).
        """
        await self._check_health(client, server, timeout_s)
        try:
            reply = await client.get(f"{server.url}/server_info", timeout=timeout_s)
            if reply.status_code == 404:  # a router: its servers are asked
                workers = read_json(await client.get(f"{server.url}/workers", timeout=timeout_s))
                urls = [worker["url"] for worker in workers["workers"] if worker["is_healthy"]]
                if not urls:
                    raise ServerLost("the router has no healthy server")
            else:
                urls = [server.url]
            server.info = {url: await self._ask_one(client, url, timeout_s) for url in urls}
        except httpx.HTTPError as error:
            raise ServerLost(say(error)) from error
        except (KeyError, TypeError) as error:
            raise not_sglang(reply, error) from error

    async def _check_health(self, client: httpx.AsyncClient, server: Server, timeout_s: float) -> None:
        try:
            reply = await client.get(f"{server.url}/health", timeout=timeout_s)
        except httpx.HTTPError as error:
            raise ServerLost(say(error)) from error
        if reply.status_code != 200:
            raise ServerLost(f"/health says {reply.status_code}")

    async def _ask_one(self, client: httpx.AsyncClient, url: str, timeout_s: float) -> ServerInfo:
        replies = [await client.get(f"{url}/{path}", timeout=timeout_s) for path in ("model_info", "server_info")]
        bodies = [read_json(reply) for reply in replies]
        try:
            info = read_info(*bodies)
        except (KeyError, TypeError, ValueError) as error:
            raise not_sglang(replies[1], error) from error
        self._check_info(url, info)
        return info

    def _check_info(self, url: str, info: ServerInfo) -> None:
        """Raises UserError where the server runs something else than what was asked for."""
        ours, path = architectures_of(self.model_path), self.model_path
        if ours and info.architectures and ours != info.architectures:
            raise UserError(
                f"{url} serves {info.model_path}, a {info.architectures[0]}; --piref_model {path} is a {ours[0]}"
            )
        if self.deterministic and not info.deterministic:
            raise UserError(f"--deterministic: {url} runs without it; start it with --enable-deterministic-inference")
        if info.longest < getattr(self, "context_length", 0):
            raise UserError(f"{url} takes {info.longest} tokens a request; {self.context_length} are needed")
        if not same_model(info.model_path, path) and url not in self._told:
            self._told.add(url)
            logger.warning(
                "%s serves %s and --piref_model is %s: only you know that they are the same", url, info.model_path, path
            )


def _make_client(timeout: httpx.Timeout) -> httpx.AsyncClient:
    return httpx.AsyncClient(
        headers=headers(),
        trust_env=False,  # proxies are for the world outside; these are machines of ours
        timeout=timeout,
        # The servers close idle connections after 5 s; one that is being closed must not be used.
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=64, keepalive_expiry=3.0),
    )


async def _cancel(tasks: Iterable[asyncio.Task]) -> None:
    """Cancel, and wait for the end."""
    tasks = list(tasks)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
