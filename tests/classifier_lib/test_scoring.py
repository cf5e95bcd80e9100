"""ValueScorer: the values of a full forward pass, every token read once, memory within its bound."""

import itertools
import random

import pytest
import tiny
import torch

from classifier_lib import ValueScorer
from classifier_lib.cache_budget import CacheBudget

VOCAB = 264


def full_forward(model, ids: list[int]) -> float:
    """The plain reference: the whole trace, no cache."""
    with torch.no_grad():
        return model(torch.tensor([ids])).success_probs[0, -1].item()


class Counter:
    """Counts what goes through the embedding, padding included: an account independent of the scorer's own."""

    def __init__(self, model):
        self.tokens = 0
        self.hook = model.model.embed_tokens.register_forward_hook(self.count)

    def count(self, module, inputs, output):
        self.tokens += inputs[0].numel()


class WatchedBudget(CacheBudget):
    """Holds the bound at every entry; counts the passes of the stated exception."""

    overruns = peak = 0

    def reading(self, rows, prefix, new):
        counted = self.held + self.pass_bytes(rows, prefix, new)
        if counted > self.limit:
            assert rows == 1
            assert self.held == prefix * self.token.kv
            assert self.held + (prefix + new) * self.token.kv <= self.limit
            self.overruns += 1
        self.peak = max(self.peak, counted)
        return super().reading(rows, prefix, new)

    def hold(self, tokens):
        fits = super().hold(tokens)
        assert self.held + self.working <= self.limit
        return fits


def allocated_peak(work) -> int:
    """The most bytes of CPU memory that `work()` had allocated at once, the profiler says."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


def watched(model, cache_bytes=None, **more):
    scorer = ValueScorer(model, **more)
    scorer.budget = WatchedBudget(scorer.budget.token, cache_bytes)
    return scorer


def grow_random_trees(scorer, reference, seed: int, trees: int = 3, rounds: int = 4) -> int:
    """Grow, prune, duplicate and finish beams of several trees in turn; returns the tokens given to the scorer."""
    rng = random.Random(seed)

    def block(length):
        return [rng.randrange(VOCAB) for _ in range(length)]

    given = 0
    beams = {}
    texts = {}
    for t in range(trees):
        prompt = block(rng.randint(1, 9))
        scorer.start(f"t{t}", prompt)
        beams[t], texts[t] = [0] * rng.randint(1, 3), {0: prompt}
        given += len(prompt)
    for _ in range(rounds):
        for t in rng.sample(range(trees), trees):
            if not beams[t]:
                continue
            length = rng.randint(1, 12)
            items, finished = [], []
            for beam in beams[t]:
                for _ in range(rng.randint(1, 3)):
                    done = rng.random() < 0.25
                    items.append((beam, block(rng.randint(1, length) if done else length)))
                    finished.append(done)
            if rng.random() < 0.5:
                items.append(items[0])  # the same block twice
                finished.append(finished[0])
            values = scorer.score(f"t{t}", items, finished)
            first = len(texts[t])
            for i, ((parent, tokens), value) in enumerate(zip(items, values, strict=True)):
                texts[t][first + i] = texts[t][parent] + tokens
                given += len(tokens)
                if reference is not None:
                    assert value == pytest.approx(full_forward(reference, texts[t][first + i]), abs=1e-5)
            alive = [first + i for i, done in enumerate(finished) if not done]
            beams[t] = [rng.choice(alive) for _ in range(min(len(alive), 3))]  # pruned, and some kept twice
            scorer.keep(f"t{t}", beams[t])
    for t in range(trees):
        scorer.release(f"t{t}")
        scorer.release(f"t{t}")  # twice is harmless
    assert scorer.budget.held == 0
    return given


@pytest.mark.parametrize("num_labels", [1, 3])
@pytest.mark.parametrize("seed", range(4))
def test_equals_full_forward_and_reads_each_token_once(seed, num_labels):
    model, reference = tiny.tiny_value_model(num_labels=num_labels), tiny.tiny_value_model(num_labels=num_labels)
    counter = Counter(model)
    scorer = watched(model)
    given = grow_random_trees(scorer, reference, seed)
    assert scorer.usage.tokens_scored == given
    assert scorer.usage.tokens_reread == 0
    assert counter.tokens == given + scorer.usage.tokens_padding


LONGEST_TRACE = 9 + 4 * 12


@pytest.mark.parametrize("share", [1.0, 1.5, 3.0, 8.0, 20.0])
@pytest.mark.parametrize("seed", range(4))
def test_small_cache_evicts_chunks_and_still_equals_full_forward(seed, share):
    """From the smallest cache that can work: the same values, the bound kept, every re-read token reported."""
    model, reference = tiny.tiny_value_model(), tiny.tiny_value_model()
    counter = Counter(model)
    scorer = watched(model, int(share * smallest_cache(model)))
    given = grow_random_trees(scorer, reference, seed, trees=4)
    usage = scorer.usage
    assert usage.tokens_scored == given + usage.tokens_reread
    assert counter.tokens == usage.tokens_scored + usage.tokens_padding
    if share == 1.0:
        assert usage.tokens_reread > 0
        assert scorer.budget.overruns > 0  # activations of a tiny model are larger than its caches
    if share == 20.0:
        assert scorer.budget.overruns == 0


def smallest_cache(model) -> int:
    """Bytes of the longest trace and a working copy: the least that the script accepts (`check_value_cache`)."""
    return 2 * LONGEST_TRACE * ValueScorer(model).budget.token.kv


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"hidden_size": 64, "intermediate_size": 500, "num_key_value_heads": 1},
        {"hidden_size": 64, "intermediate_size": 80, "num_attention_heads": 8, "num_hidden_layers": 6},
    ],
)
@pytest.mark.parametrize(("prefix", "rows", "new"), [(300, 1, 200), (300, 6, 40), (20, 3, 200), (2, 5, 300)])
def test_what_is_counted_is_what_tensors_take(prefix, rows, new, shape, dtype):
    """The peak of live tensors is at most what the budget counts, and not far below it."""
    scorer = watched(tiny.tiny_value_model(**shape).to(dtype))
    scorer.start("t", [7] * prefix)
    peak = allocated_peak(lambda: scorer.score("t", [(0, [1] * new)] * rows))
    assert 0.5 * scorer.budget.peak <= peak <= scorer.budget.peak + untouched(prefix, new)


def untouched(prefix: int, new: int) -> int:
    """The library's causal bias reserves 8 bytes a pair and writes none of them."""
    return 8 * new * (prefix + new)


@pytest.mark.parametrize("seed", range(2))
def test_tensors_stay_within_the_bound(seed):
    """A workload that fits because chunks are made small and trees are given up, measured on the tensors themselves."""

    def run(limit=None):
        scorer = watched(tiny.tiny_value_model(), limit)
        peak = allocated_peak(lambda: grow_random_trees(scorer, None, seed, trees=4))
        assert scorer.budget.overruns == 0
        return scorer, peak - untouched(LONGEST_TRACE - 12, 12)

    unbounded, peak = run()
    assert peak <= unbounded.budget.peak
    bounded, bounded_peak = run(unbounded.budget.peak // 3)
    assert bounded_peak <= bounded.budget.limit < peak


def test_activations_split_a_batch_that_its_caches_would_not():
    model = tiny.tiny_value_model()
    scorer = watched(model)
    scorer.start("t", [5])
    scorer.score("t", [(0, [1] * 50)] * 8)
    caches = (1 + 8 * 50 + 8 * 51) * scorer.budget.token.kv
    assert scorer.budget.peak > caches  # so the bound below splits what its caches alone would not
    passes = []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: passes.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    bounded = watched(model, caches)
    bounded.start("t", [5])
    assert bounded.score("t", [(0, [1] * 50)] * 8) == pytest.approx(
        [full_forward(tiny.tiny_value_model(), [5] + [1] * 50)] * 8, abs=1e-5
    )
    assert passes[0] == (1, 1)  # the prompt
    assert len(passes) > 2
    assert sum(rows for rows, _ in passes[1:]) == 8
    assert bounded.usage.tokens_reread == bounded.budget.overruns == 0


class Passes:
    """(rows, new tokens of a row) of each forward pass, padding included."""

    def __init__(self, model):
        self.shapes = []
        model.model.register_forward_pre_hook(self.note, with_kwargs=True)

    def note(self, module, args, kwargs):
        self.shapes.append(tuple(kwargs["input_ids"].shape))


@pytest.mark.parametrize("most", [1, 5, 24, 30, 1000])
def test_a_pass_reads_at_most_so_many_new_tokens(most):
    """One row goes whatever it holds; nothing is split without need, and the cache has no part in it."""
    model, reference = tiny.tiny_value_model(), tiny.tiny_value_model()
    passes, scorer = Passes(model), ValueScorer(model, max_batch_tokens=most)
    given = grow_random_trees(scorer, reference, seed=9)
    assert scorer.usage.tokens_scored == given
    assert all(rows * width <= most or rows == 1 for rows, width in passes.shapes)
    passes.shapes.clear()
    scorer.start("t", [5])
    scorer.score("t", [(0, [1] * 6)] * 9)
    rows = max(1, most // 6)
    assert passes.shapes[1:] == [(min(rows, 9 - done), 6) for done in range(0, 9, rows)]


def test_history_is_read_again_only_where_needed():
    """A tree taken up from a journal: only the ancestors of what goes on are read, and reported as read again."""
    model, reference = tiny.tiny_value_model(), tiny.tiny_value_model()
    scorer = ValueScorer(model)
    prompt, kept, lost = [1, 2, 3], [4, 5], [6, 7]
    scorer.start("t", prompt, history=[(0, kept), (0, lost)])
    values = scorer.score("t", [(1, [8, 9]), (1, [10, 11])])
    assert values[1] == pytest.approx(full_forward(reference, [1, 2, 3, 4, 5, 10, 11]), abs=1e-5)
    assert (scorer.usage.tokens_scored, scorer.usage.tokens_reread) == (3 + 2 + 4, 3 + 2)


def test_shared_prefixes_are_held_once():
    scorer = ValueScorer(tiny.tiny_value_model())
    scorer.start("t", list(range(20)))
    scorer.score("t", [(0, [1] * 4)] * 8)
    assert scorer.budget.held == (20 + 8 * 4) * scorer.budget.token.kv
    scorer.keep("t", [1, 2])
    assert scorer.budget.held == (20 + 2 * 4) * scorer.budget.token.kv


def test_bfloat16_within_tolerance():
    """bf16 keeps 8 bits: cached and full forward differ by rounding only (README states 0.02 for this size)."""
    model = tiny.tiny_value_model().to(torch.bfloat16)
    reference = tiny.tiny_value_model().to(torch.bfloat16)
    scorer = ValueScorer(model)
    scorer.start("t", [5] * 9)
    blocks = [[(i * 7 + j) % VOCAB for j in range(12)] for i in range(4)]
    values = scorer.score("t", [(0, block) for block in blocks])
    for value, block in zip(values, blocks, strict=True):
        assert value == pytest.approx(full_forward(reference, [5] * 9 + block), abs=0.02)


def test_a_tree_that_scored_last_keeps_its_cache_longest():
    """Where room is made, the tree that was scored least recently gives up its cache first."""
    scorer = ValueScorer(tiny.tiny_value_model())
    for tree in ("a", "b", "c"):
        scorer.start(tree, [1] * 20)
        scorer.score(tree, [(0, [2] * 4)])
    scorer.score("a", [(1, [3] * 4)])  # so b is the oldest
    room = scorer.budget.pass_bytes(1, 24, 4) - 12 * scorer.budget.token.kv
    scorer.budget.limit = scorer.budget.held + room  # half of a tree is in the way
    scorer.score("c", [(1, [4] * 4)])
    assert scorer.usage.tokens_reread == 0
    scorer.score("a", [(2, [5])])
    assert scorer.usage.tokens_reread == 0
    scorer.score("b", [(1, [5])])
    assert scorer.usage.tokens_reread == 24


def test_what_finished_is_not_held_and_what_goes_on_is():
    scorer = ValueScorer(tiny.tiny_value_model())
    scorer.start("t", [1] * 10)
    scorer.score("t", [(0, [2] * 4), (0, [3] * 4), (0, [4] * 4)], [True, False, True])
    assert scorer.budget.held == (10 + 4) * scorer.budget.token.kv
    before = scorer.usage.tokens_scored
    scorer.score("t", [(2, [5] * 3)])
    assert scorer.usage.tokens_scored - before == 3


def test_usage_is_told_tree_by_tree():
    scorer = ValueScorer(tiny.tiny_value_model())
    scorer.start("a", [1] * 10)
    scorer.start("b", [2] * 5)
    scorer.score("a", [(0, [3] * 4)])
    scorer.score("b", [(0, [3] * 2), (0, [3])])
    scorer.keep("a", [])
    scorer.score("a", [(1, [6])])
    a, b = scorer.tree_usage("a"), scorer.tree_usage("b")
    assert (a.tokens_scored, a.tokens_reread, b.tokens_scored, b.tokens_padding) == (14 + 15, 14, 8, 1)
    assert scorer.usage.tokens_scored == a.tokens_scored + b.tokens_scored


def test_says_what_is_wrong():
    scorer = ValueScorer(tiny.tiny_value_model())
    scorer.start("t", [1])
    with pytest.raises(ValueError, match="no node 3"):
        scorer.score("t", [(3, [1])])
    with pytest.raises(ValueError, match="empty block"):
        scorer.score("t", [(0, [])])
    with pytest.raises(ValueError, match="vocabulary"):
        scorer.score("t", [(0, [VOCAB])])
    with pytest.raises(ValueError, match="started already"):
        scorer.start("t", [1])
    scorer.budget.limit = scorer.budget.token.kv * 3
    with pytest.raises(ValueError, match="cannot hold a trace of 6 tokens"):
        scorer.score("t", [(0, [1] * 5)])
    assert scorer.score("t", []) == []
