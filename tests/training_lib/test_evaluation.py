"""Evaluation against figures computed from each trace by itself, on one rank and on several, each with its own share."""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from rollouts import write_rows
from tiny import tiny_value_model
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, logsigmoid
from train_spy import numbered_rows

from training_lib.attention import SDPA
from training_lib.batch_order import RankBatches
from training_lib.evaluation import POSITIONS, evaluate, format_evaluation
from training_lib.ranks import World
from training_lib.rollout_data import RolloutTable, load_rollouts
from training_lib.step import TrainStep

CPU = torch.device("cpu")


class Meeting:
    """Where the ranks, threads of one process, hand each other their items."""

    def __init__(self, size: int):
        self.items: list[Any] = [None] * size
        self.barrier = threading.Barrier(size, timeout=60)

    def gather(self, rank: int, item: Any) -> list[Any]:
        self.items[rank] = copy.deepcopy(item)
        self.barrier.wait()
        items = list(self.items)
        self.barrier.wait()
        return items


@dataclass(frozen=True)
class ThreadWorld(World):
    meeting: Meeting = field(default_factory=lambda: Meeting(1))

    def gather(self, item: Any) -> list[Any]:
        return self.meeting.gather(self.rank, item)

    def sum(self, numbers: list[float]) -> list[float]:
        return np.sum(self.gather(numbers), axis=0).tolist()


@pytest.fixture
def table(tmp_path, monkeypatch):
    """11 rows with 3 or 2 roll-outs each: an odd number, cut at 20 tokens."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = numbered_rows(0, 11, per_row=3)
    for row in rows[::3]:
        for name in ("roll_in_ids", "roll_outs_ids", "labels", "grades"):
            row[name].pop()
    rows[4]["problem"] = rows[1]["problem"]
    return load(write_rows(tmp_path / "data", rows))


def load(path) -> RolloutTable:
    return load_rollouts(str(path), vocab_size=264, max_length=20, num_response=3)


def evaluate_on(
    ranks: int, table: RolloutTable, num_labels=3, pairs=False, packing="none", sharded=False
) -> tuple[list[dict[str, float]], list[list[tuple[int, int]]]]:
    """Metrics on each rank, and the roll-outs that each read."""
    meeting, read = Meeting(ranks), [[] for _ in range(ranks)]

    def on_rank(rank: int) -> dict[str, float]:
        batches = RankBatches(table, 3, 4, 2, packing, 1, pairs, rank, ranks)
        model = models[rank]
        step = TrainStep(
            model, ThreadWorld(rank, ranks, CPU, meeting), SDPA, False, 4, pairs, packing != "none", sharded
        )
        lay_out = batches.lay_out

        def spy(units):
            found = lay_out(units)
            read[rank] += [source for batch in found for source in batch.sources]
            return found

        batches.lay_out = spy
        try:
            return evaluate(step, batches)
        except Exception:
            meeting.barrier.abort()  # the others need not wait
            raise
        finally:
            assert model.training

    models = [tiny_value_model(num_labels=num_labels).train() for _ in range(ranks)]
    with ThreadPoolExecutor(ranks) as pool:
        return list(pool.map(on_rank, range(ranks))), read


def traces_alone(table: RolloutTable, num_labels: int) -> list[tuple[Any, torch.Tensor]]:
    """Every trace and its logits, read by itself."""
    model = tiny_value_model(num_labels=num_labels).eval()
    with torch.no_grad():
        traces = [table.trace(i) for i in range(len(table))]
        return [(trace, model(torch.from_numpy(trace.tokens[None].astype(np.int64))).logits[0]) for trace in traces]


def area(correct, value) -> float:
    """Under the ROC curve: how often a correct one has the higher value; ties are half."""
    correct, value = np.array(correct, dtype=bool), np.array(value, dtype=np.float64)
    gaps = value[correct][:, None] - value[~correct][None, :]
    return float(((gaps > 0) + (gaps == 0) / 2).mean())


def figures(correct: np.ndarray, value: np.ndarray) -> dict[str, float]:
    bins = np.minimum((value * 10).astype(int), 9)
    gaps = [abs(value[bins == b].sum() - correct[bins == b].sum()) for b in range(10)]
    return {"auc": area(correct, value), "brier": np.mean((value - correct) ** 2), "ece": sum(gaps) / len(value)}


@pytest.mark.parametrize("num_labels", [3, 1])
def test_figures_are_those_of_the_traces_by_themselves(table, num_labels):
    [found], _ = evaluate_on(1, table, num_labels)
    losses, values, hits, rights, ends = [], [], [], [], {percent: [] for percent in POSITIONS}
    for trace, logits in traces_alone(table, num_labels):
        logits, right = logits[trace.start :], trace.label == 1
        if num_labels == 1:
            losses.append(binary_cross_entropy_with_logits(logits[:, 0], torch.full((len(logits),), float(right))))
            value, hit = logits[:, 0].sigmoid().numpy(), (logits[:, 0].numpy() > 0) == right
        else:
            losses.append(cross_entropy(logits, torch.full((len(logits),), trace.label)))
            value, hit = logits.softmax(-1)[:, 1].numpy(), logits.argmax(-1).numpy() == trace.label
        values.append(value)
        hits.append(hit)
        rights.append(right)
        for percent in POSITIONS:
            ends[percent].append(round((len(value) - 1) * percent / 100))
    by_token = np.repeat(rights, [len(value) for value in values])
    wanted = {"loss": np.mean(losses), "accuracy": np.concatenate(hits).mean()} | figures(
        by_token, np.concatenate(values)
    )
    for percent in POSITIONS:
        at = np.array([value[i] for value, i in zip(values, ends[percent], strict=True)])
        wanted |= {f"{name}_at_{percent}": figure for name, figure in figures(np.array(rights), at).items()}
        wanted[f"accuracy_at_{percent}"] = np.mean([hit[i] for hit, i in zip(hits, ends[percent], strict=True)])
        by_problem: dict[int, list[int]] = {}
        for i in range(len(table)):
            by_problem.setdefault(int(table.problems[table.row_of(np.array([i]))[0]]), []).append(i)
        mixed = [of for of in by_problem.values() if 0 < sum(rights[i] for i in of) < len(of)]
        assert len(mixed) > 3 and max(map(len, mixed)) == 6  # two rows of one problem
        wanted[f"within_auc_at_{percent}"] = np.mean([area([rights[i] for i in of], at[of]) for of in mixed])
    assert found == pytest.approx(wanted, rel=1e-5)


def test_pairs_are_judged_by_their_last_tokens(table):
    [found], [read] = evaluate_on(1, table, num_labels=1, pairs=True)
    last = {trace.source: float(logits[-1, 0]) for trace, logits in traces_alone(table, 1)}
    label = {trace.source: trace.label for trace, _ in traces_alone(table, 1)}
    pairs = list(zip(read[::2], read[1::2], strict=True))
    assert len(pairs) > 5 and all(label[a] == 1 != label[b] and a[0] == b[0] for a, b in pairs)
    gaps = torch.tensor([last[a] - last[b] for a, b in pairs])
    correct, value = [label[name] == 1 for name in read], [last[name] for name in read]
    assert found["loss"] == pytest.approx(float(-logsigmoid(gaps).mean()), rel=1e-5)
    assert found["accuracy"] == pytest.approx(float((gaps > 0).float().mean()))
    assert found["auc"] == pytest.approx(area(correct, value))


@pytest.mark.parametrize("kind", [{}, {"num_labels": 1, "pairs": True}, {"packing": "tree"}, {"sharded": True}])
@pytest.mark.parametrize("ranks", [2, 3])
def test_several_ranks_evaluate_as_one_each_its_own_share(table, ranks, kind):
    [one], [everything] = evaluate_on(1, table, **kind)
    several, shares = evaluate_on(ranks, table, **kind)
    assert all(metrics == several[0] for metrics in several)
    assert several[0] == pytest.approx(one, rel=1e-5)
    assert sorted(name for share in shares for name in share) == sorted(everything)
    assert len(set(everything)) == len(everything) > 10
    assert max(map(len, shares)) - min(map(len, shares)) <= (2 if kind.get("pairs") else 1)


@pytest.mark.parametrize("sharded", [False, True])
def test_fewer_rollouts_than_ranks(table, sharded):
    few = table.select(np.arange(len(table.rows)) < 1)
    assert len(few) == 2
    [one], _ = evaluate_on(1, few)
    several, shares = evaluate_on(3, few, sharded=sharded)
    assert [len(share) for share in shares] == [1, 1, 0]
    assert several == [pytest.approx(one, rel=1e-5)] * 3


def test_what_does_not_exist_is_left_out(table):
    """Without a correct roll-out there is no area under a curve."""
    wrong = table.select(np.zeros(len(table.rows), dtype=bool) | (np.arange(len(table.rows)) < 2))
    wrong.labels[:] = 0
    [found], _ = evaluate_on(1, wrong)
    assert not [name for name in found if "auc" in name]
    assert format_evaluation(found).count("auc") == 0
    assert {"loss", "accuracy", "brier", "ece", "brier_at_75"} <= set(found)


def test_the_line_of_an_evaluation():
    line = format_evaluation({"loss": 0.5, "auc": 0.25, "within_auc_at_75": 0.75, "auc_at_0": 0.1})
    assert line == "evaluation: loss 0.5000 auc 0.2500 within_auc_at_75 0.7500"
