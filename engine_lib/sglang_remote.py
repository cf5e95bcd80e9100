"""SGLang servers, or an sglang-router in front of many, as the generator.

Nothing is scheduled here but the choice of a place, a server or one of its data-parallel ranks: a search stays where the
cache is warm for it, as far as no place gets much more than its share (engine_lib/placement.py). Servers queue and batch
by themselves.

httpx is the client because every installation of this project has it already: huggingface_hub needs it.
"""

import asyncio
import contextlib
import functools
import json
import logging
import time
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

import httpx

from common_lib.cli import UserError
from common_lib.concurrency import cancel_all, gather_all
from engine_lib import sglang_wire as wire
from engine_lib.base import EngineConfig, EngineError, Reply, Request, check_requests, first_line
from engine_lib.http_client import allow_open_files, make_client
from engine_lib.placement import Placement, warn_of_few_groups
from engine_lib.retry import RetryPolicy
from engine_lib.seeded import check_drawn, check_seeded, logit_processor
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


@dataclass(eq=False)
class Server:
    """One URL: a server, or a router with servers behind it."""

    url: str
    look_again_s: float
    lost: asyncio.Event = field(default_factory=asyncio.Event)
    why: str = ""  # it is lost
    tries: set[asyncio.Task] = field(default_factory=set)
    info: dict[str, wire.ServerInfo] = field(default_factory=dict)  # of each server behind this URL

    @property
    def up(self) -> bool:
        return not self.lost.is_set()

    @property
    def load(self) -> int:
        return len(self.tries)

    @property
    def places(self) -> list["Place"]:
        """Its data-parallel ranks, where it is a server that has several: by itself it would go from one to the next."""
        own = self.info.get(self.url)
        ranks = range(own.ranks) if own is not None and own.ranks > 1 else [None]
        return [(self, rank) for rank in ranks]


Place = tuple[Server, int | None]


class SGLangServerEngine:
    """Generation by HTTP `/generate`. A request whose server is lost goes to another; a server that is back is used."""

    name = "sglang-server"

    def __init__(self, config: EngineConfig, patience: Patience = Patience()):
        """Ask every server what it runs: it should be `config.model_path`.

        Raises UserError for a server of another model, EngineError where none answers.
        """
        self.patience = patience
        self.servers = [Server(url, patience.look_again_s) for url in dict.fromkeys(config.sglang_urls)]
        self.model_path, self.vocab_size = Path(config.model_path), config.vocab_size
        self.model_flag, self.flag = config.model_flag, config.url_flag
        self.deterministic, self.request_timeout_s = config.deterministic, config.request_timeout_s
        self.seeded = config.seeded
        self.context_length = 0
        self._client: httpx.AsyncClient  # of the running loop, as the watchers are
        self._watchers: list[asyncio.Task] = []  # none before the first request
        self._aborts: set[asyncio.Task] = set()
        self._change = asyncio.Event()
        self._closed = False
        with ThreadPoolExecutor(1) as thread:  # a notebook has an event loop already
            thread.submit(asyncio.run, self._meet()).result()
        infos = [info for server in self.servers for info in server.info.values()]
        self.context_length = min(info.longest for info in infos)
        self._placement: Placement[Place] = Placement(config.groups_at_once)
        warn_of_few_groups(config.groups_at_once, sum(info.ranks for info in infos), "servers or data-parallel ranks")
        allow_open_files(config.requests_at_once)

    def describe(self) -> dict[str, object]:
        return {
            "name": self.name,
            "urls": [server.url for server in self.servers],
            "servers": {url: asdict(info) for server in self.servers for url, info in server.info.items()},
            "deterministic": self.deterministic,
            "seeded": self.seeded,
            "context_length": self.context_length,
        }

    async def generate(self, requests: Sequence[Request]) -> list[Reply]:
        check_requests(requests, self.context_length, self.vocab_size)
        self._check_open()
        if not self._watchers:
            self._client = make_client()
            self._watchers = [asyncio.create_task(self._watch(server)) for server in self.servers]
        return await gather_all(self._generate_one(request) for request in requests)

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

    def _check_open(self) -> None:
        if self._closed:
            raise EngineError("the SGLang engine has been closed")

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
        failures, trouble_since, retry = 0, None, self.patience.retry
        while True:
            places = await self._places(trouble_since or time.monotonic())
            begin = time.monotonic()
            try:
                with self._placement.use(request.group, places) as (server, rank):
                    reply = await self._try(server, rank, request)
                server.look_again_s = self.patience.look_again_s
                return reply
            except ServerLost as error:
                self._lose(server, first_line(error))
                if trouble_since is None or time.monotonic() - begin > self.patience.lasting_s:
                    trouble_since = time.monotonic()
            except TryFailed as error:
                failures += 1
                if failures == retry.attempts:
                    raise EngineError(
                        f"SGLang failed {failures} times on a request, last at {server.url}: {error}"
                    ) from None
                logger.warning("%s failed on a request (%s); trying again", server.url, error)
                await asyncio.sleep(retry.pause(failures))

    async def _places(self, since: float) -> list[Place]:
        """Those that are there, for a request that has been without one `since`; waits where there is none."""
        while (left := since + self.patience.reconnect_s - time.monotonic()) > 0:
            self._check_open()
            if places := [place for server in self.servers if server.up for place in server.places]:
                return places
            self._change.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left):
                    await self._change.wait()
        raise self._out_of_reach(self.patience.reconnect_s)

    def _out_of_reach(self, seconds: float) -> EngineError:
        reasons = "; ".join(f"{server.url}: {server.why}" for server in self.servers)
        return EngineError(f"all SGLang servers have been out of reach for {seconds:g} s ({reasons})")

    async def _try(self, server: Server, rank: int | None, request: Request) -> Reply:
        """One try at one server, as a task of its own that the watcher can end where the server hangs."""
        task = asyncio.create_task(self._post(server, rank, request))
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

    def _body(self, request: Request) -> dict[str, object]:
        params = wire.sampling_params(request, self.deterministic, self.seeded)
        body: dict[str, object] = {"input_ids": request.prompt_ids, "sampling_params": params}
        return body | {"custom_logit_processor": logit_processor()} if self.seeded else body

    async def _post(self, server: Server, rank: int | None, request: Request) -> Reply:
        rid = uuid.uuid4().hex
        body = self._body(request) | {"rid": rid}
        if rank is not None:
            body["routed_dp_rank"] = rank
        # The router's `manual` policy keeps requests of one key on one server; a server ignores the header.
        key = {"x-smg-routing-key": request.group} if request.group else {}
        try:
            response = await self._client.post(f"{server.url}/generate", json=body, headers=key)
        except httpx.HTTPError as error:
            raise ServerLost(first_line(error)) from error
        except asyncio.CancelledError:
            if server.up:  # by a task of its own: this one may be cancelled again
                task = asyncio.create_task(self._abort(server, rid))
                self._aborts.add(task)
                task.add_done_callback(self._aborts.discard)
            raise
        return wire.read_reply(request, response)

    async def _abort(self, server: Server, rid: str) -> None:
        """Best effort: some seconds later a server aborts by itself what was asked over a closed connection."""
        with contextlib.suppress(httpx.HTTPError):
            await self._client.post(f"{server.url}/abort_request", json={"rid": rid}, timeout=2.0)

    # Which servers are there

    def _lose(self, server: Server, why: str) -> None:
        """New requests avoid the server until it has been looked at; what runs there may still be answered."""
        if server.up:
            server.why = why
            server.lost.set()
            left = sum(other.up for other in self.servers)
            logger.warning("lost %s (%s); %d of %d servers left", server.url, why, left, len(self.servers))

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
            reasons = "; ".join(f"{server.url}: {server.why}" for server in self.servers)
            raise EngineError(f"no SGLang server answers ({reasons}); start one, or give the right {self.flag}")
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
            infos = {url: wire.read_info(*(page.json() for page in told)) for url, told in pages.items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise EngineError(f"{server.url} does not answer as an SGLang server does ({error!r})") from error
        for url, info in infos.items():
            self._check_info(url, info, told=url in server.info)
        if self.seeded:
            await check_drawn(functools.partial(self._draw, server), server.url)
        server.info = infos

    async def _draw(self, server: Server, request: Request) -> Reply:
        """The reply to a question about the server, which is told soon or not at all. Raises ServerLost."""
        try:
            url, limit = f"{server.url}/generate", self.patience.answer_s
            return wire.read_reply(request, await self._client.post(url, json=self._body(request), timeout=limit))
        except (httpx.HTTPError, TryFailed) as error:
            raise ServerLost(first_line(error)) from error

    async def _get(self, url: str) -> httpx.Response:
        """A page that tells of a server, or 404 for none. Raises ServerLost."""
        try:
            response = await self._client.get(url, timeout=self.patience.answer_s)
        except httpx.HTTPError as error:
            raise ServerLost(first_line(error)) from error
        if response.status_code not in (200, 404):
            raise ServerLost(f"{response.url.path} says {response.status_code}: {wire.message_of(response)}")
        return response

    def _check_info(self, url: str, info: wire.ServerInfo, told: bool) -> None:
        """Raises UserError where the server runs something else than what was asked for."""
        path = self.model_path
        ours = tuple(json.loads((path / "config.json").read_text(encoding="utf-8")).get("architectures") or ())
        if ours and info.architectures and ours != info.architectures:
            raise UserError(
                f"{url} serves {info.model_path}, a {info.architectures[0]}; {self.model_flag} {path} is a {ours[0]}"
            )
        if self.deterministic and not info.deterministic:
            raise UserError(f"--deterministic: {url} runs without it; start it with --enable-deterministic-inference")
        if self.seeded:
            remedy = "start it with --enable-custom-logit-processor"
            check_seeded(info.custom_logit_processor, info.speculative, f"{url} runs", remedy)
        if info.longest < self.context_length:
            raise UserError(f"{url} takes {info.longest} tokens a request; {self.context_length} are needed")
        if not wire.same_model(info.model_path, path) and not told:
            logger.warning(
                "%s serves %s and %s is %s: only you know that they are the same",
                url, info.model_path, self.model_flag, path,
            )  # fmt: skip
