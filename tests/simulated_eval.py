"""inference_eval.py with a simulated generator and scorer in the place of the two models; all else is the real script.

    python tests/simulated_eval.py --benchmark problems.jsonl --piref_model TINY --classifier_ckpt_path TINY_VALUE ...

Both are pure functions of what they are asked, so runs can be compared byte by byte. SIM_SECONDS is the mean time of a
block.
"""

import asyncio
import os
import random
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

import tokenizers
from simulated import SimScorer, sim_block

import inference_eval
from common_lib.cli import run_script

BLOCK_SECONDS = float(os.environ.get("SIM_SECONDS", "0.02"))


BOX = [59, 69, 65, 78, 87]  # "\\fbox" in the tiny tokenizer, whose bytes 15 to 24 are the digits


class SimEngine:
    """Answers after a random time; the stop token is the first stop id, before it an answer, mostly 0."""

    name, context_length, vocab_size = "simulated", 1 << 20, 264

    def describe(self):
        return {"name": self.name}

    async def generate(self, requests):
        return list(await asyncio.gather(*(self.one(request) for request in requests)))

    async def one(self, request):
        await asyncio.sleep(random.expovariate(1 / BLOCK_SECONDS))
        reply = sim_block(request.prompt_ids, request.seed, request.max_new_tokens, 0.3, stop=request.stop_ids[0])
        if reply.finish_reason == "length" or request.max_new_tokens < len(BOX) + 2:
            return reply
        digit = random.Random(hash((tuple(request.prompt_ids), request.seed, 1))).choice("000000000123")
        return replace(reply, token_ids=[*BOX, 15 + int(digit), *reply.token_ids[-1:]])

    async def close(self):
        pass


class PlainTokenizer:
    """The tokenizer without the transformers library, whose import would be most of a short run's time."""

    eos_token_id = 256

    def __init__(self, folder, flag):
        self.tokenizer = tokenizers.Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))

    def get_vocab(self):
        return self.tokenizer.get_vocab()

    def __call__(self, text, add_special_tokens):
        return SimpleNamespace(input_ids=self.tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, ids, **settings):
        return self.tokenizer.decode(ids, skip_special_tokens=True)


LOADERS = inference_eval.Loaders(
    engine=lambda args, plan: SimEngine(),
    scorer=lambda args, plan, memory, servers: SimScorer(delay=lambda tokens: BLOCK_SECONDS / 20),
    tokenizer=PlainTokenizer,
)

if __name__ == "__main__":
    run_script(lambda argv: inference_eval.main([*sys.argv[1:], "--device", "cpu"], LOADERS))
