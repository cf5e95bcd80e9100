"""What a served value model writes for a request, for the model package and for all who read it. No torch.

A reply is one row of float32 numbers, L = num_labels:
- the value at the last token: L raw logits of it, then the number of tokens computed for the request;
- values at K given positions: for each position L raw logits and the size of the model's vocabulary, then the number of tokens
  computed. The size is 0, and the logits too, where the position's keys and values were cached: it has no hidden state, and so no value.
"""

import math
from array import array
from collections.abc import Mapping, Sequence
from typing import Any

from engine_lib.value_base import NoValue, Valued

ARCHITECTURES = ("Qwen2ForClassifier",)  # config.json's of the value models that the package has
LABEL_CORRECT = 1  # classifier_lib's, which imports torch


def row_of(output: Mapping[str, Any]) -> list[float] | None:
    """The row of one of SGLang's outputs, as `/encode` and the engine give them; None where the request was aborted: a row
    that comes then is of the chunk before."""
    aborted = output["meta_info"]["finish_reason"]["type"] == "abort"
    return None if aborted else output.get("embedding")


def read_row(floats: Sequence[float], num_labels: int) -> Valued:
    """The value at the last token. Raises NoValue for what is no such row, or not a number."""
    _check_length(floats, num_labels + 1, num_labels)
    return Valued(value_of(floats[:num_labels]), int(floats[num_labels]))


def read_positions(floats: Sequence[float], positions: int, num_labels: int) -> tuple[list[float | None], int]:
    """The values at so many positions, None where its keys and values were cached, and the tokens computed. Raises
    NoValue for what is no such row, or not a number."""
    width = num_labels + 1
    _check_length(floats, positions * width + 1, num_labels)
    rows = [floats[start : start + width] for start in range(0, positions * width, width)]
    return [value_of(row[:num_labels]) if row[num_labels] else None for row in rows], int(floats[-1])


def read_vocabulary(floats: Sequence[float], num_labels: int) -> int:
    """The size of the model's vocabulary, of the row at one position: a trace's last, which is never cached. SGLang tells it
    nowhere (0.5.23). Raises NoValue for what is no such row."""
    _check_length(floats, num_labels + 2, num_labels)
    return int(floats[num_labels])


def value_of(logits: Sequence[float]) -> float:
    """Probability of a correct end, as `classifier_lib.success_probs` has it: softmax()[1], or the sigmoid of one logit.

    Rounded to float32 as a local model's is: what is a tie there is one here. Raises NoValue for NaN.
    """
    if not all(map(math.isfinite, logits)):
        raise NoValue(f"the value model gave {list(logits)}, which are no numbers to compare by")
    both = logits if len(logits) > 1 else [0.0, *logits]
    weights = [math.exp(logit - max(both)) for logit in both]
    return array("f", [weights[LABEL_CORRECT] / sum(weights)])[0]


def _check_length(floats: Sequence[float], length: int, num_labels: int) -> None:
    if len(floats) != length:
        raise NoValue(
            f"the server's reply has {len(floats)} numbers, and a value model of {num_labels} labels writes {length}: "
            "it serves another model, or the package engine_lib.sglang_value_model failed to load"
        )
