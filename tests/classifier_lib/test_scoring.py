"""ValueScorer: the values of a full forward pass, every token read once, memory within its bound."""

import random

import pytest
import tiny
import torch

from classifier_lib import ValueScorer

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


class Bound(ValueScorer):
    """Checks at every allocation that held caches and working cache stay within the bound."""

    def _working_cache(self, tree, rows, length):
        kv = super()._working_cache(tree, rows, length)
        working = kv.numel() * kv.element_size()
        assert self.held_bytes + working <= (self.cache_bytes or 1 << 60)
        held = sum(
            n.kv.numel() * n.kv.element_size() for t in self._trees.values() for n in t.nodes if n.kv is not None
        )
        assert held == self.held_bytes
        return kv

    def _hold(self, tree, row, kv, hold, working_tokens):
        super()._hold(tree, row, kv, hold, working_tokens)
        assert self.held_bytes + working_tokens * self.bytes_per_token <= (self.cache_bytes or 1 << 60)


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
                assert value == pytest.approx(full_forward(reference, texts[t][first + i]), abs=1e-5)
            alive = [first + i for i, done in enumerate(finished) if not done]
            beams[t] = [rng.choice(alive) for _ in range(min(len(alive), 3))]  # pruned, and some kept twice
            scorer.keep(f"t{t}", beams[t])
    for t in range(trees):
        scorer.release(f"t{t}")
        scorer.release(f"t{t}")  # twice is harmless
    assert scorer.held_bytes == 0
    return given


@pytest.mark.parametrize("num_labels", [1, 3])
@pytest.mark.parametrize("seed", range(4))
def test_equals_full_forward_and_reads_each_token_once(seed, num_labels):
    model, reference = tiny.tiny_value_model(num_labels=num_labels), tiny.tiny_value_model(num_labels=num_labels)
    counter = Counter(model)
    scorer = Bound(model)
    given = grow_random_trees(scorer, reference, seed)
    assert scorer.usage.tokens_scored == given
    assert scorer.usage.tokens_reread == 0
    assert counter.tokens == given + scorer.usage.tokens_padding


@pytest.mark.parametrize("share", [1.0, 1.5, 3.0, 8.0])
@pytest.mark.parametrize("seed", range(4))
def test_small_cache_evicts_chunks_and_still_equals_full_forward(seed, share):
    """From the smallest cache that can work: the same values, the bound kept, every re-read token reported."""
    model, reference = tiny.tiny_value_model(), tiny.tiny_value_model()
    counter = Counter(model)
    scorer = Bound(model)
    longest_trace = 9 + 4 * 12
    scorer.cache_bytes = int(share * 2 * longest_trace * scorer.bytes_per_token)
    given = grow_random_trees(scorer, reference, seed, trees=4)
    usage = scorer.usage
    assert usage.tokens_scored == given + usage.tokens_reread
    assert counter.tokens == usage.tokens_scored + usage.tokens_padding
    if share == 1.0:
        assert usage.tokens_reread > 0


def test_small_batches_are_only_split():
    model, reference = tiny.tiny_value_model(), tiny.tiny_value_model()
    scorer = ValueScorer(model, max_batch_tokens=5)
    given = grow_random_trees(scorer, reference, seed=9)
    assert scorer.usage.tokens_scored == given


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
    assert scorer.held_bytes == (20 + 8 * 4) * scorer.bytes_per_token
    scorer.keep("t", [1, 2])
    assert scorer.held_bytes == (20 + 2 * 4) * scorer.bytes_per_token


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
    scorer.cache_bytes = scorer.bytes_per_token * 3
    with pytest.raises(ValueError, match="cannot hold a trace of 6 tokens"):
        scorer.score("t", [(0, [1] * 5)])
    assert scorer.score("t", []) == []
