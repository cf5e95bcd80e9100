"""ValueScorer on a device that has less memory than it was told: it backs off, and the values stay the same."""

import logging
import re
import weakref

import pytest
import tiny
import torch
from test_scoring import LONGEST_TRACE, Passes, grow_random_trees
from torch.overrides import TorchFunctionMode

from classifier_lib import ScoringOutOfMemory, ValueScorer
from classifier_lib.cache_budget import MOST_BATCH_TOKENS, CacheBudget, TokenBytes, default_batch_tokens
from classifier_lib.device_memory import OTHER_FORMS, is_out_of_memory


class FailingOperations(TorchFunctionMode):
    """torch's operation number `at`, counted from 0, raises."""

    def __init__(self, at: int = -1):
        super().__init__()
        self.at, self.names = at, []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.names.append(func.__name__)
        if len(self.names) - 1 == self.at:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return func(*args, **(kwargs or {}))


def assert_accounts_are_exact(scorer):
    """What the budget holds is what the trees hold."""
    held = [node.kv for tree in scorer._trees.values() for node in tree.nodes if node.kv is not None]
    with torch._C.DisableTorchFunction():
        assert scorer.budget.held == sum(kv.numel() * kv.element_size() for kv in held)
    assert scorer.budget.working == 0


class Checked(ValueScorer):
    """Looks at its accounts after each call, and notes the values."""

    def __init__(self, *arguments, **settings):
        super().__init__(*arguments, **settings)
        self.values = []

    def score(self, *arguments):
        try:
            values = super().score(*arguments)
        finally:
            assert_accounts_are_exact(self)
        self.values += values
        return values


def grow(scorer, seed: int = 2):
    given = grow_random_trees(scorer, None, seed)
    assert scorer.usage.tokens_scored == given + scorer.usage.tokens_reread
    return scorer


def test_whichever_operation_fails_the_values_and_the_accounts_are_right():
    """Once each: a working copy, an operation in a layer or the head, and the copy that is to be held."""
    model = tiny.tiny_value_model()
    with FailingOperations() as all_operations:
        plain = grow(Checked(model))
    names = all_operations.names
    allocating = [at for at, name in enumerate(names) if name not in ("__getitem__", "__get__")]  # those make views
    chosen = set(allocating[5 :: len(allocating) // 7])
    for name in ("empty", "tensor", "clone", "scaled_dot_product_attention", "softmax"):
        chosen.add([at for at, other in enumerate(names) if other == name][len(names) % 5])
    for at in sorted(chosen):
        with FailingOperations(at):
            scorer = grow(Checked(model))
        assert scorer.back_offs == 1, names[at]
        assert scorer.values == pytest.approx(plain.values, abs=1e-5)
        assert scorer.usage.tokens_reread < plain.usage.tokens_scored / 4


class SmallDevice:
    """Passes that do not fit, with what is held, into so many bytes run out of memory in the middle."""

    def __init__(self, scorer, size: int):
        self.scorer, self.size = scorer, size
        self.hook = scorer.model.model.layers[1].register_forward_pre_hook(self.check, with_kwargs=True)
        self.kv = None

    def check(self, module, args, kwargs):
        self.kv = weakref.ref(kwargs["past_key_values"].layers[0].keys)
        (hidden,) = args
        rows, new, _ = hidden.shape
        budget = self.scorer.budget
        if budget.held + budget.pass_bytes(rows, kwargs["past_key_values"].get_seq_length(), new) > self.size:
            raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize("share", [1.0, 1.5, 30.0])
@pytest.mark.parametrize("seed", range(3))
def test_a_device_that_is_smaller_than_was_said_gives_the_same_values(seed, share):
    """From one that just takes the longest trace alone; what it takes is found out in a few tries."""
    plain = grow_random_values(Checked(tiny.tiny_value_model()), seed)
    scorer = Checked(tiny.tiny_value_model())
    budget, kv = scorer.budget, scorer.budget.token.kv
    size = int(share * max(p * kv + budget.pass_bytes(1, p, LONGEST_TRACE - p) for p in range(LONGEST_TRACE)))
    SmallDevice(scorer, size)
    assert grow_random_values(scorer, seed) == pytest.approx(plain, abs=1e-5)
    assert (scorer.back_offs > 0) == (share < 9)
    assert scorer.back_offs < 20


def grow_random_values(scorer, seed):
    return grow(scorer, seed).values


def test_first_half_of_the_rows_then_other_trees_least_recent_first():
    """Eight rows fail, four fail, two go, for good; then single rows fail until two of three trees have given up."""
    scorer = Checked(tiny.tiny_value_model())
    token, passes = scorer.budget.token, Passes(scorer.model)
    for tree in ("old", "older", "new"):
        scorer.start(tree, [1] * 40)
        scorer.score(tree, [(0, [2] * 10)])
    scorer.score("old", [(0, [3] * 10)])  # so "older" is the least recently scored
    scorer.keep("old", [1])
    held = 3 * 50 * token.kv
    assert scorer.budget.held == held
    device = SmallDevice(scorer, held + scorer.budget.pass_bytes(2, 50, 6) + 3 * 6 * token.kv)
    passes.shapes.clear()
    scorer.score("new", [(1, [4] * 6)] * 8, [True] * 8)
    assert passes.shapes == [(8, 6), (4, 6), (2, 6), (2, 6), (2, 6), (2, 6)]
    assert (scorer.max_batch_tokens, scorer.back_offs) == (12, 2)
    assert scorer.budget.held == held

    device.size = 50 * token.kv + scorer.budget.pass_bytes(1, 50, 12)
    scorer.score("new", [(1, [5] * 12)], [True])
    assert scorer.budget.held == 50 * token.kv
    assert scorer.back_offs == 4
    device.hook.remove()
    scorer.score("old", [(1, [5])], [True])  # gave up its caches after "older"
    assert scorer.usage.tokens_reread == 50
    assert scorer.tree_usage("old").tokens_reread == 50
    assert scorer.budget.limit == 1 << 62


def test_least_recently_scored_trees_give_up_first():
    scorer = Checked(tiny.tiny_value_model())
    token = scorer.budget.token
    for tree in ("a", "b", "c"):
        scorer.start(tree, [1] * 40)
        scorer.score(tree, [(0, [2] * 10)])
    scorer.score("a", [(1, [3] * 2)], [True])  # so "b" is the least recently scored
    device = SmallDevice(scorer, 2 * 50 * token.kv + scorer.budget.pass_bytes(1, 50, 8))
    scorer.score("c", [(1, [5] * 8)], [True])
    device.hook.remove()
    assert scorer.back_offs == 1
    for tree, reread in (("a", 0), ("b", 50)):
        assert scorer.budget.held == 2 * 50 * token.kv
        scorer.score(tree, [(1, [6])], [True])
        assert scorer.tree_usage(tree).tokens_reread == reread


def test_the_failed_pass_is_gone_before_the_next_try(monkeypatch):
    """The exception's frames hold its tensors, here in a circle that only the garbage collector finds."""
    scorer = Checked(tiny.tiny_value_model())
    scorer.start("t", [1] * 30)
    device = SmallDevice(scorer, scorer.budget.pass_bytes(2, 30, 6) + 60 * scorer.budget.token.kv)

    class Circular(torch.OutOfMemoryError):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.me = self

    emptied = []

    def empty_cache():
        emptied.append(device.kv())

    monkeypatch.setattr(torch, "OutOfMemoryError", Circular)
    monkeypatch.setattr(torch.cuda, "empty_cache", empty_cache)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10**9, 80 * 10**9))
    give_back_on("cuda:0", monkeypatch)
    scorer.score("t", [(0, [2] * 6)] * 8)
    assert scorer.back_offs > 0
    assert emptied == [None] * scorer.back_offs


def give_back_on(device, monkeypatch):
    """The scorer's device seems to be this one where memory is given back."""
    from classifier_lib import scoring

    give_back = scoring.give_back
    monkeypatch.setattr(scoring, "give_back", lambda _: give_back(torch.device(device)))


def test_one_trace_alone_that_does_not_fit_is_one_line_and_leaves_the_accounts_right(caplog):
    scorer = Checked(tiny.tiny_value_model())
    for tree in ("a", "b"):
        scorer.start(tree, [1] * 40)
        scorer.score(tree, [(0, [2] * 10)] * 3)
    SmallDevice(scorer, 50 * scorer.budget.token.kv)
    with pytest.raises(ScoringOutOfMemory, match=re.escape(
        "out of memory on cpu for a single trace of 56 tokens (50 held, 6 to read), with nothing else held: it takes about"
    )) as caught:  # fmt: skip
        scorer.score("b", [(1, [4] * 6)] * 4)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, MemoryError)
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1 < scorer.back_offs
    assert (
        warnings[0]
        .getMessage()
        .startswith("scoring: out of memory on cpu reading 4 x 6 new tokens behind 50 held ones (")
    )
    assert "going on with 12 new tokens a pass" in warnings[0].getMessage()
    assert scorer.budget.held == 50 * scorer.budget.token.kv
    scorer.release("a")
    scorer.release("b")
    assert scorer.budget.held == 0


def test_a_copy_that_finds_no_memory_is_read_again_later():
    def scorer_and_items(tree="t", scorer=None):
        scorer = scorer or Checked(tiny.tiny_value_model(), 10**6)
        scorer.start(tree, [1] * 20)
        scorer.score(tree, [(0, [2] * 4)])
        return scorer, [(1, [3] * 4), (1, [4] * 4)]

    scorer, items = scorer_and_items()
    with FailingOperations() as operations:
        scorer.score("t", items)
    scorer, items = scorer_and_items()
    with FailingOperations(operations.names.index("clone")):
        scorer.score("t", items)
    assert scorer.budget.held == (20 + 4 + 4) * scorer.budget.token.kv
    assert (scorer.back_offs, scorer.budget.ceiling) == (1, 500_000)
    scorer.score("t", [(2, [5]), (3, [5])])
    assert scorer.usage.tokens_reread == 4


def test_one_failure_takes_half_of_the_bound_at_most():
    budget = CacheBudget(TokenBytes(kv=1, new=1, key=0, pair=0), limit=1000)
    assert budget.hold(700)
    budget.shrink(200)
    assert (budget.free, budget.limit) == (199, 1000)
    budget.drop(690)
    budget.shrink(5)
    assert budget.free == 899 // 2 - 10
    budget.check_last_row(0, 990)  # its bound is the one that was given


def test_other_errors_go_through():
    scorer = Checked(tiny.tiny_value_model())
    scorer.start("t", [1] * 5)

    def fail(*_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    scorer.model.model.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        scorer.score("t", [(0, [2])])
    assert scorer.back_offs == 0


def test_forms_of_running_out_of_memory():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 50, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    for form in OTHER_FORMS:
        assert is_out_of_memory(RuntimeError(f"{form} when calling something"))
    assert not is_out_of_memory(RuntimeError("shapes do not fit"))


def test_a_pass_takes_an_eighth_of_the_bound_unless_told():
    token = TokenBytes(kv=100, new=1000, key=10, pair=1)
    assert default_batch_tokens(token, None) == default_batch_tokens(token, 10**12) == MOST_BATCH_TOKENS
    assert default_batch_tokens(token, 8 * 5000 * 1000) == 5000
    assert default_batch_tokens(token, 1000) == 1024
    model = tiny.tiny_value_model()
    limit = 8 * 2000 * ValueScorer(model).budget.token.new
    assert ValueScorer(model, limit).max_batch_tokens == 2000
    assert ValueScorer(model, limit, max_batch_tokens=7).max_batch_tokens == 7
