"""Several SGLang servers, or routers in front of many, asked over HTTP: what a generator and a value model have in common.

Nothing is scheduled here but the choice of a place, a server or one of its data-parallel ranks: a search stays where the
cache is warm for it, as far as no place gets much more than its share (engine_lib/placement.py). Servers queue and batch
by themselves.

httpx is the client because every installation of this project has it already: huggingface_hub needs it.
"""

import abc
import asyncio
import contextlib
import logging
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import httpx

from common_lib.cli import UserError
from common_lib.concurrency import cancel_all, gather_all
from engine_lib import sglang_wire as wire
from engine_lib.base import EngineError, first_line
from engine_lib.http_client import allow_open_files, make_client
from engine_lib.placement import Placement, warn_of_few_groups
from engine_lib.retry import RetryPolicy
from engine_lib.sglang_wire import ServerLost, TryFailed

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Patience:
    """With servers, in seconds."""

    retry: RetryPolicy = field(default=RetryPolicy(attempts=5, pause_s=0.5))  # where a server that is well fails
    reconnect_s: float = 300.0  # where all are lost, until one is back
    answer_s: float = 30.0  # to a question about a server; /health of a busy one takes 1 to 20
    probe_every_s: float = 15.0  # of a busy server
    probes_missed: int = 3  # one after the other, and what runs on the server is given up
    look_again_s: float = 0.25  # after a lost server; doubles until a request succeeds
    look_again_most_s: float = 10.0
    lasting_s: float = 5.0  # a try that ran so long shows that the server was well in between


PATIENCE = Patience()


@dataclass(eq=False)
class Server:
    """One URL: a server, or a router with servers behind it."""

    url: str
    look_again_s: float
    lost: asyncio.Event = field(default_factory=asyncio.Event)
    why: str = ""  # it is lost
    losses: int = 0  # how often it was; what its caches held may be gone with each
    tries: set[asyncio.Task] = field(default_factory=set)
    info: dict[str, Any] = field(default_factory=dict)  # wire.ServerInfo, or more, of each server behind this URL

    @property
    def up(self) -> bool:
        return not self.lost.is_set()

    @property
    def load(self) -> int:
        return len(self.tries)

    @property
    def is_router(self) -> bool:
        return self.url not in self.info


Place = tuple[Server, int | None]


class ServerPool(abc.ABC):
    """A request whose server is lost goes to another; a server that is back is used.

    What is asked of them is up to the class that is made of it: `_post` is one try of one item at one place, `_read_info`
    and `_check_info` are what a server says of itself and whether that will do, `_examine` may ask it for more. Any try
    may be repeated: an answer depends on nothing but the item.
    """

    role, flag = "", ""  # of whom a message speaks, and which flag names them
    moves = True  # searches, from a crowded server to one with less to do

    def __init__(
        self,
        urls: Sequence[str],
        patience: Patience,
        request_timeout_s: float,
        groups_at_once: int,
        requests_at_once: int,
    ):
        """Ask every server what it is. groups_at_once, requests_at_once: 0: not known.

        Raises UserError for a server of another model, EngineError where none answers.
        """
        self.patience, self.request_timeout_s = patience, request_timeout_s
        self.servers = [Server(url, patience.look_again_s) for url in dict.fromkeys(urls)]
        self.context_length = 0
        self._client: httpx.AsyncClient  # of the running loop, as the watchers are
        self._watchers: list[asyncio.Task] = []  # none before the first request
        self._aborts: set[asyncio.Task] = set()
        self._change = asyncio.Event()
        self._closed = False
        with ThreadPoolExecutor(1) as thread:  # a notebook has an event loop already
            thread.submit(asyncio.run, self._meet()).result()
        self.context_length = min(info.longest for info in self._infos())
        self._placement: Placement[Place] = Placement(groups_at_once, moves=self.moves)
        self._warn_of_few(groups_at_once)
        allow_open_files(requests_at_once)

    def _read_info(self, model: dict[str, Any], server: dict[str, Any]) -> wire.ServerInfo:
        """From the bodies of /model_info and /server_info. Raises KeyError, TypeError or ValueError for other bodies."""
        return wire.read_info(model, server)

    @abc.abstractmethod
    def _check_info(self, url: str, info: Any, told: bool) -> None:
        """Raises UserError where the server runs something else than what was asked for. told: it has been met before."""

    @abc.abstractmethod
    async def _examine(self, server: Server, infos: dict[str, Any]) -> None:
        """Ask it what it does not say of itself. Raises as `_ask` does."""

    def _places_of(self, server: Server) -> list[Place]:
        """Its data-parallel ranks, where it is a server that has several: by itself it would go from one to the next."""
        own = server.info.get(server.url)
        ranks = range(own.ranks) if own is not None and own.ranks > 1 else [None]
        return [(server, rank) for rank in ranks]

    def _warn_of_few(self, groups_at_once: int) -> None:
        warn_of_few_groups(groups_at_once, sum(info.ranks for info in self._infos()), "servers or data-parallel ranks")

    @abc.abstractmethod
    async def _post(self, server: Server, rank: int | None, item: Any) -> Any:
        """The answer to one item by one server. Raises ServerLost, TryFailed, or EngineError for what stays wrong."""

    async def close(self) -> None:
        """Abort what still runs here; the servers go on for others."""
        if self._closed:
            return
        self._closed = True
        self._change.set()
        await cancel_all([*self._watchers, *(task for server in self.servers for task in server.tries)])
        await asyncio.gather(*self._aborts)
        if self._watchers:
            await self._client.aclose()

    def _infos(self) -> list[Any]:
        return [info for server in self.servers for info in server.info.values()]

    def _check_open(self) -> None:
        if self._closed:
            raise EngineError(f"the engine of the {self.role} servers has been closed")

    def _begin(self) -> None:
        """Before every request: it may be the first one of this loop."""
        self._check_open()
        if not self._watchers:
            self._client = make_client()
            self._watchers = [asyncio.create_task(self._watch(server)) for server in self.servers]

    # One item: tried until it is answered

    async def _answer(self, item: Any, group: str, deed: str) -> Any:
        """What `_post` answers, from a server of the group. deed: what none did, where time runs out. Raises EngineError."""
        try:
            async with asyncio.timeout(self.request_timeout_s):
                return await self._try_until_answered(item, group)
        except TimeoutError:
            if not any(server.up for server in self.servers):
                raise self._out_of_reach(self.request_timeout_s) from None
            raise EngineError(
                f"no {self.role} server {deed} within --request_timeout {self.request_timeout_s:g} s"
            ) from None

    async def _try_until_answered(self, item: Any, group: str) -> Any:
        failures, trouble_since, retry = 0, None, self.patience.retry
        while True:
            places = await self._places(trouble_since or time.monotonic())
            begin = time.monotonic()
            try:
                with self._placement.use(group, places) as (server, rank):
                    answer = await self._try(server, rank, item)
                server.look_again_s = self.patience.look_again_s
                return answer
            except ServerLost as error:
                self._lose(server, first_line(error))
                if trouble_since is None or time.monotonic() - begin > self.patience.lasting_s:
                    trouble_since = time.monotonic()
            except TryFailed as error:
                failures += 1
                if failures == retry.attempts:
                    raise EngineError(
                        f"the {self.role} servers failed {failures} times on a request, last {server.url}: {error}"
                    ) from None
                logger.warning("%s failed on a request (%s); trying again", server.url, error)
                await asyncio.sleep(retry.pause(failures))

    async def _places(self, since: float) -> list[Place]:
        """Those that are there, for a request that has been without one `since`; waits where there is none."""
        while (left := since + self.patience.reconnect_s - time.monotonic()) > 0:
            self._check_open()
            if places := [place for server in self.servers if server.up for place in self._places_of(server)]:
                return places
            self._change.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left):
                    await self._change.wait()
        raise self._out_of_reach(self.patience.reconnect_s)

    def _out_of_reach(self, seconds: float) -> EngineError:
        return EngineError(
            f"all SGLang servers have been out of reach for {seconds:g} s ({self._reasons()}); these are the {self.role} "
            f"servers ({self.flag})"
        )

    def _reasons(self) -> str:
        return "; ".join(f"{server.url}: {server.why}" for server in self.servers)

    async def _try(self, server: Server, rank: int | None, item: Any) -> Any:
        """One try at one server, as a task of its own that the watcher can end where the server hangs."""
        task = asyncio.create_task(self._post(server, rank, item))
        server.tries.add(task)
        try:
            await asyncio.wait({task})
        finally:
            server.tries.discard(task)
            await cancel_all([task])
        if task.cancelled():
            self._check_open()
            raise ServerLost(server.why)
        return task.result()

    async def _send(
        self, server: Server, page: str, body: dict[str, object], group: str, rids: Sequence[str]
    ) -> httpx.Response:
        """The response to a POST. Where this is cancelled, what the server does for it, `rids`, is aborted."""
        # The router's `manual` policy keeps requests of one key on one server; a server ignores the header.
        key = {"x-smg-routing-key": group} if group else {}
        try:
            return await self._client.post(f"{server.url}/{page}", json=body, headers=key)
        except httpx.HTTPError as error:
            raise ServerLost(first_line(error)) from error
        except asyncio.CancelledError:
            for rid in rids if server.up else ():  # by tasks of their own: this one may be cancelled again
                task = asyncio.create_task(self._abort(server, rid))
                self._aborts.add(task)
                task.add_done_callback(self._aborts.discard)
            raise

    async def _abort(self, server: Server, rid: str) -> None:
        """Best effort: some seconds later a server aborts by itself what was asked over a closed connection."""
        with contextlib.suppress(httpx.HTTPError):
            await self._client.post(f"{server.url}/abort_request", json={"rid": rid}, timeout=2.0)

    # Which servers are there

    def _lose(self, server: Server, why: str) -> None:
        """New requests avoid the server until it has been looked at; what runs there may still be answered."""
        if server.up:
            server.why = why
            server.losses += 1
            server.lost.set()
            left, all_ = sum(other.up for other in self.servers), len(self.servers)
            logger.warning("lost %s (%s); %d of %d %s servers left", server.url, why, left, all_, self.role)

    async def _watch(self, server: Server) -> None:
        """Look whether a busy server still lives, and, more and more rarely, whether a lost one is back."""
        missed = 0
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self.patience.probe_every_s):
                    await server.lost.wait()
            try:
                if not server.up:
                    await asyncio.sleep(server.look_again_s)
                    server.look_again_s = min(2 * server.look_again_s, self.patience.look_again_most_s)
                    await self._ask(server)
                    server.lost.clear()
                    self._change.set()
                    logger.warning("%s is back", server.url)
                elif server.load:
                    await self._get(f"{server.url}/health")
                missed = 0
            except (ServerLost, EngineError, UserError) as error:
                missed += 1
                server.why = first_line(error)
                if missed >= self.patience.probes_missed:
                    self._lose(server, f"{missed} health checks failed: {server.why}")
                    await cancel_all(server.tries)

    async def _meet(self) -> None:
        """At the start: what every server is. Those that do not answer are left for later, but not all may."""

        async def meet(server: Server) -> None:
            try:
                await self._ask(server)
            except ServerLost as error:
                server.why = first_line(error)
                server.lost.set()

        async with make_client() as self._client:
            await gather_all(meet(server) for server in self.servers)
        if not any(server.up for server in self.servers):
            raise EngineError(
                f"no SGLang server answers ({self._reasons()}); start a {self.role} server, or give the right {self.flag}"
            )
        for server in self.servers:
            if not server.up:
                logger.warning("%s does not answer (%s); it is used once it does", server.url, server.why)

    async def _ask(self, server: Server) -> None:
        """Is it well, and does it, or do the servers behind a router, run the right model? Raises ServerLost, UserError
        (another model), EngineError (no SGLang server)."""
        await self._get(f"{server.url}/health")
        try:
            urls = [server.url]
            if (await self._get(f"{server.url}/server_info")).status_code == 404:  # a router: its servers are asked
                workers = (await self._get(f"{server.url}/workers")).json()["workers"]
                urls = [worker["url"] for worker in workers if worker["is_healthy"]]
                if not urls:
                    raise ServerLost("the router has no healthy server")
            pages = {url: [await self._get(f"{url}/{page}") for page in ("model_info", "server_info")] for url in urls}
            infos = {url: self._read_info(*(page.json() for page in told)) for url, told in pages.items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise EngineError(f"{server.url} does not answer as an SGLang server does ({error!r})") from error
        for url, info in infos.items():
            self._check_info(url, info, told=url in server.info)
        await self._examine(server, infos)
        server.info = infos

    async def _get(self, url: str) -> httpx.Response:
        """A page that tells of a server, or 404 for none. Raises ServerLost."""
        try:
            response = await self._client.get(url, timeout=self.patience.answer_s)
        except httpx.HTTPError as error:
            raise ServerLost(first_line(error)) from error
        if response.status_code not in (200, 404):
            raise ServerLost(f"{response.url.path} says {response.status_code}: {wire.message_of(response)}")
        return response
