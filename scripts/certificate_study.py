"""How surely the certificate tells wrong attention from right: planted faults of three kinds, and clean runs, on a CPU.

    python scripts/certificate_study.py --count 100 --out study.json

Each of `count` draws of a kind plants one fault in the path that a run would take, with other weights and in float32, under
bf16 autocast, or in bf16, and asks the certificate:

    integers   one number that tells the kernel what a token may see is another: an entry of the block lists that the forward
               or the backward goes by, of the `end` vector, of the dense mask, or where a sequence begins
    leak       the kernel lets one token see one that it may not
    block      the kernel's gradients of one block of 128 x 128 are wrong by a factor
    clean      nothing
"""

import argparse
import collections
import json
import logging
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from transformers import AttentionInterface, AttentionMaskInterface, Qwen2Config
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common_lib.cli import UserError
from training_lib.attention import FLEX, SDPA, VARLEN_ATTENTIONS, Attention
from training_lib.attention_check import visible
from training_lib.certificate import CertificateBench, certify, check_integers
from training_lib.precision import Precision

BLOCK, FACTORS = 128, (0.5, 2.0, -1.0)
PRECISIONS = (Precision(False, False), Precision(False, True), Precision(False, False, bf16_parameters=True))
CPU = torch.device("cpu")
TOLD = [(FLEX, "tree"), (FLEX, "pack"), (SDPA, "tree"), (VARLEN_ATTENTIONS[0], "pack"), (VARLEN_ATTENTIONS[0], "none")]
CONFIG = Qwen2Config(
    hidden_size=128, intermediate_size=192, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048
)


def bench_of(rng: np.random.Generator, attention: Attention = SDPA, packing: str = "tree") -> CertificateBench:
    """With weights and a precision that are drawn."""
    torch.manual_seed(int(rng.integers(2**31)))
    return CertificateBench(CONFIG, attention, packing, PRECISIONS[rng.integers(len(PRECISIONS))], CPU)


def ask(bench: CertificateBench, check: Callable[[CertificateBench], object] = certify) -> str:
    """Which check refuses, in its first word; or "" where none does."""
    try:
        check(bench)
    except UserError as error:
        return str(error).partition(":")[0]
    return ""


# ---------------------------------------------------------------------------------------------------------------------
# Faults


def integers(rng: np.random.Generator) -> str:
    attention, packing = TOLD[rng.integers(len(TOLD))]
    number = int(rng.integers(2**31))

    def inputs(batch, device):
        draw = np.random.default_rng(number)
        if attention is FLEX and draw.random() < 0.2:
            end = batch.end.copy()
            place = draw.integers(batch.num_tokens)
            end[0, place] += 1 if end[0, place] < batch.input_ids.size and draw.random() < 0.5 else -1
            return attention.mask_inputs(replace(batch, end=end), device)
        found = attention.mask_inputs(batch, device)
        if attention is FLEX:
            _change_a_list(draw, found["attention_mask"])
        elif attention is SDPA:
            mask = found["attention_mask"][0, 0]
            mask[tuple(draw.integers(len(mask), size=2))] ^= True
        else:
            bounds = found["cu_seq_lens_q"]
            borders = np.flatnonzero(np.isin(bounds[1:-1].numpy(), batch.last_index + 1)) + 1
            bounds[draw.choice(borders)] += draw.choice([-1, 1])
        return found

    # The integers are looked at without a kernel, so that a CPU can look at those of all.
    return ask(bench_of(rng, replace(attention, mask_inputs=inputs), packing), check_integers)


def _change_a_list(draw: np.random.Generator, mask) -> None:
    """One used entry of a list names another block, or a list is one shorter."""
    names = [("kv_num_blocks", "kv_indices"), ("full_kv_num_blocks", "full_kv_indices"),
             ("q_num_blocks", "q_indices"), ("full_q_num_blocks", "full_q_indices")]  # fmt: skip
    counts, indices = (getattr(mask, name)[0, 0] for name in names[draw.integers(len(names))])
    row = draw.choice(np.flatnonzero(counts.numpy()))
    if draw.random() < 0.3:
        counts[row] -= 1
    else:
        entry = draw.integers(int(counts[row]))
        indices[row, entry] = (indices[row, entry] + draw.integers(1, len(counts))) % len(counts)


def leak(rng: np.random.Generator) -> str:
    bench = bench_of(rng)
    [batch] = bench.batches("tree", SDPA)
    hidden = ~visible(batch)[0]
    hidden[batch.num_tokens :] = False  # what padding sees is nobody's loss
    query, key = rng.choice(np.argwhere(hidden))

    def kernel(module, queries, keys, values, attention_mask, **options):
        mask = attention_mask.clone()
        mask[..., query, key] = True
        return sdpa_attention_forward(module, queries, keys, values, mask, **options)

    return ask(_with_kernel(bench, kernel))


def block(rng: np.random.Generator) -> str:
    bench = bench_of(rng)
    [batch] = bench.batches("tree", SDPA)
    seen = visible(batch)[0] & (np.arange(batch.input_ids.size) < batch.num_tokens)[:, None]
    padded = np.pad(seen, (0, -len(seen) % BLOCK))
    size = len(padded) // BLOCK
    row, column = rng.choice(np.argwhere(padded.reshape(size, BLOCK, size, BLOCK).any(axis=(1, 3))))
    factor = rng.choice(FACTORS)
    inside = torch.zeros(len(seen), len(seen), dtype=torch.bool)
    inside[row * BLOCK : (row + 1) * BLOCK, column * BLOCK : (column + 1) * BLOCK] = True

    def scaled(part):
        return part.detach() + factor * (part - part.detach())

    def kernel(module, queries, keys, values, attention_mask, dropout=0.0, scaling=None, **_):
        groups = queries.shape[1] // keys.shape[1]
        keys, values = (part.repeat_interleave(groups, dim=1) for part in (keys.to(values.dtype), values))
        queries = queries.to(values.dtype)
        scores = torch.where(
            inside, scaled(queries) @ scaled(keys).transpose(2, 3), queries @ keys.transpose(2, 3)
        ) * scaling  # fmt: skip
        weights = scores.float().masked_fill(~attention_mask, float("-inf")).softmax(-1).to(values.dtype)
        out = (weights * ~inside) @ values + (weights * inside) @ scaled(values)
        return out.transpose(1, 2).contiguous(), None

    return ask(_with_kernel(bench, kernel))


def clean(rng: np.random.Generator) -> str:
    return ask(bench_of(rng))


def _with_kernel(bench: CertificateBench, kernel: Callable) -> CertificateBench:
    AttentionInterface.register("planted", kernel)
    AttentionMaskInterface.register("planted", sdpa_mask)
    bench.attention = replace(bench.attention, name="planted")
    return bench


KINDS = {"integers": integers, "leak": leak, "block": block, "clean": clean}


def study(count: int, seed: int, kinds: Sequence[str] = tuple(KINDS)) -> dict[str, dict[str, int]]:
    """By kind: how many draws each check refused ("": none)."""
    found = {}
    for kind in kinds:
        draws = ([seed, list(KINDS).index(kind), number] for number in range(count))
        found[kind] = dict(collections.Counter(KINDS[kind](np.random.default_rng(draw)) for draw in draws))
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100, help="draws of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--out", type=Path, help="write the counts as JSON")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.ERROR)
    right, found = True, {}
    for kind in args.kinds:
        begin = time.monotonic()
        found |= study(args.count, args.seed, [kind])
        refused = args.count - found[kind].get("", 0)
        right &= refused == (0 if kind == "clean" else args.count)
        by = ", ".join(f"{name} {number}" for name, number in found[kind].items() if name)
        print(
            f"{kind}: {refused} of {args.count} refused ({by or 'none'}; {time.monotonic() - begin:.0f} s)", flush=True
        )
    if args.out:
        args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
