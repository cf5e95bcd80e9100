"""Values from a running value server, for notebooks and other tools.

    with ValueClient("http://localhost:30001") as client:
        client.values(ids)                               # [the value at the last token]
        client.values(ids, positions=[63, 127, 191])     # those at the 64th, 128th and 192nd token

It blocks, and it may be called where an event loop runs, as in a notebook. A run that searches uses SGLangValueServers.
"""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

import httpx

from common_lib.cli import UserError
from common_lib.models import inspect_model
from engine_lib.base import EngineError, first_line
from engine_lib.http_client import authorization
from engine_lib.retry import RetryPolicy
from engine_lib.sglang_value_remote import ValueServerInfo, read_rows, read_value_info, request_of
from engine_lib.sglang_wire import ServerLost, TryFailed
from engine_lib.value_base import check_traces
from engine_lib.value_wire import ARCHITECTURES, read_positions, read_row

RETRY = RetryPolicy(attempts=4, pause_s=0.5)
LABELS = (1, 3)  # that value models have
TOKENS_A_POST = 200_000  # of prefixes that are asked for together: about 1 MB


class ValueClient:
    """One server of `python -m engine_lib.value_server`, or an sglang-router in front of several."""

    def __init__(self, url: str, vocab_size: int | None = None, timeout_s: float = 600.0, retry: RetryPolicy = RETRY):
        """vocab_size: needed where the server's model folder is not on this machine: an id outside kills a server.
        timeout_s: for one answer. Raises UserError where no value server answers there."""
        self.url, self.retry = url.rstrip("/"), retry
        timeout = httpx.Timeout(timeout_s, connect=10.0)
        self._http = httpx.Client(headers=authorization(), trust_env=False, timeout=timeout)
        try:
            infos = self._meet()
            self.is_router = self.url not in infos
            self.context_length = min(info.longest for info in infos.values())  # most tokens of a trace
            self.vocab_size = vocab_size or min(self._vocab_size(url, info) for url, info in infos.items())
            self.num_labels = self._count_labels()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close its connections, as the end of a `with` does. Can be called twice."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def values(self, ids: Sequence[int], positions: Sequence[int] | None = None) -> list[float]:
        """Success probabilities in [0, 1], as `classifier_lib.success_probs` has them: the one at the last token of `ids`,
        or those at the given positions (counted from 0).

        Raises ValueError for ids or positions that cannot be scored, before anything is sent; UserError for positions
        through a router; EngineError where the server fails.
        """
        ids = [int(token) for token in ids]  # of an array or a tensor too
        check_traces([ids], self.context_length, self.vocab_size)
        if positions is None:
            return self._at_ends([ids])
        if self.is_router:
            raise UserError(f"{self.url} is a router, which drops positions; give the URL of one of its servers")
        positions = [int(position) for position in positions]
        if outside := [position for position in positions if not 0 <= position < len(ids)]:
            raise ValueError(
                f"position {outside[0]} is outside the trace of {len(ids)} tokens (positions count from 0)"
            )
        if not positions:
            return []
        body = {"input_ids": ids, "token_indices_to_pool": positions}
        (row,) = self._rows("encode", body, 1)
        found, _ = read_positions(row, len(positions), self.num_labels)
        # Positions whose keys and values were cached have no hidden state. The trace is cached now: one token each.
        missing = [position for position, value in zip(positions, found, strict=True) if value is None]
        others = dict(zip(missing, self._at_ends([ids[: end + 1] for end in missing]), strict=True))
        return [others[p] if value is None else value for p, value in zip(positions, found, strict=True)]

    def _at_ends(self, traces: Sequence[Sequence[int]]) -> list[float]:
        """Values at the last tokens."""
        values: list[float] = []
        while len(values) < len(traces):
            some, tokens = 0, 0
            for trace in traces[len(values) :]:
                if some and tokens + len(trace) > TOKENS_A_POST:
                    break
                some, tokens = some + 1, tokens + len(trace)
            page, body = request_of(traces[len(values) : len(values) + some], self.is_router)
            values += [read_row(row, self.num_labels).value for row in self._rows(page, body, some)]
        return values

    def _rows(self, page: str, body: Mapping[str, object], count: int) -> list[list[float]]:
        """The numbers of so many replies; what may pass is tried again. Raises EngineError."""
        failures = 0
        while True:
            try:
                return read_rows(self._http.post(f"{self.url}/{page}", json=body), count)
            except httpx.TimeoutException:
                raise EngineError(f"{self.url} did not answer within {self._http.timeout.read:g} s") from None
            except (httpx.HTTPError, ServerLost) as error:
                raise EngineError(f"{self.url} is out of reach: {first_line(error)}") from error
            except TryFailed as error:
                failures += 1
                if failures == self.retry.attempts:
                    raise EngineError(f"{self.url} failed {failures} times, last with {error}") from None
            time.sleep(self.retry.pause(failures))

    # What is it?

    def _meet(self) -> dict[str, ValueServerInfo]:
        """Of each server behind this URL. Raises UserError."""
        try:
            urls = [self.url]
            if self._http.get(f"{self.url}/server_info").status_code == 404:  # a router
                workers = self._http.get(f"{self.url}/workers").json()["workers"]
                urls = [worker["url"] for worker in workers if worker["is_healthy"]]
                if not urls:
                    raise UserError(f"the router at {self.url} has no healthy server")
            infos = {
                url: read_value_info(*(self._page(url, page) for page in ("model_info", "server_info"))) for url in urls
            }
        except httpx.HTTPError as error:
            raise UserError(
                f"no server answers at {self.url} ({first_line(error)}); start one with python -m engine_lib.value_server"
            ) from error
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{self.url} does not answer as an SGLang server does ({error!r})") from error
        for url, info in infos.items():
            if info.generates or not set(info.architectures) & set(ARCHITECTURES):
                raise UserError(
                    f"{url} serves {info.model_path}, a {', '.join(info.architectures)}, which is no value model"
                )
        return infos

    def _page(self, url: str, page: str) -> dict[str, object]:
        return self._http.get(f"{url}/{page}").raise_for_status().json()

    def _vocab_size(self, url: str, info: ValueServerInfo) -> int:
        if not (Path(info.model_path) / "config.json").is_file():
            raise UserError(
                f"{url} serves {info.model_path}, which is not on this machine: give vocab_size, that of its config.json "
                "(an id outside it would end the server)"
            )
        return inspect_model(Path(info.model_path), url).vocab_size

    def _count_labels(self) -> int:
        page, body = request_of([[0]], self.is_router)
        (row,) = self._rows(page, body, 1)
        if len(row) - 1 not in LABELS:
            raise UserError(
                f"{self.url} answers {len(row)} numbers, which are no values: engine_lib.sglang_value_model failed to load "
                "there; start it with python -m engine_lib.value_server"
            )
        return len(row) - 1
