"""What every generator has in common: requests, replies, the interface, and the checks before anything is asked."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Request:
    """One continuation to write. `temperature` 0 is greedy; `seed` is in 0 .. 2**31 - 1; requests of one `group` (one
    search tree) share prefixes, so they are kept on one server (engine_lib/placement.py)."""

    prompt_ids: list[int]
    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    stop_ids: tuple[int, ...] = ()
    seed: int = 0
    group: str = ""


@dataclass(frozen=True, slots=True)
class Reply:
    """`token_ids` includes the stop token where there is one; `cached_tokens` of the `prompt_tokens` cost nothing."""

    token_ids: list[int]
    finish_reason: str  # "stop", "length" or "abort"
    prompt_tokens: int
    cached_tokens: int = 0


@dataclass(frozen=True)
class EngineConfig:
    """How a generator is run. Each engine takes of it what it knows."""

    model_path: str
    vocab_size: int
    device: str = "cpu"
    attention: str = "auto"  # of the transformers engine
    seed: int = 0
    samples: bool = True  # not greedy
    deterministic: bool = False  # SGLang's deterministic inference, which keeps to the requests' seeds
    seeded: bool = False  # SGLang draws by the requests' seeds (engine_lib.seeded)
    request_timeout_s: float = 3600.0
    groups_at_once: int = 0  # searches or problems; 0: not known
    requests_at_once: int = 0  # of all of them; 0: not known
    gpu_share: float = 0.5  # SGLang's mem_fraction_static
    gpu_share_given: bool = False  # by the user
    sglang_args: tuple[str, ...] = ()  # KEY=VALUE
    sglang_urls: tuple[str, ...] = ()
    model_flag: str = "--piref_model"  # which flags gave model and servers, for messages
    url_flag: str = "--sglang_url"


class EngineError(RuntimeError):
    """The engine is dead or out of reach. The message is one line; the run ends with it, its journal kept."""


def first_line(error: BaseException) -> str:
    """What an exception says, for a message of one line."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


class Engine(Protocol):
    """What a search needs of a generator. `generate` may be called many times at once, and may be cancelled."""

    name: str
    context_length: int  # most tokens of prompt and continuation together
    vocab_size: int

    async def generate(self, requests: Sequence[Request]) -> list[Reply]: ...

    async def close(self) -> None:
        """Abort what still runs. Can be called twice."""

    def describe(self) -> dict[str, object]:
        """Versions, device and settings, JSON-able, for the run's meta file."""


def check_requests(requests: Sequence[Request], context_length: int, vocab_size: int) -> None:
    """Raise ValueError for what would crash an engine: ids outside the vocabulary, an empty or too long prompt."""
    for request in requests:
        if not request.prompt_ids:
            raise ValueError("a request has an empty prompt")
        if request.max_new_tokens < 1:
            raise ValueError(f"a request asks for {request.max_new_tokens} new tokens; at least 1 is needed")
        total = len(request.prompt_ids) + request.max_new_tokens
        if total > context_length:
            raise ValueError(
                f"a request of {len(request.prompt_ids)} prompt tokens and {request.max_new_tokens} new ones is longer "
                f"than the generator's context of {context_length}"
            )
        for token in (min(request.prompt_ids), max(request.prompt_ids)):
            if not 0 <= token < vocab_size:
                raise ValueError(f"token id {token} is outside the generator's vocabulary of {vocab_size}")
