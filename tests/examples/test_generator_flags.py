"""Every flag of the script that makes the miniature's generator, at its consumer: optimizer, batches, problems, noise."""

import json
import math

import pytest
import torch
from parser_flags import flags_of, words

from examples.miniature import make_generator

GENERATOR = {
    "num_steps": 5, "batch_size": 3, "max_lr": 0.002, "num_train": 7, "num_test": 4, "forget_carry": 0.1, "skip_step": 0.2,
    "stall": 0.3, "seed": 5,
}  # fmt: skip


@pytest.fixture
def made(tmp_path, monkeypatch):
    """Make a generator; returns its folder, learning rates, batch shapes and the noise of its traces."""
    rates, shapes, noises = [], [], []
    adamw, encode, noisy = torch.optim.AdamW, make_generator.encode, make_generator.noisy_trace

    class Spy(adamw):
        def step(self, *args, **more):
            rates.append(self.param_groups[0]["lr"])
            return super().step(*args, **more)

    def encode_spy(tokenizer, prompts, traces):
        shapes.append(len(traces))
        return encode(tokenizer, prompts, traces)

    def noise_spy(problem, rng, noise):
        noises.append(noise)
        return noisy(problem, rng, noise)

    monkeypatch.setattr(torch.optim, "AdamW", Spy)
    monkeypatch.setattr(make_generator, "encode", encode_spy)
    monkeypatch.setattr(make_generator, "noisy_trace", noise_spy)

    def make(name, **changes):
        for seen in (rates, shapes, noises):
            seen.clear()
        folder = tmp_path / name
        assert make_generator.main([*words(GENERATOR | changes), "--output_dir", str(folder)]) == 0
        return folder, list(rates), list(shapes), list(noises)

    return make


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_flags_of_the_generator_script(made, monkeypatch):
    folder, rates, shapes, noises = made("one")
    assert shapes == [3] * 5
    assert rates == pytest.approx(
        [0.002 * min((s + 1) / 40, 0.5 * (1 + math.cos(math.pi * s / 5))) for s in range(5)]
    )  # fmt: skip
    assert {(noise.forget_carry, noise.skip_step, noise.stall) for noise in noises} == {(0.1, 0.2, 0.3)}
    assert len(noises) == 2 * 3  # of the last two steps; the first three learn clean traces
    assert (len(lines_of(folder / "problems_train.jsonl")), len(lines_of(folder / "problems_test.jsonl"))) == (7, 4)
    known = flags_of(make_generator.parse_args, monkeypatch)
    assert known == {*GENERATOR, "output_dir"}


def test_no_problem_that_is_written_is_learned(made, monkeypatch):
    left_out = []
    batches = make_generator.batches
    monkeypatch.setattr(make_generator, "batches", lambda *given: left_out.append(given[-1]) or batches(*given))
    folder = made("one")[0]
    problems = [lines_of(folder / f"problems_{kind}.jsonl") for kind in ("test", "train")]
    assert {problem.text for problem in left_out[0]} == {row["problem"] for rows in problems for row in rows}
    more = made("more", num_train=20)[0]
    assert lines_of(more / "problems_test.jsonl") == problems[0]  # whatever the number of the others


def test_the_seed_changes_problems_weights_and_traces(made, monkeypatch):
    """And each apart: what is drawn first must not be all that depends on it."""
    drawn = []
    train = make_generator.train

    def spy(model, steps, num_steps, max_lr):
        drawn.append((model.model.embed_tokens.weight.detach().clone(), list(steps)))
        return train(model, iter(drawn[-1][1]), num_steps, max_lr)

    monkeypatch.setattr(make_generator, "train", spy)
    folders = [made(str(seed), seed=seed)[0] for seed in (5, 6)]
    problems = [lines_of(folder / "problems_train.jsonl") for folder in folders]
    assert problems[0] != problems[1]
    assert not torch.equal(drawn[0][0], drawn[1][0])
    assert [ids.tolist() for ids, _ in drawn[0][1]] != [ids.tolist() for ids, _ in drawn[1][1]]
