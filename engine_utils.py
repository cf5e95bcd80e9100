"""Generators behind one small asynchronous interface, and the embedded one: transformers in this process.

SGLang, in process and as servers, is in sglang_utils.py; `make_engine` chooses.
"""

import asyncio
import importlib.util
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

logger = logging.getLogger(__name__)

FINISH_REASONS = ("stop", "length", "abort")


@dataclass(frozen=True, slots=True)
class Request:
    """One continuation to write. `temperature` 0 is greedy; `seed` is in 0 .. 2**31 - 1; requests of one `group` (one
    search tree) share prefixes, so servers keep them together."""

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
    finish_reason: str  # one of FINISH_REASONS
    prompt_tokens: int
    cached_tokens: int = 0


class EngineError(RuntimeError):
    """The engine is dead or out of reach. The message is one line; the run ends with it, its journal kept."""


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
        lowest, highest = min(request.prompt_ids), max(request.prompt_ids)
        if lowest < 0 or highest >= vocab_size:
            bad = lowest if lowest < 0 else highest
            raise ValueError(f"token id {bad} is outside the generator's vocabulary of {vocab_size}")


# ---------------------------------------------------------------------------------------------------------------------
# Sampling: every row draws from noise of its own


def row_uniforms(seeds, step: int):
    """One number in [0, 1) for each seed at this step: a function of (seed, step) and nothing else.

    seeds: uint64 [rows] (numpy). Returns float64 [rows]. Two rounds of the SplitMix64 finalizer (Steele, Lea and Flood
    2014, "Fast splittable pseudorandom number generators") as a counter-based generator.
    """
    import numpy as np

    def mix(x):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))

    golden = np.uint64(0x9E3779B97F4A7C15)
    with np.errstate(over="ignore"):
        state = mix(mix(seeds.astype(np.uint64) + golden) + golden * np.uint64(step + 1))
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53


def sample_rows(logits, temperatures, top_ps, uniforms):
    """One token a row by inverse-transform sampling from the nucleus (Holtzman et al. 2020, arXiv 1904.09751).

    logits: float [rows, vocab]. temperatures (0: greedy), top_ps, uniforms: float64 [rows] on the logits' device.
    The nucleus is the smallest set of most probable tokens whose mass reaches top_p. Equal probabilities are ordered
    by token id, so that a draw depends on the row alone. Returns int64 [rows].
    """
    import torch

    greedy = logits.argmax(dim=-1)
    if bool((temperatures == 0).all()):
        return greedy
    scale = torch.where(temperatures == 0, torch.ones_like(temperatures), temperatures)
    # Sorted for every row, also where top_p is 1: a row must not be drawn otherwise beside one that needs the order.
    logits, order = torch.sort(logits, dim=-1, descending=True, stable=True)
    probs = torch.softmax(logits.double() / scale[:, None], dim=-1)
    mass_before = probs.cumsum(dim=-1) - probs
    probs = torch.where(mass_before < top_ps[:, None], probs, torch.zeros_like(probs))
    cumulative = probs.cumsum(dim=-1)
    # Scaled to the kept mass, and below it even after rounding, so that no token of probability zero is drawn.
    total = cumulative[:, -1]
    drawn = torch.minimum(uniforms * total, torch.nextafter(total, torch.zeros_like(total)))
    index = torch.searchsorted(cumulative, drawn[:, None], right=True)
    token = order.gather(1, index).squeeze(1)
    return torch.where(temperatures == 0, greedy, token)


# ---------------------------------------------------------------------------------------------------------------------
# The embedded engine


class TransformersEngine:
    """transformers' `generate` in this process: waiting requests are batched, one batch runs at a time in a thread.

    It writes the same tokens whatever else is in the batch, to floating-point rounding of the model. Requests of one
    prompt in one batch share its cache (that is what `cached_tokens` counts); none is kept between batches, and a batch
    lasts as long as its longest row: SGLang is the fast engine.
    """

    name = "transformers"

    def __init__(
        self, model_path: str, device: str = "cpu", dtype: str = "auto", attn_implementation: str = "auto",
        max_batch_tokens: int = 1 << 18, max_batch_rows: int = 1024,
    ):  # fmt: skip
        """`max_batch_tokens` bounds rows x (prompt + new tokens) of one batch, and so its cache and, on a CPU, how long an
        interruption waits for it (default: 2^18 on a GPU, 2^15 on a CPU)."""
        import torch
        import transformers

        from classifier_lib import resolve_attn_implementation

        wanted = {"auto": torch.bfloat16 if device.startswith("cuda") else torch.float32}
        self.dtype = wanted.get(dtype) or getattr(torch, {"bf16": "bfloat16", "fp32": "float32"}.get(dtype, dtype))
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            model_path,
            dtype=self.dtype,
            attn_implementation=resolve_attn_implementation(attn_implementation, self.dtype),
        )
        self.model.to(device).eval()
        # The checkpoint's own sampling defaults must not leak in: every request says what it wants.
        self.model.generation_config = transformers.GenerationConfig()
        self.context_length = self.model.config.max_position_embeddings
        self.vocab_size = self.model.get_input_embeddings().num_embeddings
        self.model_path, self.device = str(model_path), device
        self.max_batch_tokens = max_batch_tokens or (1 << 18 if device.startswith("cuda") else 1 << 15)
        self.max_batch_rows = max_batch_rows
        self._waiting: list[tuple[Request, asyncio.Future]] = []
        self._drain_task: asyncio.Task | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="generate")
        self._closed = False

    def describe(self) -> dict[str, object]:
        import torch
        import transformers

        return {
            "name": self.name,
            "transformers": transformers.__version__,
            "torch": torch.__version__,
            "device": self.device,
            "dtype": str(self.dtype).removeprefix("torch."),
            "attention": self.model.config._attn_implementation,
        }

    async def generate(self, requests: Sequence[Request]) -> list[Reply]:
        if self._closed:
            raise EngineError("the transformers engine has been closed")
        check_requests(requests, self.context_length, self.vocab_size)
        futures = [asyncio.get_running_loop().create_future() for _ in requests]
        self._waiting += zip(requests, futures, strict=True)
        if self._drain_task is None or self._drain_task.done():
            self._drain_task = asyncio.create_task(self._drain())
        return list(await asyncio.gather(*futures))

    async def close(self) -> None:
        self._closed = True
        for _, future in self._waiting:
            future.cancel()
        self._waiting.clear()
        if self._drain_task is not None and not self._drain_task.done():
            await asyncio.gather(self._drain_task, return_exceptions=True)
        self._thread.shutdown(wait=True)

    async def _drain(self) -> None:
        while self._waiting:
            await asyncio.sleep(0)  # every search that is ready may enter the batch first
            batch = self._take_batch()
            if not batch:
                continue
            work = asyncio.get_running_loop().run_in_executor(self._thread, self._run, [r for r, _ in batch])
            try:
                outcomes: list[Reply | BaseException] = list(await work)
            except Exception as error:
                outcomes = [EngineError(f"the transformers engine failed: {error}")] * len(batch)
            for (_, future), outcome in zip(batch, outcomes, strict=True):
                if future.done():  # cancelled meanwhile
                    continue
                if isinstance(outcome, BaseException):
                    future.set_exception(outcome)
                else:
                    future.set_result(outcome)

    def _take_batch(self) -> list[tuple[Request, asyncio.Future]]:
        """The longest-waiting requests that fit together."""
        self._waiting = [(request, future) for request, future in self._waiting if not future.done()]
        longest = 0
        for count, (request, _) in enumerate(self._waiting):
            longest = max(longest, len(request.prompt_ids) + request.max_new_tokens)
            if count and (count >= self.max_batch_rows or (count + 1) * longest > self.max_batch_tokens):
                break
        else:
            count = len(self._waiting)
        batch, self._waiting = self._waiting[:count], self._waiting[count:]
        return batch

    def _run(self, requests: list[Request]) -> list[Reply]:
        """One batch; halved, and said, where the device runs out of memory."""
        import torch

        try:
            return self._run_batch(requests)
        except torch.OutOfMemoryError:
            if len(requests) == 1:
                raise
            torch.cuda.empty_cache()
            half = (len(requests) + 1) // 2
            self.max_batch_rows = half
            logger.warning("out of GPU memory with %d rows in a batch: going on with %d", len(requests), half)
        return self._run(requests[:half]) + self._run(requests[half:])

    def _run_batch(self, requests: list[Request]) -> list[Reply]:
        import torch
        from transformers import LogitsProcessorList, StoppingCriteriaList

        width = max(len(r.prompt_ids) for r in requests)
        # Continuations of one beam have one prompt: it is read once, and its cache given to each of their rows.
        prompts = {prompt: i for i, prompt in enumerate(dict.fromkeys(tuple(r.prompt_ids) for r in requests))}
        ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=self.device)
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=self.device)
        prompt_of = [prompts[tuple(r.prompt_ids)] for r in requests]
        row_of = torch.tensor(prompt_of, device=self.device)
        rows = _BatchRows(requests, width, self.device, lambda: self._closed)
        with torch.inference_mode():
            cache = None
            if len(prompts) < len(requests) and width > 1:
                positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, :-1]
                cache = self.model.base_model(
                    ids[:, :-1], attention_mask=mask[:, :-1], position_ids=positions, use_cache=True
                ).past_key_values
                cache.batch_select_indices(row_of)
            out = self.model.generate(
                input_ids=ids[row_of],
                attention_mask=mask[row_of],
                past_key_values=cache,
                max_new_tokens=max(r.max_new_tokens for r in requests),
                do_sample=False,
                pad_token_id=0,
                logits_processor=LogitsProcessorList([rows.choose]),
                stopping_criteria=StoppingCriteriaList([rows.is_done]),
            )
        shared = [cache is not None and prompt in prompt_of[:row] for row, prompt in enumerate(prompt_of)]
        return [rows.reply(row, new, shared[row]) for row, new in enumerate(out[:, width:].tolist())]


class _BatchRows:
    """What `generate` asks about the rows of a batch at each step: which token, and which rows are done."""

    def __init__(self, requests: list[Request], width: int, device: str, stopped):
        import numpy as np
        import torch

        self.requests, self.width, self.stopped = requests, width, stopped
        self.seeds = np.array([r.seed for r in requests], dtype=np.uint64)
        self.temperatures = torch.tensor([r.temperature for r in requests], dtype=torch.float64, device=device)
        self.top_ps = torch.tensor([r.top_p for r in requests], dtype=torch.float64, device=device)
        self.limits = torch.tensor([r.max_new_tokens for r in requests], device=device)
        self.all_stops = torch.tensor(
            sorted({s for r in requests for s in r.stop_ids}), dtype=torch.long, device=device
        )
        self.is_stop = torch.tensor(
            [[s in r.stop_ids for s in self.all_stops.tolist()] for r in requests], device=device
        )

    def choose(self, input_ids, logits):
        """As a logits processor: everything but the drawn token is made impossible."""
        import torch

        uniforms = torch.from_numpy(row_uniforms(self.seeds, input_ids.shape[1] - self.width)).to(logits.device)
        token = sample_rows(logits, self.temperatures, self.top_ps, uniforms)
        return torch.full_like(logits, float("-inf")).scatter_(1, token[:, None], 0.0)

    def is_done(self, input_ids, scores, **kwargs):
        done = self.limits <= input_ids.shape[1] - self.width
        if self.all_stops.numel():
            done = done | ((input_ids[:, -1:] == self.all_stops) & self.is_stop).any(dim=1)
        return done | self.stopped()

    def reply(self, row: int, new_tokens: list[int], shared: bool) -> Reply:
        """`shared`: an earlier row of the batch has read this prompt, all but its last token."""
        request = self.requests[row]
        tokens, reason = new_tokens[: request.max_new_tokens], "length"
        for at, token in enumerate(tokens):
            if token in request.stop_ids:
                tokens, reason = tokens[: at + 1], "stop"
                break
        if reason == "length" and len(tokens) < request.max_new_tokens:
            reason = "abort"  # closed in mid-batch
        return Reply(tokens, reason, len(request.prompt_ids), len(request.prompt_ids) - 1 if shared else 0)


def choose_engine(kind: str) -> str:
    """The engine's name for `auto`: sglang where it is installed, else transformers, which is said loudly."""
    if kind != "auto":
        return kind
    if importlib.util.find_spec("sglang") is not None:
        return "sglang"
    logger.warning("engine: sglang is not installed; using transformers' generate, which is much slower on a GPU")
    return "transformers"


def make_engine(kind: str, generator: Any, *, device: str, args: Any) -> Engine:
    """The engine of that name for a `model_utils.ModelInfo`, set up by the flags of inference_eval.py in `args`."""
    if kind == "transformers":
        return TransformersEngine(generator.path, device, attn_implementation=args.attention_impl)
    from sglang_utils import make_sglang_engine

    return make_sglang_engine(kind, generator, device=device, args=args)
