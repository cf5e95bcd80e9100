"""SGLang servers of the value model, or an sglang-router in front of many: values by HTTP.

A server answers `/encode`; a router has no such page, and passes the same numbers on from `/v1/embeddings`.
"""

import json
import logging
import math
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import httpx

from common_lib.cli import UserError
from common_lib.models import inspect_model
from engine_lib import sglang_wire as wire
from engine_lib.base import EngineError, first_line
from engine_lib.placement import REMEMBERED, warn_of_few_groups
from engine_lib.server_pool import PATIENCE, Patience, Place, Server, ServerPool
from engine_lib.sglang_wire import ServerLost, TryFailed
from engine_lib.value_base import ValueConfig, Valued, check_traces
from engine_lib.value_check import TOLERANCE, known_traces
from engine_lib.value_wire import ARCHITECTURES, read_row, read_vocabulary

logger = logging.getLogger(__name__)

START_ONE = "start one with `python -m engine_lib.value_server --classifier_ckpt_path M --port P`"
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}  # ours, SGLang's
PLAIN_500 = "500: Internal Server Error"  # all that SGLang says of an exception


@dataclass(frozen=True)
class ValueServerInfo(wire.ServerInfo):
    """What a server of a value model says of itself. `longest`: most tokens of a trace."""

    generates: bool
    prefix_cache: bool


@dataclass(frozen=True)
class Batch:
    """A round of a search: one POST, and one before it for each prefix where the server has none of them."""

    traces: Sequence[Sequence[int]]
    group: str
    prefixes: Sequence[Sequence[int]]


class SGLangValueServers(ServerPool):
    """A `ValueEngine`. A batch whose server is lost goes to another; a server that is back is used."""

    name = "sglang-server"
    role, flag = "value", "--value_url"
    moves = False  # reading a trace again is most of what a value costs

    def __init__(self, config: ValueConfig, patience: Patience = PATIENCE):
        """Ask every server what it runs, and the values of a known sequence: all must give the same.

        Raises UserError for a server of another model, EngineError where none answers.
        """
        self.config = config
        self._answered: dict[str, tuple[Server, int]] = {}  # by group: who did last, and its losses up to then
        self._known: tuple[str, list[float]] | None = None  # a server, and its values of the known sequence
        at_once = (config.groups_at_once, config.requests_at_once)
        super().__init__(config.urls, patience, config.request_timeout_s, *at_once)

    @property
    def pool_tokens(self) -> int:
        """Tokens whose keys and values all servers together can hold, those that are lost at the moment included."""
        return sum(info.kv_pool_tokens * info.ranks for info in self._infos())

    def describe(self) -> dict[str, object]:
        return {
            "name": self.name,
            "urls": [server.url for server in self.servers],
            "servers": {url: asdict(info) for server in self.servers for url, info in server.info.items()},
            "context_length": self.context_length,
            "kv_pool_tokens": self.pool_tokens,
        }

    async def values(
        self, traces: Sequence[Sequence[int]], group: str, prefixes: Sequence[Sequence[int]] = ()
    ) -> list[Valued]:
        """See `ValueEngine`. Which of a router's servers answered, and whether it is a new one, nobody tells: behind a
        router no prefix is read again before its round."""
        check_traces([*prefixes, *traces], self.context_length, self.config.vocab_size)
        self._begin()
        if not traces:
            return []
        return await self._answer(Batch(traces, group, prefixes), group, f"valued {len(traces)} traces")

    async def _post(self, server: Server, rank: int | None, batch: Batch) -> list[Valued]:
        here, reread = (server, server.losses), 0
        if self._answered.get(batch.group) != here:
            for prefix in batch.prefixes:
                (one,) = await self._read(server, [prefix], batch.group)
                reread += one.tokens_computed
        first, *others = await self._read(server, batch.traces, batch.group)
        if batch.group:
            self._answered.pop(batch.group, None)
            self._answered[batch.group] = here
            if len(self._answered) > REMEMBERED:
                del self._answered[next(iter(self._answered))]
        return [replace(first, tokens_computed=first.tokens_computed + reread), *others]

    async def _read(self, server: Server, traces: Sequence[Sequence[int]], group: str) -> list[Valued]:
        """One POST."""
        page, body = request_of(traces, server.is_router)
        rids: list[str] = []
        if not server.is_router:  # which takes no list of them: what is cancelled there, the router may end
            body["rid"] = rids = [uuid.uuid4().hex for _ in traces]
        response = await self._send(server, page, body, group, rids)
        return read_values(response, len(traces), self.config.num_labels)

    def _places_of(self, server: Server) -> list[Place]:
        return [(server, None)]  # a request for values cannot name a data-parallel rank (0.5.23)

    def _warn_of_few(self, groups_at_once: int) -> None:
        warn_of_few_groups(groups_at_once, len(self._infos()), "value servers", "value model")

    # Is it this value model?

    def _read_info(self, model: dict[str, Any], server: dict[str, Any]) -> ValueServerInfo:
        return read_value_info(model, server)

    def _check_info(self, url: str, info: ValueServerInfo, told: bool) -> None:
        path, ours = self.config.model_path, self.config
        architectures = architectures_of(path) or ARCHITECTURES
        if info.generates or info.architectures[:1] != architectures[:1]:
            kind = (info.architectures or ("model that does not say what it is",))[0]
            raise UserError(
                f"{self.flag} {url} serves {info.model_path}, a {kind} that {'writes text' if info.generates else 'embeds'}; "
                f"--classifier_ckpt_path {path} is a {architectures[0]}: {START_ONE}"
            )
        if (Path(info.model_path) / "config.json").is_file():  # it is on this machine, or looks the same from here
            theirs = inspect_model(Path(info.model_path), f"{self.flag} {url}:")
            self._check_same(url, info, "{} labels", theirs.num_labels, ours.num_labels)
        if info.dtype != DTYPES[ours.dtype]:
            raise UserError(
                f"{self.flag} {url} computes in {info.dtype or 'a type that it does not tell'}, and --value_dtype is "
                f"{ours.dtype}; start it with --dtype {DTYPES[ours.dtype]}, or give the --value_dtype that it has"
            )
        if info.longest < self.context_length:
            raise UserError(f"{self.flag} {url} takes {info.longest} tokens a trace; {self.context_length} are needed")
        if not told:
            warn_of_cost(url, info)

    def _check_same(self, url: str, info: ValueServerInfo, what: str, its: int | None, wanted: int) -> None:
        if its != wanted:
            raise UserError(
                f"{self.flag} {url} serves {info.model_path} with {what.format(its)}; "
                f"--classifier_ckpt_path {self.config.model_path} has {wanted}: give the server that checkpoint"
            )

    async def _examine(self, server: Server, infos: dict[str, ValueServerInfo]) -> None:
        """Each server's vocabulary, and its values of the known sequence, those behind a router too; another checkpoint gives
        others."""
        ours, bound = self.config, TOLERANCE[self.config.dtype]
        for url, info in infos.items():
            try:
                values, vocabulary = await self._known_sequence(url)
            except (httpx.HTTPError, TryFailed) as error:
                raise ServerLost(first_line(error)) from error
            except EngineError as error:
                raise UserError(f"{self.flag} {url}: {first_line(error)}") from error
            self._check_same(url, info, "a vocabulary of {}", vocabulary, ours.vocab_size)
            other, known = self._known = self._known or (url, values)
            off = max(abs(a - b) for a, b in zip(values, known, strict=True))
            if not off <= bound:
                raise UserError(
                    f"{self.flag} {url} and {other} serve different value models: {values[-1]:.6f} and {known[-1]:.6f} "
                    "for a known sequence; give all of them --classifier_ckpt_path "
                    f"{ours.model_path}"
                )

    async def _known_sequence(self, url: str) -> tuple[list[float], int]:
        """A server's values of it, and the size of its vocabulary. Raises as `read_rows` does, or httpx.HTTPError."""
        traces, limit = known_traces(self.config.vocab_size), self.patience.answer_s
        page, body = request_of(traces, through_router=False)
        response = await self._client.post(f"{url}/{page}", json=body, timeout=limit)
        values = [one.value for one in read_values(response, len(traces), self.config.num_labels)]
        body = {"input_ids": traces[-1], "token_indices_to_pool": [len(traces[-1]) - 1]}
        (row,) = read_rows(await self._client.post(f"{url}/{page}", json=body, timeout=limit), 1)
        return values, read_vocabulary(row, self.config.num_labels)


def architectures_of(path: str) -> tuple[str, ...]:
    return tuple(json.loads((Path(path) / "config.json").read_text(encoding="utf-8")).get("architectures") or ())


def read_value_info(model: dict[str, Any], server: dict[str, Any]) -> ValueServerInfo:
    """From the bodies of /model_info and /server_info. Raises KeyError, TypeError or ValueError for other bodies."""
    info = vars(wire.read_info(model, server))
    # A trace longer than the pool is not refused: it waits for ever, and so do all behind it.
    info["longest"] = min(info["longest"], int(server["max_total_num_tokens"]) - 2)
    cache = not server.get("disable_radix_cache")
    return ValueServerInfo(**info, generates=model.get("is_generation") is not False, prefix_cache=cache)


def warn_of_cost(url: str, info: ValueServerInfo) -> None:
    """Say what makes a server read prefixes again and again; its values are right."""
    if not info.prefix_cache:
        logger.warning("%s runs with --disable-radix-cache: it reads every trace whole, at each block again", url)
    if info.ranks > 1:
        logger.warning(
            "%s has %d data-parallel ranks, and requests for values cannot name one: each reads the same prefixes; start %d "
            "servers instead, with a --value_url each", url, info.ranks, info.ranks,
        )  # fmt: skip


def request_of(traces: Sequence[Sequence[int]], through_router: bool) -> tuple[str, dict[str, object]]:
    """Page and body that ask for the values of traces, a list also of one."""
    ids = [list(trace) for trace in traces]
    return ("v1/embeddings", {"model": "default", "input": ids}) if through_router else ("encode", {"input_ids": ids})


def read_rows(response: httpx.Response, count: int) -> list[list[float]]:
    """The numbers of so many requests, of `/encode` or `/v1/embeddings`. Raises ServerLost, TryFailed, or EngineError for what
    no second try can mend."""
    try:
        wire.check_status(response)
    except TryFailed as error:
        hint = " (values that are no numbers, NaN, read so too)" if str(error) == PLAIN_500 else ""
        raise TryFailed(f"{error}{hint}") from error
    try:
        body = response.json()
        if isinstance(body, dict):
            body = sorted(body["data"], key=lambda one: one["index"]) if "data" in body else [body]
        replies: list[dict[str, Any]] = body
        for reply in replies:
            reason = reply.get("meta_info", {}).get("finish_reason") or {}
            if reason.get("type") == "abort":  # there is no `embedding`
                raise TryFailed(f"it was aborted: {reason.get('message') or 'it does not say why'}")
        # The router's page writes null for NaN.
        rows = [[math.nan if x is None else float(x) for x in reply["embedding"]] for reply in replies]
        if len(rows) != count:
            raise ValueError(f"{len(rows)} replies to {count} requests")
        return rows
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise TryFailed(f"its reply is not SGLang's ({type(error).__name__}: {error})") from error


def read_values(response: httpx.Response, count: int, num_labels: int) -> list[Valued]:
    """Raises as `read_rows` does, and EngineError for numbers that are no values of so many labels."""
    return [read_row(row, num_labels) for row in read_rows(response, count)]
