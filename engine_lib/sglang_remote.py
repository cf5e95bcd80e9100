"""SGLang servers, or an sglang-router in front of many, as the generator."""

import functools
import json
import logging
import uuid
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx

from common_lib.cli import UserError
from common_lib.concurrency import gather_all
from engine_lib import sglang_wire as wire
from engine_lib.base import EngineConfig, Reply, Request, check_requests, first_line
from engine_lib.seeded import check_drawn, check_seeded, logit_processor
from engine_lib.server_pool import PATIENCE, Patience, Server, ServerPool
from engine_lib.sglang_wire import ServerLost, TryFailed

logger = logging.getLogger(__name__)


class SGLangServerEngine(ServerPool):
    """Generation by HTTP `/generate`. A request whose server is lost goes to another; a server that is back is used."""

    name = "sglang-server"
    role, flag = "generator", "--sglang_url"

    def __init__(self, config: EngineConfig, patience: Patience = PATIENCE):
        """Ask every server what it runs: it should be `config.model_path`.

        Raises UserError for a server of another model, EngineError where none answers.
        """
        self.model_path, self.vocab_size = Path(config.model_path), config.vocab_size
        self.model_flag, self.flag = config.model_flag, config.url_flag
        self.deterministic, self.seeded = config.deterministic, config.seeded
        at_once = (config.groups_at_once, config.requests_at_once)
        super().__init__(config.sglang_urls, patience, config.request_timeout_s, *at_once)

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
        self._begin()
        return await gather_all(
            self._answer(request, request.group, f"wrote {request.max_new_tokens} tokens") for request in requests
        )

    def _body(self, request: Request) -> dict[str, object]:
        params = wire.sampling_params(request, self.deterministic, self.seeded)
        body: dict[str, object] = {"input_ids": request.prompt_ids, "sampling_params": params}
        return body | {"custom_logit_processor": logit_processor()} if self.seeded else body

    async def _post(self, server: Server, rank: int | None, request: Request) -> Reply:
        rid = uuid.uuid4().hex
        body = self._body(request) | {"rid": rid}
        if rank is not None:
            body["routed_dp_rank"] = rank
        return wire.read_reply(request, await self._send(server, "generate", body, request.group, [rid]))

    async def _examine(self, server: Server, infos: dict[str, Any]) -> None:
        if self.seeded:
            await check_drawn(functools.partial(self._draw, server), server.url)

    async def _draw(self, server: Server, request: Request) -> Reply:
        """The reply to a question about the server, which is told soon or not at all. Raises ServerLost."""
        try:
            url, limit = f"{server.url}/generate", self.patience.answer_s
            return wire.read_reply(request, await self._client.post(url, json=self._body(request), timeout=limit))
        except (httpx.HTTPError, TryFailed) as error:
            raise ServerLost(first_line(error)) from error

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
