"""What is said to SGLang servers and routers and how their answers are read; which server a request prefers. No I/O."""

import contextlib
import hashlib
import json
import math
import os
import urllib.parse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import httpx

from common_lib.cli import UserError
from engine_lib.base import EngineError, Reply, Request
from engine_lib.sglang_wire import longest_request, to_reply

LOAD_BOUND = 1.25  # a server may have this much more than its share of the running requests
RETRY_STATUS = (408, 429, 500, 502, 504)


class ServerLost(Exception):
    """The server cannot be reached; another one may be."""


class RequestFailed(Exception):
    """The server failed on a request; it may be tried again."""


@dataclass(frozen=True)
class ServerInfo:
    """What a server says of itself. `longest`: most tokens of prompt and continuation."""

    model_path: str
    architectures: tuple[str, ...]
    longest: int
    kv_pool_tokens: int | None
    deterministic: bool
    sglang: str | None


def check_url(url: str) -> str:
    """`http://host:port`, without a trailing slash. Raises UserError."""
    parts = urllib.parse.urlsplit(url)
    try:
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        valid = False
    if not valid:
        raise UserError(f"--sglang_url {url!r} is no URL of a server; give http://HOST:PORT")
    return url.rstrip("/")


class Loaded(Protocol):
    """A server with so many requests running."""

    url: str

    @property
    def load(self) -> int: ...


S = TypeVar("S", bound=Loaded)


def choose_server(servers: Sequence[S], group: str) -> S:
    """The group's most preferred server that has room for one more request.

    Preference is rendezvous hashing (Thaler and Ravishankar 1998): a server that goes or comes changes only the groups
    that prefer it. Room is a bounded load (Mirrokni et al. 2018, arXiv 1608.01350): no more than LOAD_BOUND times the
    server's share of all running requests, this one included; so there is always one with room.
    """

    def preference(server: S) -> bytes:
        return hashlib.blake2b(f"{group}\n{server.url}".encode(), digest_size=8).digest()

    bound = math.ceil(LOAD_BOUND * (sum(server.load for server in servers) + 1) / len(servers))
    return max((server for server in servers if server.load < bound), key=preference)


def read_reply(url: str, request: Request, response: httpx.Response) -> Reply:
    """The reply of one `/generate`. Raises ServerLost, RequestFailed, or EngineError for what no second try can mend."""
    if response.status_code == 503:  # starting, ending, or a router without servers
        raise ServerLost(f"503: {message_of(response)}")
    if response.status_code in RETRY_STATUS:
        raise RequestFailed(f"{response.status_code}: {message_of(response)}")
    if response.status_code != 200:
        raise EngineError(f"{url} refused a request ({response.status_code}): {message_of(response)}")
    try:
        return to_reply(request, response.json())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RequestFailed(f"its reply is not SGLang's ({type(error).__name__}: {error})") from error


def read_json(response: httpx.Response) -> Any:
    """The body of a question about the server. Raises ServerLost where it is not ready, EngineError for another kind of
    server."""
    if response.status_code in (503, *RETRY_STATUS):
        raise ServerLost(f"{response.url.path} says {response.status_code}: {message_of(response)}")
    try:
        return response.raise_for_status().json()
    except (httpx.HTTPStatusError, ValueError) as error:
        raise not_sglang(response, error) from error


def read_info(model: Mapping[str, Any], server: Mapping[str, Any]) -> ServerInfo:
    """From the bodies of /model_info and /server_info. Raises KeyError, TypeError or ValueError for other bodies."""
    return ServerInfo(
        model_path=str(model["model_path"]),
        architectures=tuple(model.get("architectures") or ()),
        longest=longest_request(int(server["max_req_input_len"])),
        kv_pool_tokens=server.get("max_total_num_tokens"),
        deterministic=bool(server.get("enable_deterministic_inference")),
        sglang=server.get("version"),
    )


def not_sglang(response: httpx.Response, error: BaseException) -> EngineError:
    return EngineError(f"{response.url} does not answer as an SGLang server does ({say(error)})")


def same_model(served: str, path: Path) -> bool:
    """Whether the path or hub name that a server was started with is this folder, as far as names can tell."""
    if served == str(path) or (Path(served).exists() and Path(served).resolve() == path.resolve()):
        return True
    return f"models--{served.replace('/', '--')}" in path.resolve().parts  # the hub's cache


def architectures_of(path: Path) -> tuple[str, ...]:
    return tuple(json.loads((path / "config.json").read_text(encoding="utf-8")).get("architectures") or ())


def message_of(response: httpx.Response) -> str:
    """The error's text, in whichever form a server or a router gives it."""
    with contextlib.suppress(ValueError, AttributeError):
        body = response.json()
        error = body.get("error", body.get("detail", body))
        return str(error.get("message", error) if isinstance(error, dict) else error)[:500]
    return " ".join(response.text.split())[:500] or "no message"


def say(error: BaseException) -> str:
    """An exception in one line."""
    return " ".join(str(error).split()) or type(error).__name__


def headers() -> dict[str, str]:
    """SGLANG_API_KEY is the key that the servers were started with (`--api-key`), where they were."""
    key = os.environ.get("SGLANG_API_KEY")
    return {"Authorization": f"Bearer {key}"} if key else {}
