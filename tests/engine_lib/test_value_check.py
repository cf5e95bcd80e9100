"""The known sequence at the start of a run: right values pass, and numbers of anything else end it with one line."""

import asyncio
import logging
from types import SimpleNamespace

import pytest
import tiny
import torch

from common_lib.cli import UserError
from engine_lib.base import EngineError
from engine_lib.value_base import ValueConfig, Valued
from engine_lib.value_check import TOLERANCE, check_values, known_traces, local_values
from engine_lib.value_wire import read_row

CONFIG = ValueConfig("", tiny.tiny_config().vocab_size, 3)


def plain(folder) -> list[float]:
    """Each trace by a forward pass of its own."""
    model = tiny.Qwen2ForClassifier.from_pretrained(folder).eval()
    with torch.inference_mode():
        return [model(torch.tensor([ids])).success_probs[0, -1].item() for ids in known_traces(264)]


def check(folder, values, computed=1, **settings):
    """With an engine that answers these values, whatever it is asked."""

    async def answer(traces, group):
        assert traces == known_traces(264)
        return [Valued(value, computed) for value in values]

    config = ValueConfig(str(folder), 264, 3, **settings)
    asyncio.run(check_values(SimpleNamespace(values=answer), config))


@pytest.fixture(scope="module")
def right(value_folder):
    return plain(value_folder)


def test_the_known_traces_are_prefixes_of_ids_that_every_vocabulary_has():
    traces = known_traces(152_000)
    assert len(traces) > 2 and max(max(trace) for trace in traces) < 128
    assert all(traces[-1][: len(trace)] == trace for trace in traces)
    assert max(known_traces(50)[-1]) < 50


def test_the_local_values_are_those_of_a_plain_forward_pass(value_folder, right):
    ends = [len(trace) for trace in known_traces(264)]
    assert local_values(str(value_folder), known_traces(264)[-1], ends) == pytest.approx(right, abs=1e-6)
    assert max(right) - min(right) > 0.01, "values that are all alike show nothing"


def test_right_values_pass_and_what_was_held_against_what_is_said(value_folder, right, caplog):
    caplog.set_level(logging.INFO)
    check(value_folder, [value + 1e-6 for value in right])
    (said,) = [line for line in caplog.messages if line.startswith("value model: ")]
    assert (
        f"4 served values (fp32) of a known sequence are within 1e-06 of a forward pass of {value_folder} in fp32"
        in said
    )


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_each_value_may_be_off_by_rounding_alone(value_folder, right, dtype):
    off = TOLERANCE[dtype]
    check(value_folder, [right[0] + 0.9 * off, *right[1:]], dtype=dtype)
    for place in (0, 3):
        values = list(right)
        values[place] += 1.1 * off
        with pytest.raises(
            UserError, match="another value model is served, or engine_lib.sglang_value_model failed"
        ) as error:
            check(value_folder, values, dtype=dtype)
        assert f"rounding in {dtype}" in str(error.value) and "\n" not in str(error.value)


def test_another_value_model_is_refused(value_folder, right, tmp_path):
    other = tiny.save_value_model(tmp_path / "other", tokenizer=False, seed=9)
    with pytest.raises(UserError, match=rf"and {other} gives 0\.\d+ \(off by 0\.\d+; 0.002 is rounding in fp32\)"):
        check(other, right)


@pytest.mark.parametrize(("value", "computed"), [(float("nan"), 1), (1.5, 1), (0.5, 0)])
def test_what_is_no_value_is_refused_without_weights_too(value, computed, tmp_path):
    with pytest.raises(UserError, match="serves no value model of this project"):
        check(tmp_path, [value] * 4, computed)


@pytest.mark.parametrize("row", [[0.5] * 32, [0.0, float("nan"), 0.0, 3.0]])
def test_numbers_of_another_model_are_the_users_to_mend(row, tmp_path):
    """After an EngineError a run says that the same command goes on."""

    async def answer(traces, group):
        return [read_row(row, 3) for _ in traces]

    with pytest.raises(
        UserError, match="has 32 numbers, and a value model of 3|which are no numbers to compare by"
    ) as error:
        asyncio.run(check_values(SimpleNamespace(values=answer), ValueConfig(str(tmp_path), 264, 3)))
    assert "\n" not in str(error.value)


def test_an_engine_that_is_dead_stays_an_engine_error(tmp_path):
    async def answer(traces, group):
        raise EngineError("it died")

    with pytest.raises(EngineError, match="^it died$"):
        asyncio.run(check_values(SimpleNamespace(values=answer), ValueConfig(str(tmp_path), 264, 3)))


def test_without_weights_it_is_said_that_nothing_was_held_against_them(tmp_path, caplog):
    check(tmp_path, [0.5] * 4)
    assert f"no weights in {tmp_path}, so its served values cannot be held against it" in caplog.text
