"""The layout that is chosen for a run: by device and shared prefixes, the same on all ranks, checked and recorded."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from gpu_parts.layouts import PER_ROW, SyntheticTable, synthetic_table
from rollouts import random_rows, run_script, write_rows
from tiny import save_generator, tiny_value_model
from train_spy import command, numbered_rows, spied_run

from common_lib.cli import UserError
from training_lib.arguments import parse_args
from training_lib.batch_order import epoch_pairs, epoch_rollouts, first_groups
from training_lib.layout import LOOKED_AT, choose_packing, pair_cost, settle_layout
from training_lib.ranks import World
from training_lib.rollout_table import RolloutTable
from training_lib.step import step_flops

RELEASED = [
    "--data_num_response",
    "56",
    "--total_batch_size",
    "64",
    "--micro_batch_size",
    "8",
    "--small_group_size",
    "2",
]


class Unrelated(SyntheticTable):
    """Roll-ins that share nothing."""

    def ids(self, row, column):
        roll_in, roll_out = super().ids(row, column)
        return (roll_in + row * PER_ROW + column) % self.vocab_size, roll_out


class HalfShared(RolloutTable):
    """Rows of two roll-outs of 100 tokens, of which `vocab_size` are shared."""

    def ids(self, row, column):
        return np.arange(self.vocab_size), np.full(100 - self.vocab_size, 1 + column)


def half_shared(shared: int) -> HalfShared:
    ones = np.ones(8, dtype=int)
    return HalfShared(
        None, np.arange(4), 2 * np.arange(5), ones, shared * ones, (100 - shared) * ones, np.arange(4), shared, 100
    )


def settled(flags: list[str], table: RolloutTable, device: str, rank: int = 0, told: object = None):
    """The arguments with what was left to the run, and the share that was found. told: what rank 0 has found."""
    world = SimpleNamespace(
        rank=rank, device=torch.device(device), together=World(0, 1, torch.device("cpu")).together,
        from_rank0=lambda item: item if rank == 0 else told,
    )  # fmt: skip
    args = parse_args(flags)
    saved = settle_layout(args, table, world)
    return args.packing, args.row_tokens, saved


@pytest.fixture(scope="module")
def openr1_vm():
    """Rows of 14 x 4 nested prefixes, all lengths a 32nd."""
    return synthetic_table(40, 1000, scale=1 / 32)


def test_the_released_flags_on_a_gpu_are_a_trie_where_prefixes_are_shared_and_packed_where_not(openr1_vm):
    packing, row_tokens, saved = settled(RELEASED, openr1_vm, "cuda")
    assert (packing, row_tokens) == ("tree", 32_768) and 0.15 < saved < 0.3
    assert settled(RELEASED, replace_class(openr1_vm, Unrelated), "cuda") == (
        "pack",
        32_768,
        pytest.approx(0.0, abs=0.01),
    )
    assert settled([*RELEASED[:-1], "1"], openr1_vm, "cuda") == ("pack", 32_768, 0.0)  # groups of one roll-out


def replace_class(table: RolloutTable, kind: type) -> RolloutTable:
    return kind(**{name: getattr(table, name) for name in RolloutTable.__dataclass_fields__})


def test_a_trie_must_save_a_twentieth_of_the_tokens():
    args = parse_args(RELEASED)
    assert choose_packing(args, half_shared(9), "cuda") == ("pack", pytest.approx(0.045))
    assert choose_packing(args, half_shared(10), "cuda") == ("tree", pytest.approx(0.05))


def test_a_cpu_pads_and_reads_nothing(openr1_vm):
    assert settled(RELEASED, None, "cpu") == ("none", None, None)
    assert settled([*RELEASED, "--packing", "tree"], None, "cpu") == ("tree", 8 * 16384, None)


def test_the_first_thousand_groups_are_read_by_rank_0_alone(openr1_vm, monkeypatch):
    read = []
    monkeypatch.setattr(
        SyntheticTable, "trace", lambda table, rollout: read.append(rollout) or RolloutTable.trace(table, rollout)
    )
    settled(RELEASED, openr1_vm, "cuda")
    assert read == epoch_rollouts(openr1_vm, 2, 1337, 0)[: 2 * LOOKED_AT].tolist()
    read.clear()
    assert settled(RELEASED, openr1_vm, "cuda", rank=1, told=("tree", 0.2)) == ("tree", 32_768, 0.2) and not read


def test_groups_are_those_of_the_order_also_where_a_row_ends(openr1_vm):
    """56 roll-outs are 18 groups of three and one of two."""
    groups = first_groups(openr1_vm, 3, False, 7, 50)
    assert len(groups) == 50 and {len(group) for group in groups} == {2, 3}
    assert np.concatenate(groups).tolist() == epoch_rollouts(openr1_vm, 3, 7, 0)[: sum(map(len, groups))].tolist()
    assert all((group % 56 // 3 == group[0] % 56 // 3).all() for group in groups)
    assert len(first_groups(openr1_vm, 3, False, 7, 10**6)) == 40 * 19
    pairs = first_groups(openr1_vm, 3, True, 7, 50)
    assert np.array_equal(pairs, epoch_pairs(openr1_vm, 7, 0)[:50])


def test_rows_hold_the_longest_trace_or_pair(openr1_vm):
    longer = ["--packing", "pack", "--max_length", "40000"]
    assert settled(longer, openr1_vm, "cuda")[1] == 40_000
    assert settled([*longer, "--num_labels", "1", "--train_bt_model"], openr1_vm, "cuda")[1] == 80_000
    one = [
        "--packing",
        "pack",
        "--micro_batch_size",
        "1",
        "--num_labels",
        "1",
        "--train_bt_model",
        "--max_length",
        "50",
    ]
    assert settled(one, openr1_vm, "cpu")[1] == 100
    assert settled([*longer, "--row_tokens", "50000"], openr1_vm, "cuda")[1] == 50_000


def test_what_a_padded_step_must_divide_into_is_checked_when_it_is_known_to_be_padded(openr1_vm):
    flags = ["--total_batch_size", "7", "--micro_batch_size", "4"]
    assert settled(flags, openr1_vm, "cuda")[0] == "tree"
    with pytest.raises(UserError, match="--total_batch_size 7 is not a multiple of 1 ranks x --micro_batch_size 4 = 4"):
        settled(flags, openr1_vm, "cpu")


def test_an_attended_pair_costs_what_it_adds_to_the_flops_of_a_step():
    model = tiny_value_model(hidden_size=64, intermediate_size=200)  # the head, left out, is a part of all weights
    config = model.config
    info = SimpleNamespace(
        hidden_size=64, intermediate_size=200, num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads, head_dim=getattr(config, "head_dim", 64 // config.num_attention_heads),
    )  # fmt: skip
    assert pair_cost(info) == pytest.approx(step_flops(model, 0, 1) / step_flops(model, 1, 0), rel=0.1)


def test_what_was_chosen_is_told_and_stands_in_the_checkpoint(tmp_path, monkeypatch):
    """Of a run that takes this CPU for a GPU as it chooses."""
    from training_lib import layout

    save_generator(tmp_path / "backbone")
    write_rows(tmp_path / "data", random_rows(20, longest=20))
    choose = layout.choose_packing
    monkeypatch.setattr(layout, "choose_packing", lambda args, table, device: choose(args, table, "cuda"))
    flags = {
        "model_path": tmp_path / "backbone", "data_path": tmp_path / "data", "data_num_response": 4, "max_length": 40,
        "total_batch_size": 10, "micro_batch_size": 4, "num_steps": 1, "eval_every": -1, "save_dir": tmp_path, "run_name": "run",
        "device": "auto",
    }  # fmt: skip
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    seen = spied_run(command(flags), tmp_path / "cache")
    assert seen.status == 0, seen.error
    assert "packing tree (shared prefixes are " in seen.log and "% of the tokens), rows of 160 tokens" in seen.log
    arguments = json.loads((tmp_path / "run/latest/trainer.json").read_text())["arguments"]
    assert (arguments["packing"], arguments["row_tokens"]) == ("tree", 160)


def test_the_tree_path_of_the_released_flags_runs_on_two_ranks(tmp_path):
    """Its gradient is that of plain padding on one rank. Compiling is switched off in torch: what is compiled, a CPU has not."""
    rng = np.random.default_rng(0)
    save_generator(tmp_path / "backbone")
    rows = [openr1_row(rng) for _ in range(4)]
    write_rows(tmp_path / "data", rows)
    given = {
        "model_path": tmp_path / "backbone", "data_path": tmp_path / "data", "max_length": 64, "num_steps": 1, "eval_every": -1,
        "p_dropout": 0.0, "grad_norm_clip": 1e9, "save_dir": tmp_path, "device": "cpu", "compile": True,
    }  # fmt: skip
    tree = [*RELEASED, *command(given | {"packing": "tree", "run_name": "tree"})]
    env = {"TORCHDYNAMO_DISABLE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    done = run_script(tree, ranks=2, env=env)
    assert done.returncode == 0, done.stderr
    assert "64 roll-outs a step on 2 ranks, packing tree, rows of 512 tokens" in done.stderr
    plain = spied_run(
        [*RELEASED, *command(given | {"packing": "none", "run_name": "none", "compile": False})], tmp_path / "cache"
    )
    assert plain.status == 0, plain.error
    moments = [torch.load(tmp_path / f"{name}/latest/optimizer.pt", weights_only=True) for name in ("tree", "none")]
    for name, state in moments[1].items():
        gradient = state["exp_avg"]
        assert (gradient - moments[0][name]["exp_avg"]).norm() <= 1e-5 * gradient.norm() + 1e-9, name


def openr1_row(rng) -> dict:
    """56 roll-outs: 14 roll-ins of 4 nested prefixes."""
    trunks = rng.integers(1, 200, (14, 30))
    cuts = np.sort(rng.integers(10, 30, (14, 4)), axis=1)
    return {
        "problem": str(rng.integers(10**6)),
        "roll_in_ids": [trunk[:cut].tolist() for trunk, own in zip(trunks, cuts, strict=True) for cut in own],
        "roll_outs_ids": [rng.integers(1, 200, rng.integers(1, 40)).tolist() for _ in range(56)],
        "labels": rng.integers(0, 3, 56).tolist(),
    }


def test_a_row_length_without_effect_is_told(tmp_path):
    save_generator(tmp_path / "backbone")
    write_rows(tmp_path / "data", numbered_rows(0, 5))
    flags = {
        "model_path": tmp_path / "backbone", "data_path": tmp_path / "data", "data_num_response": 4, "max_length": 40,
        "total_batch_size": 4, "micro_batch_size": 4, "num_steps": 1, "eval_every": -1, "save_dir": tmp_path, "run_name": "run",
        "device": "cpu", "row_tokens": 50,
    }  # fmt: skip
    assert "--row_tokens has no effect with --packing none" in spied_run(command(flags), tmp_path / "cache").log
