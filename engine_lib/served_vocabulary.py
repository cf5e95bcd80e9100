"""Does an SGLang server mean the same by a token id as we do? Names and architectures do not tell."""

import logging
from collections.abc import Iterable
from typing import Any

import httpx

from common_lib.cli import UserError
from common_lib.concurrency import gather_all
from engine_lib.base import EngineError, first_line
from engine_lib.http_client import make_client

logger = logging.getLogger(__name__)

ANSWER_S = 60.0  # a busy server may take its time
MOST_IDS = 2000  # that a server is asked for the text of, besides those that were added to the vocabulary
SHOWN = 3


async def check_vocabulary(urls: Iterable[str], tokenizer: Any, num_embeddings: int, what: str) -> None:
    """Ask every server, not a router: has it `num_embeddings` token ids, and, where it has a tokenizer, does it read them as
    ours does? what: the model and its flag, for messages. Raises UserError, EngineError where one does not answer."""
    ours = sample_texts(tokenizer)
    async with make_client() as client:
        await gather_all(_check_server(client, url, ours, num_embeddings, what) for url in urls)


def sample_texts(tokenizer: Any) -> dict[int, str]:
    """The text of every so manieth id, and of all added ones."""
    ids = sorted(tokenizer.get_vocab().values())
    chosen = sorted({*ids[:: -(-len(ids) // MOST_IDS)], *tokenizer.get_added_vocab().values()})
    return {number: tokenizer.decode([number], skip_special_tokens=False) for number in chosen}


async def _check_server(
    client: httpx.AsyncClient, url: str, ours: dict[int, str], num_embeddings: int, what: str
) -> None:
    last, beyond = [await _takes(client, url, number) for number in (num_embeddings - 1, num_embeddings)]
    if not last or beyond:
        raise UserError(
            f"{url} has {'more' if beyond else 'fewer'} token ids than the {num_embeddings} of {what}: it serves another model; "
            "give the URL of a server of this one"
        )
    asked = {"tokens": [[number] for number in ours], "skip_special_tokens": False}
    status, reply = await _ask(client, f"{url}/detokenize", asked)
    if status != 200:  # it was started with --skip-tokenizer-init, as it may be
        logger.info("%s has no tokenizer to compare with; it has as many token ids as %s", url, what)
        return
    theirs = dict(zip(ours, reply["text"], strict=True))
    if different := [number for number, text in ours.items() if _bare(theirs[number]) != _bare(text)]:
        shown = "; ".join(
            f"{number} is {theirs[number]!r} there and {ours[number]!r} here" for number in different[:SHOWN]
        )
        raise UserError(
            f"{url} has another tokenizer than {what} ({len(different)} of {len(ours)} token ids differ: {shown}); "
            "all generators must share one"
        )


async def _takes(client: httpx.AsyncClient, url: str, number: int) -> bool:
    """Whether a token id is one of the server's: a bias of an id that it does not have is refused, a bias of 0 does nothing.

    SGLang 0.5.23 looks at this in sampling_params.verify; it says the size of its vocabulary nowhere.
    """
    params = {"max_new_tokens": 1, "temperature": 0, "logit_bias": {str(number): 0.0}}
    status, reply = await _ask(client, f"{url}/generate", {"input_ids": [0], "sampling_params": params})
    if status not in (200, 400):
        raise EngineError(f"{url} does not tell its vocabulary ({status}: {str(reply)[:200]})")
    return status == 200


async def _ask(client: httpx.AsyncClient, url: str, body: dict[str, Any]) -> tuple[int, Any]:
    """Status and body of a reply. Raises EngineError."""
    try:
        response = await client.post(url, json=body, timeout=ANSWER_S)
        return response.status_code, response.json() if response.status_code == 200 else response.text
    except (httpx.HTTPError, ValueError) as error:
        raise EngineError(f"{url} does not answer ({first_line(error)})") from error


def _bare(text: str) -> str:
    """Without spaces, of which libraries clean up some."""
    return "".join(text.split())
