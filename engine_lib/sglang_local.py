"""The generator on SGLang's engine inside this process."""

import contextlib
from collections.abc import Sequence
from typing import Any

from common_lib.concurrency import gather_all
from engine_lib.base import EngineConfig, Reply, Request, check_requests
from engine_lib.placement import Placement, warn_of_few_groups
from engine_lib.seeded import logit_processor
from engine_lib.sglang_import import command_line
from engine_lib.sglang_process import SGLangProcess, refusals
from engine_lib.sglang_wire import data_parallel_ranks, engine_settings, longest_request, sampling_params, to_reply


class SGLangEngine:
    """`sgl.Engine`, each search on one of its data-parallel ranks."""

    name = "sglang"

    def __init__(self, config: EngineConfig, start_grace_s: float = 20.0):
        """A start that failed has `start_grace_s` to say why. Raises UserError for settings that cannot be and where
        sglang is not installed, EngineError where the engine does not start."""
        self.vocab_size, self.deterministic = config.vocab_size, config.deterministic
        self.request_timeout_s = config.request_timeout_s
        self.seeded = config.seeded
        settings = engine_settings(config, command_line)
        self._process = SGLangProcess("SGLang generator engine", settings, start_grace_s)
        self._engine = self._process.engine
        self.context_length = longest_request(self._process.info["max_req_input_len"])
        self.pool_tokens = self._process.info["max_total_num_tokens"]
        self.ranks = range(data_parallel_ranks(self._process.resolved()))
        self._placement: Placement[int] = Placement(config.groups_at_once)  # used in the engine's thread only
        warn_of_few_groups(config.groups_at_once, len(self.ranks), "data-parallel ranks")

    def describe(self) -> dict[str, object]:
        return {
            "name": self.name,
            "deterministic": self.deterministic,
            "seeded": self.seeded,
            "context_length": self.context_length,
            "kv_pool_tokens": self.pool_tokens,
            **self._process.describe(),
        }

    async def generate(self, requests: Sequence[Request]) -> list[Reply]:
        check_requests(requests, self.context_length, self.vocab_size)
        longest = max((request.max_new_tokens for request in requests), default=0)
        return await self._process.run(
            lambda: self._ask(requests),
            self.request_timeout_s,
            f"the SGLang generator engine did not write {longest} tokens within --request_timeout "
            f"{self.request_timeout_s:g} s",
        )

    async def close(self) -> None:
        await self._process.close()

    async def _ask(self, requests: Sequence[Request]) -> list[Reply]:
        """In the engine's thread: each group's requests to its rank, which has read what they share."""
        replies: dict[int, Reply] = {}

        async def ask(rank: int, rows: list[int]) -> None:
            replies.update(zip(rows, await self._ask_rank(rank, [requests[row] for row in rows]), strict=True))

        with contextlib.ExitStack() as stack:
            places = [stack.enter_context(self._placement.use(request.group, self.ranks)) for request in requests]
            rows_of = {rank: [row for row, place in enumerate(places) if place == rank] for rank in set(places)}
            await gather_all(ask(rank, rows) for rank, rows in rows_of.items())
        return [replies[row] for row in range(len(requests))]

    async def _ask_rank(self, rank: int, requests: Sequence[Request]) -> list[Reply]:
        settings: dict[str, Any] = {
            "input_ids": [request.prompt_ids for request in requests],
            "sampling_params": [sampling_params(request, self.deterministic, self.seeded) for request in requests],
        }
        if self.seeded:
            settings["custom_logit_processor"] = logit_processor()
        if len(self.ranks) > 1:  # one rank for the whole list; left alone, sglang goes from rank to rank
            settings["routed_dp_rank"] = rank
        with refusals():
            outputs = await self._engine.async_generate(**settings)
        return [to_reply(request, output) for request, output in zip(requests, outputs, strict=True)]
