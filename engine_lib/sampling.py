"""Sampling in which every row draws from noise of its own, for both engines.

This file stands alone, on numpy and torch: SGLang's scheduler, which has nothing else of this project, is sent its text
(`engine_lib.seeded`).
"""

import logging

import numpy as np
import torch

SHORTLIST = 1024  # most probable tokens among which a nucleus is looked for first: a sort of the vocabulary is slow
# Bounds what a draw needs beside the logits: about 0.25 GB at 152k tokens, 0.8 GB where all of them are sorted.
ROWS_AT_ONCE = 64


def row_uniforms(seeds, steps):
    """One number in [0, 1) for each seed at its step: a function of (seed, step) and nothing else.

    seeds: uint64 [rows] (numpy). steps: int, or int [rows]. Returns float64 [rows]. Two rounds of the SplitMix64
    finalizer (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators") as a counter-based generator.
    """

    def mix(x):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))

    golden = np.uint64(0x9E3779B97F4A7C15)
    steps = np.asarray(steps).astype(np.uint64)
    with np.errstate(over="ignore"):
        state = mix(mix(seeds.astype(np.uint64) + golden) + golden * (steps + np.uint64(1)))
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53


def sample_rows(logits, temperatures, top_ps, uniforms):
    """One token a row by inverse-transform sampling from the nucleus (Holtzman et al. 2020, arXiv 1904.09751).

    logits: float [rows, vocab]. temperatures (0: greedy), top_ps, uniforms: float64 [rows] on the logits' device.
    The nucleus is the smallest set of most probable tokens whose mass reaches top_p, of equal ones those of lower ids.
    It is drawn from in the order of ids, not of probabilities: near-equal logits, which rounding swaps from one batch
    to another, do not move the draw. Returns int64 [rows]. Raises ValueError for logits that are NaN.
    """
    most_probable, greedy = logits.argmax(dim=-1), temperatures == 0
    if bool(greedy.all()):
        return most_probable
    rows = (logits, torch.where(greedy, 1.0, temperatures), torch.where(greedy, 1.0, top_ps), uniforms)
    some = zip(*(column.split(ROWS_AT_ONCE) for column in rows), strict=True)
    return torch.where(greedy, most_probable, torch.cat([_draw(*part) for part in some]))


def _draw(logits, temperatures, top_ps, uniforms):
    probs = torch.softmax(logits.double() / temperatures[:, None], dim=-1)
    kept = _nucleus(logits, probs, top_ps)
    cumulative = torch.where(kept, probs, 0.0).cumsum(dim=-1)
    # Scaled to the kept mass, and below it even after rounding, so that no token outside the nucleus is drawn.
    total = torch.where(kept, cumulative, 0.0).amax(dim=-1)
    if not bool((total > 0).all()):  # NaN, or nothing that is possible: any token would be made up
        raise ValueError("the model's logits are no numbers")
    drawn = torch.minimum(uniforms * total, torch.nextafter(total, torch.zeros_like(total)))
    return (kept & (cumulative > drawn[:, None])).int().argmax(dim=-1)  # the first


def _nucleus(logits, probs, top_ps):
    """bool [rows, vocab]; all tokens where top_p is 1. The whole vocabulary is sorted only for rows whose nucleus may not
    lie within the shortlist."""
    shortlist = logits.topk(min(SHORTLIST, logits.shape[1]), dim=-1, sorted=False).indices.sort(dim=-1).values
    kept, inside = _kept_of(shortlist, logits, probs, top_ps)
    everything = top_ps >= 1
    outside = ~(inside | everything)
    if bool(outside.any()):
        logits, probs, top_ps = logits[outside], probs[outside], top_ps[outside]
        vocabulary = torch.arange(logits.shape[1], device=logits.device).expand(len(logits), -1)
        kept[outside] = _kept_of(vocabulary, logits, probs, top_ps)[0]
    return kept | everything[:, None]


def _kept_of(ids, logits, probs, top_ps):
    """Which of these tokens, [rows, k] in ascending order, make up the nucleus, as bool [rows, vocab], and for each row
    whether no other token can belong to it: those that were left out are at most as probable as the last one here."""
    ranked = torch.sort(logits.gather(1, ids), dim=-1, descending=True, stable=True)
    ids = ids.gather(1, ranked.indices)
    mass_before = torch.nn.functional.pad(probs.gather(1, ids).cumsum(dim=-1)[:, :-1], (1, 0))
    kept = mass_before < top_ps[:, None]
    reaches_the_last = (kept & (ranked.values == ranked.values[:, -1:])).any(dim=-1)
    return torch.zeros_like(probs, dtype=torch.bool).scatter_(1, ids, kept), ~reaches_the_last


def only_drawn(logits, seeds, steps, temperatures, top_ps):
    """The logits with everything but each row's drawn token made impossible, for a sampler that takes the largest.

    logits: float [rows, vocab]. seeds: uint64 [rows], steps: as for `row_uniforms` (numpy). temperatures, top_ps:
    float64 [rows] on the logits' device.
    """
    uniforms = torch.from_numpy(row_uniforms(seeds, steps)).to(logits.device)
    token = sample_rows(logits, temperatures, top_ps, uniforms)
    return torch.full_like(logits, float("-inf")).scatter_(1, token[:, None], 0.0)


class SeededSampler:
    """SGLang's custom logit processor of `--seeded`: each request draws by its own seed, whatever runs beside it.

    An error in it would end the scheduler, and so every request of a server. So it raises none: the requests that
    met one are ended with it, which whoever asked is told.
    """

    def __call__(self, logits, custom_param_list):
        """logits: float [rows, vocab]. custom_param_list: of each row `seed`, `temperature`, `top_p`, and SGLang's own
        record of the request as `__req__`."""
        try:
            seeds = np.array([row["seed"] for row in custom_param_list], dtype=np.uint64)
            steps = np.array([self.written(row["__req__"]) for row in custom_param_list])
            temperatures, top_ps = (
                torch.tensor([row[name] for row in custom_param_list], dtype=torch.float64, device=logits.device)
                for name in ("temperature", "top_p")
            )
            return only_drawn(logits, seeds, steps, temperatures, top_ps)
        except Exception as error:
            self.end(custom_param_list, f"--seeded: a token could not be drawn ({type(error).__name__}: {error})")
            return logits

    def written(self, request):
        """How many tokens the request has written before this one.

        `output_ids` may lack the last of them under the overlap schedule, which launches a step before it has read the
        one before. The length of the KV cache is set before a step is launched, with and without overlap; after a
        request was retracted it counts what is read again. Below 0: a chunk of the prompt, whose token goes nowhere.
        """
        return max(0, request.kv.kv_committed_len - len(request.origin_input_ids))

    def end(self, custom_param_list, why):
        logging.getLogger("sglang").error(why)
        for row in custom_param_list or []:
            try:
                from sglang.srt.managers.schedule_batch import FINISH_ABORT

                row["__req__"].to_finish = FINISH_ABORT(why, 500, "InternalServerError")
            except Exception as error:
                logging.getLogger("sglang").error("--seeded: such a request could not be ended (%r)", error)
