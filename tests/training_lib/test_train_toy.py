"""A problem whose value function is known in closed form is learned, through the real script."""

import math

import datasets
import numpy as np
import torch
from rollouts import write_rows
from transformers import Qwen2Config, Qwen2ForCausalLM

import train_classifier
from classifier_lib import Qwen2ForClassifier
from eval_lib.calibration import expected_calibration_error

# A walk of 11 fair steps succeeds where it ends above 0. All walks are equally long: a roll-out's tokens weigh
# 1 / length, so where length and success go together the loss's optimum is a length-weighted share, not a probability.
NUM_MOVES = 11
DOWN, UP, START, END = 0, 1, 2, 3


def success_probability(moves: np.ndarray) -> float:
    """P(a walk that begins with `moves` ends above 0): a tail of the binomial distribution of the ups to come."""
    left = NUM_MOVES - len(moves)
    ups_needed = (NUM_MOVES + 1) // 2 - int(moves.sum())
    return sum(math.comb(left, ups) for ups in range(max(ups_needed, 0), left + 1)) / 2**left


def make_rows(rng, num_rows: int) -> list[dict]:
    """Four walks on from a random prefix of a walk in each row."""
    rows = []
    for number in range(num_rows):
        prefix = rng.integers(0, 2, rng.integers(0, NUM_MOVES))
        walks = [rng.integers(0, 2, NUM_MOVES - len(prefix)) for _ in range(4)]
        rows.append(
            {
                "problem": f"walk {number}",
                "roll_in_ids": [[START, *prefix.tolist()]] * 4,
                "roll_outs_ids": [[*moves.tolist(), END] for moves in walks],
                "labels": [int(2 * (prefix.sum() + moves.sum()) > NUM_MOVES) for moves in walks],
            }
        )
    return rows


def test_a_random_walks_success_probability_is_learned(tmp_path, monkeypatch):
    """Mean absolute error and calibration error below 0.05, over all prefixes; no single token tells where a walk is."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rng = np.random.default_rng(0)
    write_rows(tmp_path / "data", make_rows(rng, 4000))
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=4, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(tmp_path / "backbone")
    arguments = {
        "data_path": tmp_path / "data", "model_path": tmp_path / "backbone", "save_dir": tmp_path, "run_name": "run",
        "data_num_response": 4, "max_length": 16, "num_steps": 300, "total_batch_size": 128, "micro_batch_size": 128,
        "max_lr": 5e-3, "eval_every": -1, "save_every": 1000, "device": "cpu", "p_dropout": 0.0,
    }  # fmt: skip
    parts = [str(part) for name, value in arguments.items() for part in (f"--{name}", value)]
    assert train_classifier.main([*parts, "--no-gradient_checkpointing"]) == 0

    model = Qwen2ForClassifier.from_pretrained(tmp_path / "run/latest").eval()
    walks = rng.integers(0, 2, (1000, NUM_MOVES))
    with torch.no_grad():
        values = model(torch.tensor([[START, *moves] for moves in walks.tolist()])).success_probs.numpy()
    truths = np.array([[success_probability(moves[:n]) for n in range(NUM_MOVES + 1)] for moves in walks])
    succeeded = np.repeat(2 * walks.sum(axis=1, keepdims=True) > NUM_MOVES, NUM_MOVES + 1, axis=1)
    error = np.abs(values - truths).mean()
    calibration = expected_calibration_error(succeeded.ravel(), values.ravel())
    print(f"mean absolute error {error:.4f}, calibration error {calibration:.4f} over {values.size} prefixes")
    assert error < 0.05
    assert calibration < 0.05
    assert np.abs(truths - 0.5).mean() > 0.2  # a constant would not do
