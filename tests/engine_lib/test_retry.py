"""What is asked again, when, and what is said in the end."""

import asyncio

import pytest

from engine_lib.base import Reply
from engine_lib.retry import RequestsFailed, RetryPolicy, ask_until_whole, is_whole


def whole(length: int) -> Reply:
    return Reply([1] * length, "length", 5)


def stop(length: int) -> Reply:
    return Reply([1] * length, "stop", 5)


def aborted(length: int = 0) -> Reply:
    return Reply([1] * length, "abort", 5)


class Generator:
    """Answers with one list of replies after the other; notes what was asked for, and how long was waited."""

    def __init__(self, *answers: list[Reply]):
        self.answers, self.asked, self.pauses = list(answers), [], []

    async def ask(self, numbers: list[int]) -> list[Reply]:
        self.asked.append(numbers)
        return self.answers.pop(0)

    async def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)

    def replies(self, limits: list[int], **policy) -> list[Reply]:
        return asyncio.run(ask_until_whole(self.ask, limits, RetryPolicy(**policy), self.sleep))


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (stop(1), True), (stop(8), True), (stop(0), False), (stop(9), False),
        (whole(8), True), (whole(7), False), (whole(9), False), (aborted(8), False),
    ],
)  # fmt: skip
def test_a_text_is_whole_at_its_stop_token_or_its_limit(reply, expected):
    assert is_whole(reply, 8) is expected


def test_whole_replies_are_asked_for_once():
    generator = Generator([whole(4), stop(2), whole(7)])
    assert generator.replies([4, 4, 7]) == [whole(4), stop(2), whole(7)]
    assert (generator.asked, generator.pauses) == ([[0, 1, 2]], [])


def test_only_what_is_missing_is_asked_again_and_the_pauses_double():
    generator = Generator([aborted(), whole(4), whole(3), whole(4)], [whole(4), aborted(2)], [aborted()], [stop(1)])
    assert generator.replies([4, 4, 4, 4], pause_s=0.25) == [whole(4), whole(4), stop(1), whole(4)]
    assert generator.asked == [[0, 1, 2, 3], [0, 2], [2], [2]]
    assert generator.pauses == [0.25, 0.5, 1.0]


def test_after_the_last_attempt_one_line_says_how_it_failed():
    generator = Generator([aborted(3), whole(2), whole(4)], [aborted(3), whole(2)], [aborted(3), whole(2)])
    with pytest.raises(RequestsFailed) as error:
        generator.replies([4, 6, 4], attempts=3)
    assert str(error.value) == (
        "the generator failed 3 times (asked for 4 tokens; got abort after 3 tokens; asked for 6 tokens; got length "
        "after 2 tokens)"
    )
    assert len(generator.pauses) == 2


def test_many_failures_are_still_one_short_line():
    generator = Generator([aborted()] * 50)
    with pytest.raises(RequestsFailed) as error:
        generator.asked.append(generator.replies(list(range(1, 51)), attempts=1))
    assert len(str(error.value)) < 200


def test_nothing_is_asked_for_nothing():
    generator = Generator()
    assert generator.replies([]) == []
    assert generator.asked == []


def test_a_generator_that_loses_replies_is_not_believed():
    with pytest.raises(ValueError, match="shorter"):
        Generator([whole(4)]).replies([4, 4])
