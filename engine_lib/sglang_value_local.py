"""The value model on SGLang's engine inside this process, where the generator's may be too; it is started after that one."""

import logging
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engine_lib.base import EngineError
from engine_lib.retry import RequestsFailed, RetryPolicy, ask_again
from engine_lib.sglang_import import command_line, import_model_package
from engine_lib.sglang_process import SGLangProcess, refusals
from engine_lib.sglang_wire import longest_request
from engine_lib.value_base import ValueConfig, Valued, check_traces
from engine_lib.value_settings import PACKAGE, check_served_backbone, model_package, value_engine_settings
from engine_lib.value_wire import read_row, row_of

logger = logging.getLogger(__name__)


class SGLangValueEngine:
    """A `ValueEngine`: `sgl.Engine` as an embedding engine with the package engine_lib.sglang_value_model."""

    name = "sglang"

    def __init__(self, config: ValueConfig, start_grace_s: float = 20.0):
        """A start that failed has `start_grace_s` to say why. Raises UserError for a model that is not served, for
        settings that cannot be and where sglang or the model package cannot be imported, EngineError where the engine does
        not start."""
        check_served_backbone(Path(config.model_path))
        settings = value_engine_settings(config, command_line)
        self.num_labels, self.vocab_size = config.num_labels, config.vocab_size
        self.request_timeout_s = config.request_timeout_s
        self.retry = RetryPolicy()
        with model_package():
            import_model_package(PACKAGE)
            self._process = SGLangProcess("SGLang value engine", settings, start_grace_s, guest=True)
        self._engine = self._process.engine
        self.context_length = longest_request(self._process.info["max_req_input_len"])
        self.pool_tokens = self._process.info["max_total_num_tokens"]
        if self._process.resolved()["disable_radix_cache"]:
            logger.warning(
                "value engine: SGLang has switched its radix cache off, so every trace is read from the start; leave out "
                "what made it do so (deterministic inference with flashinfer does: give attention_backend=fa3)"
            )

    def describe(self) -> dict[str, object]:
        return {
            "name": self.name,
            "context_length": self.context_length,
            "kv_pool_tokens": self.pool_tokens,
            **self._process.describe(),
        }

    async def values(
        self, traces: Sequence[Sequence[int]], group: str, prefixes: Sequence[Sequence[int]] = ()
    ) -> list[Valued]:
        """See `ValueEngine`. All groups share the one cache, which is not lost while the engine lives."""
        check_traces(traces, self.context_length, self.vocab_size)
        return await self._process.run(
            lambda: self._ask(traces),
            self.request_timeout_s,
            f"the SGLang value engine did not score {len(traces)} traces within --request_timeout "
            f"{self.request_timeout_s:g} s",
        )

    async def close(self) -> None:
        await self._process.close()

    async def _ask(self, traces: Sequence[Sequence[int]]) -> list[Valued]:
        """In the engine's thread; aborted requests are sent again."""

        async def ask(rows: list[int]) -> list[Mapping[str, Any]]:
            return await self._embed([list(traces[row]) for row in rows])

        def fault(_: int, reply: Mapping[str, Any]) -> str:
            return "got abort" if row_of(reply) is None else ""

        try:
            replies = await ask_again(ask, len(traces), fault, "the SGLang value engine", self.retry)
        except RequestsFailed as error:
            raise EngineError(str(error)) from error
        return [read_row(row_of(reply) or (), self.num_labels) for reply in replies]

    async def _embed(self, traces: list[list[int]]) -> list[Mapping[str, Any]]:
        from sglang.srt.managers.io_struct import EmbeddingReqInput

        # The model counts by request id, so one of each its own.
        request = EmbeddingReqInput(input_ids=traces, rid=[uuid.uuid4().hex for _ in traces])
        with refusals():
            return await anext(self._engine.tokenizer_manager.generate_request(request, None))
