"""Answers: extraction from a response, classes of equal ones, votes. Grading is eval_lib.grading's. No torch."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from eval_lib.grading import Grader
from eval_lib.votes import winners

# ----------------------------------------------------------------------------------------------------------- extraction

_BOX_TOKEN = re.compile(r"(?P<box>\\{1,2}(?:boxed|fbox)(?![A-Za-z])\s*)|\\.|[{}]", re.DOTALL)
# What `\boxed 5` boxes. Anything that does not look like mathematics ("write it in \boxed as asked") is no answer.
_BARE_BOX = re.compile(r"(?=[-+\d(\\])(?:(?!\\[\])])[^\s$])+")


def extract_answer(text: str) -> str:
    r"""The content of the last `\boxed{...}` (or `\fbox{...}`, or `\boxed 5`) of a response; '' where there is none.

    Where the response closes its thinking with `</think>`, only what follows counts: a box that is only in the thinking
    is not an answer. Braces must balance: a last box that is never closed (a truncated response) gives ''. Of nested
    boxes the outer one counts, without the inner frame if that is all it holds. Empty boxes are skipped.
    """
    _, closed, after = text.partition("</think>")
    _, _, answer = _last_box(after if closed else text)
    for _ in range(8):  # \boxed{\fbox{5}}
        start, end, inner = _last_box(answer)
        if not inner or answer[start:end] != answer:
            break
        answer = inner
    return answer


def _last_box(text: str) -> tuple[int, int, str]:
    """(start, end, content) of the last box; no content if there is no box or the last is not closed. Linear time."""
    open_braces: list[int] = []  # per open brace: where its box command starts, -1 for an ordinary brace
    last = (0, 0, "")
    box, box_end = -1, -1  # the latest box command: a brace that opens at its end is its own
    for token in _BOX_TOKEN.finditer(text):
        if token["box"] is not None:
            box, box_end = token.span()
            bare = _BARE_BOX.match(text, box_end)
            if bare and (content := bare[0].rstrip(".,;")):
                last = (box, bare.end(), content)
        elif token[0] == "{":
            open_braces.append(box if token.start() == box_end else -1)
        elif token[0] == "}" and open_braces:
            start = open_braces.pop()
            if start >= 0 and (content := text[text.index("{", start) + 1 : token.start()].strip()):
                last = (start, token.end(), content)
    if any(start >= last[1] for start in open_braces):
        return 0, 0, ""
    return last


# -------------------------------------------------------------------------------------------------------------- classes


def problem_classes(lines: Iterable[Mapping[str, Any]], grader: Grader) -> dict[int, dict[int, list[int]]]:
    """Classes of the answers in the lines of an output file: data_idx -> repeat_idx -> class of each beam's answer.

    All repetitions of a problem share one numbering, so their votes can be pooled. Reads `processed_answer`.
    """
    answers: dict[int, dict[int, list[str]]] = {}
    for line in lines:
        answers.setdefault(line["data_idx"], {})[line["repeat_idx"]] = line["processed_answer"]
    classes: dict[int, dict[int, list[int]]] = {}
    for problem, by_repeat in answers.items():
        numbers = iter(grader.answer_classes([answer for beams in by_repeat.values() for answer in beams]))
        classes[problem] = {repeat: [next(numbers) for _ in beams] for repeat, beams in by_repeat.items()}
    return classes


# ---------------------------------------------------------------------------------------------------------------- votes
# classes: the class of each answer (`Grader.answer_classes`), -1 for an empty answer. rewards: is each answer right?
# All three arguments of a vote have one entry an answer. The order of the answers never matters.


def majority_vote(classes: Sequence[int], rewards: Sequence[bool]) -> float:
    """Share of the most frequent answer that is right, in [0, 1]: `weighted_vote` with equal weights."""
    return weighted_vote(classes, rewards, [1.0] * len(classes))


def weighted_vote(classes: Sequence[int], rewards: Sequence[bool], weights: Sequence[float]) -> float:
    """Share of the heaviest answer that is right, in [0, 1] (weighted majority of Wang et al. 2025, arXiv 2505.17373).

    The heaviest answer is the class whose weights (finite, >= 0) have the largest sum. A class is right to the share of
    its weight that is right; classes of equal weight share the vote. An empty answer never wins: 0.0 where all are
    empty. Where all weights are 0 they count as equal.
    """
    votes = [(c, bool(r), float(w)) for c, r, w in zip(classes, rewards, weights, strict=True) if c >= 0]
    if not all(math.isfinite(w) and w >= 0 for _, _, w in votes):
        raise ValueError("the weights of a vote must be finite and not negative")
    if not any(w for _, _, w in votes):
        votes = [(c, r, 1.0) for c, r, _ in votes]
    by_class: dict[int, list[tuple[bool, float]]] = {}
    for c, r, w in votes:
        by_class.setdefault(c, []).append((r, w))
    # fsum is exact up to its one rounding: the order of the answers cannot change a sum, nor make or break a tie.
    total = [math.fsum(w for _, w in members) for members in by_class.values()]
    right = [math.fsum(w for r, w in members if r) for members in by_class.values()]
    shares = [r / t for r, t, wins in zip(right, total, winners(total), strict=True) if wins]
    return math.fsum(shares) / len(shares) if shares else 0.0


def best_of_n(classes: Sequence[int], rewards: Sequence[bool], scores: Sequence[float]) -> float:
    """Is the answer with the highest score right? Ties share. An empty answer never wins: 0.0 where all are empty."""
    answers = [(float(s), bool(r)) for c, r, s in zip(classes, rewards, scores, strict=True) if c >= 0]
    if any(math.isnan(score) for score, _ in answers):
        raise ValueError("a score is not a number")
    top = max((score for score, _ in answers), default=0.0)
    best = [right for score, right in answers if score == top]
    return sum(best) / len(best) if best else 0.0


def pass_at_k(num_samples: int, num_right: int, k: int) -> float:
    """Unbiased P(any of k samples is right) = 1 - C(n-c, k) / C(n, k) (Chen et al. 2021, arXiv 2107.03374, eq. 1)."""
    if not 0 <= num_right <= num_samples or not 1 <= k <= num_samples:
        raise ValueError(f"pass@k needs 0 <= right <= samples, 1 <= k <= samples: {num_samples=}, {num_right=}, {k=}")
    return 1.0 - math.comb(num_samples - num_right, k) / math.comb(num_samples, k)
