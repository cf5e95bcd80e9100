"""The embedded engine: transformers' `generate` in this process."""

import asyncio
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import transformers

from classifier_lib import resolve_attn_implementation
from common_lib.devices import set_thread_device
from engine_lib.base import EngineConfig, EngineError, Reply, Request, check_requests
from engine_lib.sampling import only_drawn

logger = logging.getLogger(__name__)

CPU_BATCH_TOKENS = 1 << 15
GPU_SHARE = 0.3  # the value model, loaded later, takes half of it and more, and both need room to work


class TransformersEngine:
    """transformers' `generate` in this process: waiting requests are batched, one batch runs at a time in a thread.

    It writes the same tokens whatever else is in the batch, to floating-point rounding of the model. Requests of one
    prompt in one batch share its cache (that is what `cached_tokens` counts); none is kept between batches, and a batch
    lasts as long as its longest row: SGLang is the fast engine.
    """

    name = "transformers"

    def __init__(self, config: EngineConfig, max_batch_tokens: int | None = None, max_batch_rows: int = 1024):
        """`max_batch_tokens` bounds rows x (prompt + new tokens) of one batch, and so its cache (None: what the device
        has room for). bf16 on a GPU, fp32 on a CPU."""
        self.device = config.device
        self.dtype = torch.bfloat16 if self.device.startswith("cuda") else torch.float32
        attention = resolve_attn_implementation(config.attention, self.dtype, self.device, "generator")
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            config.model_path, dtype=self.dtype, attn_implementation=attention
        )
        self.model.to(self.device).eval()
        # The checkpoint's own sampling defaults must not leak in: every request says what it wants.
        self.model.generation_config = transformers.GenerationConfig()
        self.context_length: int = self.model.config.max_position_embeddings
        self.vocab_size: int = self.model.get_input_embeddings().num_embeddings
        self.max_batch_tokens = max_batch_tokens or default_batch_tokens(self.model.config, self.dtype, self.device)
        self.max_batch_rows = max_batch_rows
        self._waiting: list[tuple[Request, asyncio.Future]] = []
        self._running: dict[int, asyncio.Future] = {}  # by id() of the running batch's requests
        self._drain_task: asyncio.Task | None = None
        self._thread = ThreadPoolExecutor(1, "generate", set_thread_device, (self.device,))
        self._closed = False

    def describe(self) -> dict[str, object]:
        return {
            "name": self.name,
            "transformers": transformers.__version__,
            "torch": torch.__version__,
            "device": self.device,
            "dtype": str(self.dtype).removeprefix("torch."),
            "attention": self.model.config._attn_implementation,
            "max_batch_tokens": self.max_batch_tokens,
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
            self._running = {id(request): future for request, future in batch}
            work = asyncio.get_running_loop().run_in_executor(self._thread, self._run, [r for r, _ in batch])
            (outcome,) = await asyncio.gather(work, return_exceptions=True)
            for row, (_, future) in enumerate(batch):
                if future.done():  # cancelled meanwhile
                    continue
                if isinstance(outcome, Exception):
                    future.set_exception(EngineError(f"the transformers engine failed: {outcome}"))
                else:
                    future.set_result(outcome[row])

    def _take_batch(self) -> list[tuple[Request, asyncio.Future]]:
        """The longest-waiting requests that fit together."""
        self._waiting = [(request, future) for request, future in self._waiting if not future.done()]
        count = longest = 0
        for request, _ in self._waiting[: self.max_batch_rows]:
            longest = max(longest, len(request.prompt_ids) + request.max_new_tokens)
            if count and (count + 1) * longest > self.max_batch_tokens:
                break
            count += 1
        batch, self._waiting = self._waiting[:count], self._waiting[count:]
        return batch

    def _is_unwanted(self, request: Request) -> bool:
        """Has whoever asked been cancelled? Then its row ends, and the batch with the last that is wanted."""
        return self._closed or self._running[id(request)].done()

    def _run(self, requests: list[Request]) -> list[Reply]:
        """One batch; halved, and said, where the device runs out of memory."""
        try:
            return self._run_batch(requests)
        except torch.OutOfMemoryError:
            if len(requests) == 1:
                raise
        # Not above: the error holds the failed batch's tensors.
        torch.cuda.empty_cache()
        half = (len(requests) + 1) // 2
        self.max_batch_rows = half
        logger.warning("out of GPU memory with %d rows in a batch: going on with %d", len(requests), half)
        return self._run(requests[:half]) + self._run(requests[half:])

    def _run_batch(self, requests: list[Request]) -> list[Reply]:
        start = max(len(r.prompt_ids) for r in requests)
        # Continuations of one beam have one prompt: it is read once, and its cache given to each of their rows.
        prompts = {prompt: i for i, prompt in enumerate(dict.fromkeys(tuple(r.prompt_ids) for r in requests))}
        ids = torch.tensor([[0] * (start - len(prompt)) + list(prompt) for prompt in prompts], device=self.device)
        mask = torch.tensor([[0] * (start - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=self.device)
        prompt_of = [prompts[tuple(r.prompt_ids)] for r in requests]
        row_of = torch.tensor(prompt_of, device=self.device)
        rows = _BatchRows(requests, start, self.device, self._is_unwanted)
        with torch.inference_mode():
            cache = None
            if len(prompts) < len(requests) and start > 1:
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
                logits_processor=transformers.LogitsProcessorList([rows.choose]),
                stopping_criteria=transformers.StoppingCriteriaList([rows.is_done]),
            )
        shared = [cache is not None and prompt in prompt_of[:row] for row, prompt in enumerate(prompt_of)]
        return [rows.reply(row, new, shared[row]) for row, new in enumerate(out[:, start:].tolist())]


def default_batch_tokens(config, dtype: torch.dtype, device: str) -> int:
    """What a batch may hold, in tokens: on a CPU few, so that an interruption does not wait long; on a GPU as many as
    GPU_SHARE of the memory that is free once the weights are there holds keys and values of. config: the model's."""
    if not device.startswith("cuda"):
        return CPU_BATCH_TOKENS
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    token_bytes = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * dtype.itemsize
    return max(CPU_BATCH_TOKENS, int(GPU_SHARE * torch.cuda.mem_get_info(device)[0]) // token_bytes)


class _BatchRows:
    """What `generate` asks about the rows of a batch at each step: which token, and which rows are done."""

    def __init__(self, requests: list[Request], start: int, device: str, is_unwanted: Callable[[Request], bool]):
        self.requests, self.start, self.is_unwanted = requests, start, is_unwanted
        self.seeds = np.array([r.seed for r in requests], dtype=np.uint64)
        self.temperatures = torch.tensor([r.temperature for r in requests], dtype=torch.float64, device=device)
        self.top_ps = torch.tensor([r.top_p for r in requests], dtype=torch.float64, device=device)

    def choose(self, input_ids, logits):
        """As a logits processor: everything but the drawn token is made impossible."""
        return only_drawn(logits, self.seeds, input_ids.shape[1] - self.start, self.temperatures, self.top_ps)

    def is_done(self, input_ids, scores, **kwargs):
        written, last = input_ids.shape[1] - self.start, input_ids[:, -1].tolist()
        done = [
            token in request.stop_ids or written >= request.max_new_tokens or self.is_unwanted(request)
            for token, request in zip(last, self.requests, strict=True)
        ]
        return torch.tensor(done, device=input_ids.device)

    def reply(self, row: int, new_tokens: list[int], shared: bool) -> Reply:
        """`shared`: an earlier row of the batch has read this prompt, all but its last token."""
        request = self.requests[row]
        tokens = new_tokens[: request.max_new_tokens]
        reason = "length" if len(tokens) == request.max_new_tokens else "abort"  # closed or cancelled in mid-batch
        if stops := [at for at, token in enumerate(tokens) if token in request.stop_ids]:
            tokens, reason = tokens[: stops[0] + 1], "stop"
        return Reply(tokens, reason, len(request.prompt_ids), len(request.prompt_ids) - 1 if shared else 0)
