"""Ranks together: who reads what when a run goes on, and how long one waits for the others."""

import contextlib
import datetime
import re
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT
from rollouts import losses, random_rows, run_script, write_rows
from tiny import save_generator
from torch.distributed.run import get_args_parser
from train_spy import command, spied_run

from common_lib.cli import UserError
from training_lib import arguments, loop, ranks
from training_lib.launch import RankError
from training_lib.ranks import PATIENT, STEPPING, World, check_host_address

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    save_generator(folder / "backbone")
    write_rows(folder / "data", random_rows(40))
    return folder


def flags(inputs, tmp_path, **changes):
    settings = {
        "model_path": inputs / "backbone", "data_path": inputs / "data", "data_num_response": 4, "max_length": 40,
        "total_batch_size": 8, "micro_batch_size": 4, "num_steps": 6, "save_every": 3, "eval_every": -1, "max_lr": 1e-3,
        "save_dir": tmp_path / "runs", "run_name": "run", "device": "cpu", "p_dropout": 0.1,
    }  # fmt: skip
    return command(settings | changes)


def run_ranks(inputs, tmp_path, env=None, **changes):
    environment = {"HF_DATASETS_CACHE": str(inputs / "cache")} | (env or {})
    return run_script(flags(inputs, tmp_path, **changes), 2, env=environment, script="tests/faulty_rank.py")


@pytest.mark.parametrize("fsdp", [False, True])
def test_rank_0_alone_reads_the_optimizer_and_the_losses_are_those_of_one_run(inputs, tmp_path, fsdp):
    assert (done := run_ranks(inputs, tmp_path, fsdp=fsdp)).returncode == 0, done.stderr
    whole = losses(tmp_path / "runs/run")
    shutil.rmtree(tmp_path / "runs/run/step-00000006")
    done = run_ranks(inputs, tmp_path, {"UNREADABLE": "1"}, fsdp=fsdp)
    assert done.returncode == 0, done.stderr
    assert "going on from" in done.stderr
    assert losses(tmp_path / "runs/run") == whole


def test_a_rank_that_hangs_ends_all_with_a_line_and_a_slow_save_does_not(inputs, tmp_path):
    """Rank 0, and in another run at the same time rank 1: both mostly wait."""

    def run(rank):
        seconds = {"STEP_SECONDS": "5", "SAVE_SECONDS": "8"}
        return run_ranks(inputs, tmp_path / rank, {"HANGS_RANK": rank, "HANGS_STEP": "4"} | seconds, save_every=4)

    began = time.monotonic()
    with ThreadPoolExecutor() as pool:
        runs = dict(zip("01", pool.map(run, "01"), strict=True))
    assert time.monotonic() - began < 110
    for rank, done in runs.items():
        told = f"error: rank {1 - int(rank)} lost the others: one of them hangs or has ended ("
        assert done.returncode and sum(line.startswith(told) for line in done.stderr.splitlines()) == 1, done.stderr
        assert "the same command goes on from the last checkpoint" in done.stderr and "[rank" not in done.stderr
        run_dir = tmp_path / rank / "runs/run"
        assert len(losses(run_dir)) == 4
        assert [path.name for path in run_dir.glob("step-*")] == ["step-00000004"]


def test_limits_reach_every_backend_of_every_group(monkeypatch):
    """A group of gloo and nccl, and another of nccl, such as a device mesh makes."""
    set_to = {}

    def group(name, backends):
        def of(device):
            return SimpleNamespace(_set_default_timeout=lambda limit: set_to.update({(name, backends[device]): limit}))

        return SimpleNamespace(_device_types=list(backends), _get_backend=of)

    groups = [group("all", {"cpu": "gloo", "cuda": "nccl"}), group("mesh", {"cuda": "nccl"})]
    monkeypatch.setattr(dist.distributed_c10d, "_world", SimpleNamespace(pg_map=groups))
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    places = {("all", "gloo"), ("all", "nccl"), ("mesh", "nccl")}
    world = World(0, 2, CPU)
    world.wait_at_most(STEPPING)
    assert set_to == dict.fromkeys(places, datetime.timedelta(minutes=10))
    with world.patient():
        assert set_to == dict.fromkeys(places, datetime.timedelta(hours=1))
    assert set_to == dict.fromkeys(places, datetime.timedelta(minutes=10))


def test_an_hour_for_the_first_step_evaluations_and_saves_and_ten_minutes_for_steps(inputs, tmp_path, monkeypatch):
    """As the process group has it: of one rank, with --fsdp."""
    seen = []

    def noting(name, do):
        def noted(*args, **kwargs):
            backend = dist.distributed_c10d._get_default_group()._get_backend(CPU)
            seen.append((name, backend.options._timeout))
            return do(*args, **kwargs)

        return noted

    for name in ("train_step", "evaluate", "save"):
        monkeypatch.setattr(loop.TrainingRun, name, noting(name, getattr(loop.TrainingRun, name)))
    # At the end rank 0 may still push, and the others wait for it to leave together.
    monkeypatch.setattr(loop.LineFile, "close", noting("close", loop.LineFile.close))
    argv = flags(inputs, tmp_path, fsdp=True, num_steps=4, save_every=2, eval_every=2, eval_size=4)
    assert spied_run(argv, inputs / "cache").status == 0
    later = [("train_step", STEPPING)] * 2 + [("evaluate", PATIENT), ("save", PATIENT)]
    assert seen == [("train_step", PATIENT), *later[1:], *later, ("close", PATIENT)]


@pytest.mark.parametrize(
    ("message", "lost"),
    [
        ("[gloo/transport/tcp/unbound_buffer.cc:129] Timed out waiting 600000ms for send operation to complete", True),
        ("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:1454", True),
        ("Application timeout caused pair closure", True),
        ("mat1 and mat2 shapes cannot be multiplied", False),
    ],
)
def test_only_a_lost_rank_is_told_as_one(message, lost):
    with pytest.raises(RuntimeError if not lost else UserError) as told, ranks.join_ranks("cpu"):
        raise RuntimeError(f"{message}. This is typically\nand more")
    if lost:
        assert str(told.value).startswith(f"rank 0 lost the others: one of them hangs or has ended ({message}); ")
        assert "\n" not in str(told.value)


def test_an_error_of_nccl_is_a_lost_rank():
    error = dist.DistBackendError("NCCL error in ProcessGroupNCCL.cpp:3690")
    with (
        pytest.raises(UserError, match=r"rank 0 lost the others: .* \(NCCL error in"),
        ranks.join_ranks("cpu"),
    ):
        raise error


@pytest.mark.parametrize(
    ("environment", "address", "refused"),
    [
        ({"GROUP_WORLD_SIZE": "16", "MASTER_ADDR": "node0"}, "127.0.1.1", True),
        ({"GROUP_WORLD_SIZE": "16", "MASTER_ADDR": "node0", "GLOO_SOCKET_IFNAME": "eth0"}, "127.0.1.1", False),
        ({"GROUP_WORLD_SIZE": "16", "MASTER_ADDR": "node0"}, "10.0.0.7", False),
        ({"GROUP_WORLD_SIZE": "1", "MASTER_ADDR": "node0"}, "127.0.1.1", False),
        (
            {"GROUP_WORLD_SIZE": "16", "MASTER_ADDR": "node7"},
            "127.0.1.1",
            None,
        ),  # the first node, or a trial on one machine
    ],
)
def test_a_node_that_others_cannot_reach_is_told(monkeypatch, caplog, environment, address, refused):
    def getaddrinfo(name, *_, **__):
        found = {"node7": address, "node0": "10.0.0.1"}.get(name, name)
        return [(2, 1, 6, "", (found, 0))]

    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(ranks.socket, "gethostname", lambda: "node7")
    monkeypatch.setattr(ranks.socket, "getaddrinfo", getaddrinfo)
    told = r"node's name node7 leads to itself .* set GLOO_SOCKET_IFNAME \(and NCCL_SOCKET_IFNAME\)"
    with pytest.raises(RankError, match=told) if refused else contextlib.nullcontext():
        check_host_address()
    assert [bool(re.search(told, message)) for message in caplog.messages] == ([True] if refused is None else [])


# Five epochs of OpenR1-VM (44,509 rows of 56 roll-outs) at the paper's 1,024 roll-outs a step, 8 a forward pass.
README = (ROOT / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")
(SIXTEEN_NODES,) = re.findall(r"^GLOO_SOCKET_IFNAME=NET NCCL_SOCKET_IFNAME=NET torchrun (.*)$", README, re.MULTILINE)


def test_the_command_of_16_nodes_of_8_gpus_fits_together(monkeypatch):
    launch = get_args_parser().parse_args(SIXTEEN_NODES.split())
    assert (launch.nnodes, launch.nproc_per_node, launch.training_script) == ("16", "8", "train_classifier.py")
    monkeypatch.setenv("WORLD_SIZE", str(int(launch.nnodes) * int(launch.nproc_per_node)))
    args = arguments.parse_args(launch.training_script_args)
    assert args.total_batch_size == args.world_size * args.micro_batch_size  # no gradient accumulation
    assert args.num_steps == 5 * (44_509 * 56 // args.total_batch_size)
    with pytest.raises(UserError, match="the nearest that work: 1024, 2048"):
        arguments.parse_args([*launch.training_script_args, "--total_batch_size", "1500", "--packing", "none"])
