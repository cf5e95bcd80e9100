"""`--seeded`: SGLang draws each token by the request's own seed and position, as the transformers engine does.

SGLang has no seeds of its own outside its deterministic inference, but takes a custom logit processor with a request:
`engine_lib.sampling.SeededSampler` draws the token and leaves SGLang no other.
"""

import functools
import json
import pickle
import zlib
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from common_lib.cli import UserError
from engine_lib.base import Reply, Request


class _FromSource:
    """Unpickled, it is the class SeededSampler, made from the text of its file.

    The scheduler of a server cannot import this project, and the byte code that dill would send for a class fits one
    version of Python only.
    """

    def __reduce__(self):
        source = zlib.compress(Path(__file__).with_name("sampling.py").read_bytes(), 9)
        made = "(exec(__import__('zlib').decompress(source), names), names['SeededSampler'])[1]"
        return eval, (made, {"source": source, "names": {"__name__": "seeded_sampling"}})


@functools.cache
def logit_processor() -> str:
    """SeededSampler as SGLang takes it: JSON of a pickle in hexadecimal digits."""
    return json.dumps({"callable": pickle.dumps(_FromSource()).hex()})


def seeded_params(request: Request) -> dict[str, Any]:
    """What a request's sampling parameters have in the place of its temperature and top_p. SGLang itself is to take the
    largest logit, the only one: at temperature 0 it needs no sort and no noise."""
    draw = {"seed": request.seed, "temperature": request.temperature, "top_p": request.top_p}
    return {"temperature": 0.0, "top_p": 1.0, "custom_params": draw}


def check_seeded(takes_processors: bool, speculative: str | None, who: str, remedy: str) -> None:
    """Raises UserError where an SGLang of these settings cannot draw by seeds."""
    if not takes_processors:
        raise UserError(f"--seeded: {who} without custom logit processors; {remedy}")
    if speculative:
        raise UserError(
            f"--seeded: {who} with speculative decoding, which draws several tokens a step; leave one of them out"
        )


async def check_drawn(ask: Callable[[Request], Awaitable[Reply]], url: str) -> None:
    """Raises UserError where the sampler does not get through: sglang-router 0.3.2 drops it, and all texts would be
    greedy, without a word. Two seeds draw eight tokens each, all of the vocabulary nearly equally likely."""
    one, other = [await ask(Request([0], 8, temperature=100.0, seed=seed)) for seed in (1, 2)]
    if one.token_ids == other.token_ids:
        raise UserError(
            f"--seeded: {url} does not draw by seeds, as a router in front of servers that drops custom logit processors; "
            "give --sglang_url of each server itself"
        )
