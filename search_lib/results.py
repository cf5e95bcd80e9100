"""What the files of a run say of a search: the text of each block, and the graded line of the finished search."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from data_utils import Problem
from eval_utils import Grader, extract_answer
from search_lib.tree import Round, SearchResult, Tree

TOTALS = ("tokens_scored", "tokens_reread", "tokens_cached", "seconds_generate", "seconds_score")  # over the rounds
BROKEN = "\N{REPLACEMENT CHARACTER}"  # what the bytes of half a character are decoded to


@dataclass(frozen=True)
class ResultRows:
    """Makes lines. `decode`: token ids of a response, or of its beginning -> text."""

    problems: Sequence[Problem]
    decode: Callable[[list[int]], str]
    grader: Grader

    async def result(self, result: SearchResult) -> dict[str, Any]:
        """The line of X.jsonl: the released code's keys first."""
        task, tree, problem = result.task, result.tree, self.problems[result.task.data_idx]
        responses = [tree.response(node) for node in result.beams]
        answers = [extract_answer(self.decode(ids)) for ids in responses]
        rewards = await self.grader.agrade([(problem.answer, answer) for answer in answers])
        return {
            "repeat_idx": task.repeat_idx,
            "data_idx": task.data_idx,
            "global_idx": task.repeat_idx * len(self.problems) + task.data_idx,
            "problem": problem.problem,
            "gt_answer": problem.answer,
            "generated_ids": responses,
            "generated_scores": [tree.value[node] for node in result.beams],
            "processed_answer": answers,
            "reward": rewards,
            "dt": result.seconds,
            "finish_reasons": [tree.finish[node] for node in result.beams],
            "prompt_tokens": len(task.prompt_ids),
            "tokens_generated": sum(map(len, tree.tokens)),
            **{name: result.total(name) for name in TOTALS},
        }

    def block_texts(self, tree: Tree, record: Round) -> list[str]:
        """Text of each candidate of the round that was added to `tree` last.

        The texts along a path add up to the text of the response: a block may end in mid-character, whose bytes then
        belong to the block that completes it. Where nothing follows, broken bytes are shown.
        """
        first = len(tree.parent) - len(record.parent)
        before = {parent: self.decode(tree.response(parent)).rstrip(BROKEN) for parent in set(record.parent)}
        texts = []
        for node, (parent, finish) in enumerate(zip(record.parent, record.finish, strict=True), first):
            text = self.decode(tree.response(node))
            texts.append((text if finish else text.rstrip(BROKEN)).removeprefix(before[parent]))
        return texts
