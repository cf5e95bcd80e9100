"""FSDP or DDP, bf16 or fp32: what is chosen, what the model then computes in, and that masters, gradients and norm stay fp32."""

import contextlib
import logging

import numpy as np
import pytest
import torch
import torch.distributed as dist
from tiny import tiny_value_model
from torch.nn.parallel import DistributedDataParallel

from training_lib.arguments import go_on_with, parse_args
from training_lib.attention import SDPA
from training_lib.packing import Trace, padded_batch
from training_lib.precision import Precision, settle_precision
from training_lib.ranks import World, clear_gradients, clip_gradients, distribute, join_ranks
from training_lib.step import TrainStep, make_optimizer

CPU = torch.device("cpu")
CASES = {  # flags, device -> FSDP, bf16 products, autocast, bf16 from layer to layer
    ("", "cuda"): (True, True, False, True),
    ("", "cpu"): (False, False, False, False),
    ("--fsdp", "cpu"): (True, False, False, False),
    ("--fsdp on --autocast", "cpu"): (True, True, False, True),
    ("--fsdp on --no-autocast", "cuda"): (True, False, False, False),
    ("--no-fsdp", "cuda"): (False, True, True, False),
    ("--fsdp off --no-autocast", "cuda"): (False, False, False, False),
    ("--fsdp auto --autocast", "cpu"): (False, True, True, False),
    ("--no-fsdp --param_dtype bf16", "cuda"): (False, True, True, True),
    ("--no-fsdp --param_dtype bf16", "cpu"): (False, False, False, True),
}


@pytest.mark.parametrize(("flags", "device"), CASES)
def test_precision_by_flags_and_device(flags, device):
    args = parse_args(flags.split())
    found = settle_precision(args, device)
    assert (found.fsdp, found.half, found.autocast, found.half_residual) == CASES[flags, device]
    assert found.half_attention == (found.half or "bf16" in flags)
    assert args.fsdp == ("on" if found.fsdp else "off")  # as the checkpoint says it


@pytest.mark.parametrize(
    ("before", "kept"), [(False, "off"), (True, "on"), ("on", "on"), ("off", "off"), (None, "off")]
)
def test_a_run_that_goes_on_keeps_what_it_had(before, kept):
    """Also of checkpoints from when --fsdp was a switch, or before it."""
    trained = {"micro_batch_size": 4, "max_length": 8, "packing": "none", "gradient_checkpointing": True}
    trained |= {} if before is None else {"fsdp": before}
    args = parse_args([])
    old = go_on_with(args, trained)
    assert args.fsdp == old["fsdp"] == kept
    assert settle_precision(args, "cuda").fsdp == (kept == "on")
    given = parse_args(["--fsdp", "off"])
    go_on_with(given, trained)
    assert given.fsdp == "off"


@pytest.mark.parametrize(
    ("flags", "device", "said"),
    [("--autocast", "cuda", "--autocast has no effect with FSDP"), ("--autocast --fsdp", "cpu", "--autocast is FSDP's own"),
     ("--autocast", "cpu", ""), ("--autocast --no-fsdp", "cuda", ""), ("", "cuda", "")],
)  # fmt: skip
def test_autocast_beside_fsdp_is_told(caplog, flags, device, said):
    caplog.set_level(logging.INFO)
    settle_precision(parse_args(flags.split()), device)
    assert said in caplog.text and bool(caplog.messages) == bool(said)


# ---------------------------------------------------------------------------------------------------------------------
# What is computed


@contextlib.contextmanager
def one_rank():
    """A process group of one rank, which DDP needs."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def some_batches(count: int = 3):
    rng = np.random.default_rng(0)
    traces = [Trace(rng.integers(1, 200, 12), 4, label % 3, (label, 0)) for label in range(2 * count)]
    return [padded_batch(traces[i : i + 2], 16) for i in range(0, len(traces), 2)]


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def test_fsdp_computes_in_bf16_and_keeps_fp32_masters_gradients_and_norm():
    """Three passes of a step; against the same step in fp32."""
    batches, seen = some_batches(), {}
    model = tiny_value_model().train()
    TrainStep(model, World(0, 1, CPU), SDPA, False, 6).backward(batches)
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    model.model.layers[0].register_forward_hook(
        lambda module, args, out: seen.update(residual=out.dtype)
    )  # returns None
    with join_ranks("cpu") as world:
        step = TrainStep(distribute(model, world, Precision(True, True)), world, SDPA, False, 6, sharded=True)
        optimizer = make_optimizer(step.model, 1e-3, (0.9, 0.95), 0.1)
        step.backward(batches)
        gradients = {name: whole(parameter.grad).clone() for name, parameter in model.named_parameters()}
        assert seen["residual"] == torch.bfloat16
        assert {gradient.dtype for gradient in gradients.values()} == {torch.float32}
        norm = torch.stack([gradient.double().norm() for gradient in gradients.values()]).norm()
        assert clip_gradients(step.model, 1e-2) == pytest.approx(float(norm), rel=1e-6)
        clipped = torch.stack([whole(p.grad).double().norm() for p in model.parameters()]).norm()
        assert float(clipped) == pytest.approx(1e-2, rel=1e-4)
        optimizer.step()
        states = [value for state in optimizer.state.values() for value in state.values()]
        assert {whole(tensor).dtype for tensor in [*model.parameters(), *states]} == {torch.float32}
        # A step smaller than bf16 can hold is not lost.
        before = {name: whole(parameter).detach().clone() for name, parameter in model.named_parameters()}
        assert any(not torch.equal(value, value.bfloat16().float()) for value in before.values())
        with torch.no_grad():
            assert step.logits(batches[0]).dtype == torch.bfloat16
    off = sum(float((gradients[name] - expected[name]).square().sum()) for name in expected)
    size = sum(float(value.square().sum()) for value in expected.values())
    assert 1e-4 < (off / size) ** 0.5 < 0.15, "rounding of bf16 in a model of large weights, no more and no less"
    assert not dist.is_initialized()


def test_fsdp_holds_a_shard_of_the_gradients_between_passes_and_ddp_its_buckets_alone():
    """What a pass leaves: of FSDP a DTensor's own numbers and no whole gradient; of DDP gradients that are its buckets, in
    every pass after the first step."""
    batches = some_batches()
    with join_ranks("cpu") as world:
        model = tiny_value_model().train()
        step = TrainStep(distribute(model, world, Precision(True, False)), world, SDPA, False, 6, sharded=True)
        before_pass = []
        step.model.register_forward_pre_hook(
            lambda *_: before_pass.append([hasattr(p.grad, "device_mesh") for p in model.model.layers.parameters()])
        )
        step.backward(batches)
        assert len(before_pass) == 3 and not any(before_pass[0]) and all(map(all, before_pass[1:]))
    with one_rank():
        model = tiny_value_model().train()
        replica = DistributedDataParallel(
            model, broadcast_buffers=False, gradient_as_bucket_view=True, bucket_cap_mb=0.02
        )
        optimizer = make_optimizer(replica, 1e-3, (0.9, 0.95), 0.1)
        step = TrainStep(replica, World(0, 1, CPU), SDPA, False, 6)
        for _ in range(3):
            step.backward(batches)
            optimizer.step()
            clear_gradients(replica, optimizer)
            storages = {p.grad.untyped_storage()._cdata: p.grad.untyped_storage().nbytes() for p in model.parameters()}
            assert sum(storages.values()) == sum(p.nbytes for p in model.parameters())
            assert len(storages) < 8 and not any(p.grad.any() for p in model.parameters())
    clear_gradients(model, torch.optim.SGD(model.parameters()))
    assert all(p.grad is None for p in model.parameters())


def test_ddp_is_made_with_gradients_in_its_buckets():
    with one_rank():
        replica = distribute(tiny_value_model(), World(0, 2, CPU), Precision(False, True))
    assert isinstance(replica, DistributedDataParallel) and replica.gradient_as_bucket_view


def test_fsdp_sums_gradients_in_fp32():
    """Over ranks: on one nothing is summed, so that only what FSDP was told can be seen."""
    with join_ranks("cpu") as world:
        model = distribute(tiny_value_model(), world, Precision(True, True))
        policies = [module._get_fsdp_state()._mp_policy for module in (model, *model.model.layers)]
    assert {(policy.param_dtype, policy.reduce_dtype) for policy in policies} == {(torch.bfloat16, torch.float32)}


def test_fsdp_stays_on_a_cpu_that_was_asked_for(monkeypatch):
    """Where there is a GPU, too: by itself it takes that."""
    monkeypatch.setattr(torch._C, "_get_accelerator", lambda: torch.device("cuda"))
    with join_ranks("cpu") as world:
        model = distribute(tiny_value_model(), world, Precision(True, False))
        assert {str(part.device_mesh.device_type) for part in model.parameters()} == {"cpu"}
