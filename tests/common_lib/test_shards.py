"""`--shard I/N`: what is one, and that the parts of one N share the work out."""

import pytest

from common_lib.cli import UserError
from common_lib.shards import Shard


def test_a_shard_is_read_and_said_as_it_is_written():
    shard = Shard.parse("1/4", "--shard")
    assert (shard, str(shard), shard.suffix) == (Shard(1, 4), "1/4", ".shard-1-of-4")
    assert Shard.parse("10/12", "--shard") == Shard(10, 12) and Shard.parse("0/1", "--shard") == Shard(0, 1)


@pytest.mark.parametrize(
    "text", ["4/4", "5/4", "-1/4", "0/0", "1", "1/", "/4", "1/4/2", "1.0/4", " 1/4", "1/4\n", "a/b", "", "١/٤"]
)
def test_anything_else_is_one_line_with_the_rule(text):
    with pytest.raises(UserError) as error:
        Shard.parse(text, "--shard")
    assert str(error.value).startswith(f"--shard {text!r} must be I/N with 0 <= I < N")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_each_piece_is_of_one_part(count):
    shards = [Shard(index, count) for index in range(count)]
    for number in range(20):
        assert [shard.index for shard in shards if shard.holds(number)] == [number % count]
