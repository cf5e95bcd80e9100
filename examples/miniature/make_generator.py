"""Make the miniature's generator: a Qwen2 of about 150k parameters, trained from nothing to write (faulty) traces.

    python -m examples.miniature.make_generator --output_dir miniature --seed 1337

writes miniature/generator (model and tokenizer), miniature/problems_train.jsonl and miniature/problems_test.jsonl. The
generator is trained on neither, and no test problem is a train problem. One thread is fastest at this size.
"""

import argparse
import json
import math
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from random import Random

import torch
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from common_lib.cli import ArgumentParser, UserError, check_rules, quiet_transformers, run_script
from common_lib.files import lock
from common_lib.progress import Progress, format_seconds
from examples.miniature.task import DigitSum, Noise, clean_trace, draw_problem, draw_problems, is_endless, noisy_trace
from examples.miniature.tokenizer import build_tokenizer

CLEAN_SHARE = 0.6  # of the steps: first learn the sums, then the errors; errors from the start spoil both
WARMUP_STEPS = 40
IGNORED = -100  # label of tokens that are not learned: the prompt and padding


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--output_dir", type=Path, default=Path("miniature"), help="folder for model and problems")
    parser.add_argument("--seed", type=int, default=1337, help="of problems, traces and weights")
    parser.add_argument("--num_steps", type=int, default=750, help="optimizer steps")
    parser.add_argument("--batch_size", type=int, default=32, help="traces a step")
    parser.add_argument("--max_lr", type=float, default=4e-3, help="AdamW's, after a warm-up; a cosine takes it to 0")
    parser.add_argument("--num_train", type=int, default=3000, help="problems to collect roll-outs on")
    parser.add_argument("--num_test", type=int, default=200, help="held-out problems")
    for cause, share in asdict(Noise()).items():
        parser.add_argument(f"--{cause}", type=float, default=share, help="probability at a step of a training trace")
    args = parser.parse_args(argv)
    counts, shares = ("num_steps", "batch_size", "num_train", "num_test"), asdict(Noise())
    check_rules(args, [(name, getattr(args, name) >= 1, "must be at least 1") for name in counts])
    check_rules(args, [(name, 0 <= getattr(args, name) <= 1, "is a probability: from 0 to 1") for name in shares])
    check_rules(args, [("max_lr", args.max_lr > 0, "must be above 0"), ("seed", args.seed >= 0, "must be 0 or more")])
    return args


def new_generator(tokenizer: PreTrainedTokenizerFast) -> Qwen2ForCausalLM:
    """An untrained generator; its weights come from torch's global seed."""
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.06,  # the usual 0.02 is too small at this width: it learns half as fast
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen2ForCausalLM(config)


def batches(
    tokenizer: PreTrainedTokenizerFast,
    num_steps: int,
    batch_size: int,
    rng: Random,
    noise: Noise,
    left_out: set[DigitSum],
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(input_ids, labels), int64 [batch, seq]: clean traces for the first CLEAN_SHARE of the steps, then noisy ones."""
    for step in range(num_steps):
        prompts, traces = [], []
        while len(prompts) < batch_size:
            if (problem := draw_problem(rng)) in left_out:
                continue
            trace = clean_trace(problem) if step < CLEAN_SHARE * num_steps else noisy_trace(problem, rng, noise)
            prompts.append(f"<bos>{problem.text}<think>")
            traces.append(trace if is_endless(trace) else trace + "<eos>")
        yield encode(tokenizer, prompts, traces)


def encode(
    tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str], traces: Sequence[str]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded rows of prompt + trace, int64 [batch, seq], and labels that leave out prompt and padding."""
    texts = [prompt + trace for prompt, trace in zip(prompts, traces, strict=True)]
    rows = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")
    labels = rows.input_ids.masked_fill(rows.attention_mask == 0, IGNORED)
    for row, ids in enumerate(tokenizer(list(prompts), add_special_tokens=False).input_ids):
        labels[row, : len(ids)] = IGNORED
    return rows.input_ids, labels


def train(
    model: Qwen2ForCausalLM, steps: Iterator[tuple[torch.Tensor, torch.Tensor]], num_steps: int, max_lr: float
) -> float:
    """AdamW with warm-up and cosine, showing its progress. Returns the last loss (mean over trace tokens, nats)."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=max_lr, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / WARMUP_STEPS, 0.5 * (1 + math.cos(math.pi * step / num_steps)))
    )
    step, last_loss, begin = 0, math.nan, time.perf_counter()

    def status() -> str:
        seconds = time.perf_counter() - begin
        left = format_seconds(seconds / max(step, 1) * (num_steps - step))
        return f"step {step}/{num_steps} | loss {last_loss:.3f} | {format_seconds(seconds)}, ETA {left}"

    progress = Progress(status)
    for step, (input_ids, labels) in enumerate(steps, start=1):
        # Right padding of a causal model needs no mask.
        logits = model(input_ids=input_ids, use_cache=False).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)
        last_loss = loss.item()
        if not math.isfinite(last_loss):
            raise UserError(f"the loss is {last_loss} at step {step}; lower --max_lr (it is {max_lr:g})")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        progress.update()
    progress.close()
    return last_loss


def save(folder: Path, model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Write a model folder beside its place, then move it there: it is whole or not there."""
    unfinished = folder.with_name(folder.name + ".unfinished")
    for old in (unfinished, folder):
        shutil.rmtree(old, ignore_errors=True)
    tokenizer.save_pretrained(unfinished)
    model.save_pretrained(unfinished)
    os.replace(unfinished, folder)


def write_problems(path: Path, problems: Sequence[DigitSum]) -> None:
    """One line of JSON for each problem: `problem`, `answer`."""
    path.write_text("".join(json.dumps({"problem": p.text, "answer": p.answer}) + "\n" for p in problems))


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        args.output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output_dir {args.output_dir} cannot be made ({error.strerror})") from error
    held = lock(args.output_dir / ".lock", f"another process makes a generator in {args.output_dir}; wait for it")
    try:
        make(args)
    finally:
        held.release()
    return 0


def make(args: argparse.Namespace) -> None:
    """Problems, then the generator, which is moved to its place last."""
    quiet_transformers()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    # Test problems come first, so that they do not depend on the number of train problems.
    problems = draw_problems(args.num_test + args.num_train, args.seed)
    write_problems(args.output_dir / "problems_test.jsonl", problems[: args.num_test])
    write_problems(args.output_dir / "problems_train.jsonl", problems[args.num_test :])
    tokenizer = build_tokenizer()
    model = new_generator(tokenizer)
    print(f"generator: {model.num_parameters():,} parameters, {args.num_steps} steps of {args.batch_size} traces")
    noise = Noise(**{name: getattr(args, name) for name in asdict(Noise())})
    steps = batches(tokenizer, args.num_steps, args.batch_size, Random(args.seed), noise, set(problems))
    train(model, steps, args.num_steps, args.max_lr)
    save(args.output_dir / "generator", model, tokenizer)
    print(f"written: {args.output_dir}/generator; {args.num_train} train and {args.num_test} test problems beside it")


if __name__ == "__main__":
    run_script(main)
