"""inference_eval.py with a simulated generator and scorer in the place of the two models; all else is the real script.

    python tests/simulated_eval.py --benchmark problems.jsonl --piref_model TINY --classifier_ckpt_path TINY_VALUE ...

Both are pure functions of what they are asked, so runs can be compared byte by byte. SIM_SECONDS is the mean time of a
block.
"""

import asyncio
import os
import random
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

import tokenizers
from simulated import SimScorer, sim_block

import inference_eval
from common_lib import models
from common_lib.cli import run_script
from engine_lib.base import Reply

BLOCK_SECONDS = float(os.environ.get("SIM_SECONDS", "0.02"))


class SimEngine:
    """Answers after a random time; the stop token is the first stop id."""

    name, context_length, vocab_size = "simulated", 1 << 20, 264

    def describe(self):
        return {"name": self.name}

    async def generate(self, requests):
        return list(await asyncio.gather(*(self.one(request) for request in requests)))

    async def one(self, request):
        await asyncio.sleep(random.expovariate(1 / BLOCK_SECONDS))
        block = sim_block(request.prompt_ids, request.seed, request.max_new_tokens)
        tokens = [*block.token_ids[:-1], request.stop_ids[0]] if block.finish_reason == "stop" else block.token_ids
        return Reply(tokens, block.finish_reason, len(request.prompt_ids))

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


class ClosableScorer(SimScorer):
    def close(self):
        pass


if __name__ == "__main__":
    inference_eval.make_engine = lambda *args, **settings: SimEngine()
    inference_eval.load_scorer = lambda args, plan: ClosableScorer(delay=lambda tokens: BLOCK_SECONDS / 20)
    inference_eval.load_tokenizer = models.load_tokenizer = PlainTokenizer
    inference_eval.quiet_transformers = lambda: None
    inference_eval.resolve_device = lambda name, flag: "cpu"
    inference_eval.limit_cpu_threads = lambda: None
    run_script(inference_eval.main)
