"""Evaluation of a value model on held-out problems: is the value right, calibrated, and does it tell beams apart?"""

import numpy as np
import torch

from classifier_lib import LABEL_CORRECT, success_probs
from eval_lib.calibration import auc, auc_within, brier_score, expected_calibration_error
from training_lib.batch_order import RankBatches
from training_lib.packing import MicroBatch
from training_lib.step import TrainStep

POSITIONS = (0, 25, 50, 75, 100)  # percent of the roll-out
SLICE = 8  # micro batches' worth of roll-outs that are read at a time


def evaluate(step: TrainStep, batches: RankBatches) -> dict[str, float]:
    """Metrics over all roll-outs (or all pairs of the first epoch) of the validation data; the same on every rank.

    `step` computes logits and loss as in training. Names: loss (as trained), accuracy (of the class, by token), auc,
    brier, ece (of the value against label == 1, over all roll-out tokens), and at 0 to 100 % of the roll-out
    `accuracy_at_P, auc_at_P, within_auc_at_P, brier_at_P, ece_at_P`; within: between roll-outs of one problem, the mean
    over problems. Bradley-Terry: loss, accuracy (pairs in the right order), auc and within_auc of the last token's
    value, which is no probability. What does not exist (one kind only) is left out.
    """
    step.model.eval()
    try:
        parts = step.world.gather(_rank_results(step, batches))
    finally:
        step.model.train()
    found = [part for _, parts_of_rank in parts for part in parts_of_rank]
    arrays = {name: np.concatenate([part[name] for part in found]) for name in found[0]}
    metrics = _pair_metrics(**arrays) if batches.pairs else _rollout_metrics(**arrays)
    return {"loss": sum(loss for loss, _ in parts)} | {
        name: float(value) for name, value in metrics.items() if value is not None
    }


@torch.no_grad()
def _rank_results(step: TrainStep, batches: RankBatches) -> tuple[float, list[dict[str, np.ndarray]]]:
    """This rank's part of the loss, and what `_batch_results` says of each of its micro batches."""
    units = batches.all_units()
    share = np.array_split(units, batches.world_size)[batches.rank]
    longest_share = -(-len(units) // batches.world_size)
    per_slice = SLICE * batches.micro_batch_size // units.shape[1]
    loss, found = 0.0, []
    for start in range(0, longest_share, per_slice):
        with step.world.together():
            micro_batches = batches.lay_out(share[start : start + per_slice])
        for batch in step.pad_to_same_count(micro_batches):
            logits = step.logits(batch)
            loss += float(step.loss(logits, batch, units.size))
            found.append(_batch_results(batch, logits.float().cpu(), batches))
    return loss, found


def _batch_results(batch: MicroBatch, logits: torch.Tensor, batches: RankBatches) -> dict[str, np.ndarray]:
    """correct bool, problem [R] of each roll-out. Bradley-Terry: value float32 [R] of its last token. Else its length [R],
    and value float32, hit bool [P] of each roll-out token."""
    correct = batch.labels == LABEL_CORRECT
    rows = np.array([row for row, _ in batch.sources], dtype=np.int64)
    found = {"correct": correct, "problem": batches.table.problems[np.searchsorted(batches.table.rows, rows)]}
    if batches.pairs:
        return found | {"value": logits[torch.from_numpy(batch.last_index)].squeeze(-1).numpy()}
    logits, owner = logits[torch.from_numpy(batch.token_index)], batch.rollout_index
    if logits.shape[-1] == 1:
        hit = (logits.squeeze(-1).numpy() > 0) == correct[owner]
    else:
        hit = logits.argmax(dim=-1).numpy() == batch.labels[owner]
    length = np.bincount(owner, minlength=len(correct))
    return found | {"value": success_probs(logits).numpy(), "hit": hit, "length": length}


def _rollout_metrics(value, hit, length, correct, problem) -> dict[str, float | None]:
    by_token = np.repeat(correct, length)
    metrics = {
        "accuracy": hit.mean(),
        "auc": auc(by_token, value),
        "brier": brier_score(by_token, value),
        "ece": expected_calibration_error(by_token, value),
    }
    read = length > 0  # a roll-out that was cut away whole has no value
    first, correct, problem = (np.cumsum(length) - length)[read], correct[read], problem[read]
    for percent in POSITIONS:
        at = first + np.round((length[read] - 1) * percent / 100).astype(np.int64)
        metrics |= {
            f"accuracy_at_{percent}": hit[at].mean(),
            f"auc_at_{percent}": auc(correct, value[at]),
            f"within_auc_at_{percent}": auc_within(correct, value[at], problem)["auc"],
            f"brier_at_{percent}": brier_score(correct, value[at]),
            f"ece_at_{percent}": expected_calibration_error(correct, value[at]),
        }
    return metrics


def _pair_metrics(value, correct, problem) -> dict[str, float | None]:
    return {
        "accuracy": (value[0::2] > value[1::2]).mean(),
        "auc": auc(correct, value),
        "within_auc": auc_within(correct, value, problem)["auc"],
    }


def format_evaluation(metrics: dict[str, float]) -> str:
    """The main figures on one line."""
    names = ("loss", "accuracy", "auc", "within_auc", "within_auc_at_75", "brier", "ece")
    return "evaluation: " + " ".join(f"{name} {metrics[name]:.4f}" for name in names if name in metrics)
