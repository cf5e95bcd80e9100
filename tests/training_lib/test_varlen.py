"""Rows of several sequences on one flash kernel, by stand-ins: what it is given, and that loss and gradients are right."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from stub_varlen import STUB, attend, calls
from tiny import tiny_value_model
from torch.nn.attention import varlen as torch_varlen

from training_lib import varlen
from training_lib.attention import SDPA
from training_lib.packing import Trace, lay_out, packed_row, padded_batch
from training_lib.ranks import World
from training_lib.step import TrainStep
from training_lib.varlen import varlen_bounds, varlen_forward

CPU = torch.device("cpu")


def traces(*lengths: int, seed: int = 0) -> list[Trace]:
    rng = np.random.default_rng(seed)
    return [Trace(rng.integers(1, 260, n), n // 3, int(rng.integers(3)), (0, i)) for i, n in enumerate(lengths)]


def step_gradients(attention, packing: str, autocast: bool):
    """Losses and gradients of the real step on five traces."""
    model = tiny_value_model().train()
    model.set_dropout(attention=0.0, head=0.0)
    model.set_attn_implementation(attention.name)
    step = TrainStep(model, World(0, 1, CPU), attention, autocast, 5, packed=packing != "none")
    batches = lay_out([[trace] for trace in traces(37, 5, 64, 21, 50)], packing, 3, 64, attention.row_multiple)
    loss = sum(step.backward(batches))
    return loss, {name: part.grad.clone() for name, part in model.named_parameters()}


@pytest.mark.parametrize("packing", ["none", "pack"])
def test_losses_and_gradients_are_those_of_the_dense_mask(packing):
    calls.clear()
    loss, found = step_gradients(STUB, packing, False)
    wanted_loss, wanted = step_gradients(SDPA, packing, False)
    assert calls and loss == pytest.approx(wanted_loss, abs=1e-6)
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-4, msg=name)


def test_under_autocast_the_kernel_gets_one_dtype():
    """Rotated queries and keys are float32 there; the stand-in takes no mixture, as flash kernels do not."""
    loss, found = step_gradients(STUB, "pack", True)
    wanted_loss, wanted = step_gradients(SDPA, "pack", False)
    assert loss == pytest.approx(wanted_loss, rel=0.02)
    name = "model.layers.1.self_attn.q_proj.weight"
    assert torch.cosine_similarity(found[name].flatten(), wanted[name].flatten(), dim=0) > 0.98


def test_no_trace_shares_a_sequence_with_another_or_with_padding():
    padded = padded_batch(traces(5, 3, 16), 16)
    assert padded.input_ids.shape == (3, 16)
    assert varlen_bounds(padded).tolist() == [0, 5, 16, 19, 32, 48] and varlen_bounds(padded).dtype == np.int32
    packed = packed_row(traces(5, 8))
    assert packed.input_ids.shape == (1, 16) and varlen_bounds(packed).tolist() == [0, 5, 13, 14, 15, 16]
    inputs = STUB.inputs(padded, CPU)
    assert inputs["max_length_q"] == 16 and inputs["attention_mask"] == {"full_attention": None}
    assert inputs["cu_seq_lens_q"].tolist() == [0, 5, 16, 19, 32, 48] and "position_ids" not in inputs


def test_the_kernel_gets_contiguous_rows_in_the_order_of_tokens():
    query, key, value = (torch.randn(1, heads, 6, 8) for heads in (4, 2, 2))  # which it asserts
    bounds = torch.tensor([0, 6], dtype=torch.int32)
    out, _ = varlen_forward(attend, None, query, key, value, None, 0.0, 0.3, cu_seq_lens_q=bounds, max_length_q=6)
    keys, values = (part.repeat_interleave(2, dim=1) for part in (key, value))
    wanted = torch.nn.functional.scaled_dot_product_attention(query, keys, values, is_causal=True, scale=0.3)
    torch.testing.assert_close(out, wanted.transpose(1, 2))


def test_a_call_without_bounds_is_refused():
    parts = [torch.zeros(1, 2, 4, 8) for _ in range(3)]
    with pytest.raises(ValueError, match="where each sequence begins"):
        varlen_forward(attend, None, *parts, None)


# ---------------------------------------------------------------------------------------------------------------------
# What each kernel is called with


def test_torchs_kernel_is_causal_grouped_and_has_the_recipes_dropout(monkeypatch):
    """Its shapes and its backward by the meta device. Only the operator below the public function has dropout."""
    found = []
    flash, public = torch.ops.aten._flash_attention_forward, torch_varlen.varlen_attn
    monkeypatch.setattr(
        torch.ops.aten, "_flash_attention_forward", lambda *a, **k: found.append((a, k)) or flash(*a, **k)
    )
    monkeypatch.setattr(torch_varlen, "varlen_attn", lambda *a, **k: found.append((a, k)) or public(*a, **k))
    attend = varlen._load_torch()
    for dropout in (0.0, 0.05):
        query, key, value = (
            torch.empty(64, heads, 128, device="meta", dtype=torch.bfloat16, requires_grad=True) for heads in (12, 2, 2)
        )
        out = attend(query, key, value, torch.empty(3, device="meta", dtype=torch.int32), 40, dropout, 0.1)
        assert out.shape == query.shape
        out.sum().backward()
        assert key.grad.shape == value.grad.shape == (64, 2, 128)
    (plain, options), (dropping, more) = found
    assert plain[5:] == (40, 40)
    assert options == {"scale": 0.1, "window_size": (-1, 0), "enable_gqa": True}
    assert dropping[5:] == (40, 40, 0.05, True, False) and more == {"scale": 0.1}


def test_the_packages_kernel_is_causal_and_has_the_recipes_dropout(monkeypatch):
    found = []
    module = SimpleNamespace(flash_attn_varlen_func=lambda *a, **k: found.append((a, k)))
    monkeypatch.setattr(varlen.importlib, "import_module", {"flash_attn": module}.__getitem__)
    varlen._load_flash2()("q", "k", "v", "bounds", 40, 0.05, 0.1)
    assert found == [
        (("q", "k", "v", "bounds", "bounds", 40, 40, 0.05), {"softmax_scale": 0.1, "causal": True}),
    ]


def test_flash_attention_4_is_reached_by_torchs_bridge(monkeypatch):
    activated = []
    monkeypatch.setattr(varlen.torch_attention, "activate_flash_attention_impl", activated.append)
    varlen._load_flash4()
    assert activated == ["FA4"]
    assert "FA4" in torch.nn.attention.list_flash_attention_impls()
