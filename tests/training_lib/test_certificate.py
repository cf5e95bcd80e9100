"""The certificate: what it refuses, what it lets pass, and that a run is the same with it and without."""

import json
from dataclasses import replace
from types import SimpleNamespace

import certificate_study as study
import numpy as np
import pytest
import torch
from rollouts import losses
from stub_varlen import STUB
from torch.utils._python_dispatch import TorchDispatchMode
from train_spy import small_run, write_small_inputs

from training_lib import certificate, varlen
from training_lib.attention import SDPA
from training_lib.attention_check import visible
from training_lib.certificate import NUM_IDS, TRACES, CertificateBench, certify, check_integers
from training_lib.precision import Precision
from training_lib.ranks import World

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_small_inputs(tmp_path_factory.mktemp("inputs"))


def run(inputs, tmp_path, **changes):
    return small_run(inputs, tmp_path, **{"num_steps": 2, "p_dropout": 0.3} | changes)


def bench_of_trees() -> CertificateBench:
    return CertificateBench(study.CONFIG, SDPA, "tree", Precision(False, False), CPU)


# ---------------------------------------------------------------------------------------------------------------------
# Faults


def test_the_study_in_short():
    """All draws with a fault are refused by the check that looks for it, and those without one pass."""
    assert study.study(40, 0, ["integers"]) == {"integers": {"masks": 40}}
    assert study.study(4, 0, ["leak"]) == {"leak": {"leak": 4}}
    assert study.study(2, 0, ["block"]) == {"block": {"distance": 2}}
    assert study.study(1, 0, ["clean"]) == {"clean": {"": 1}}


def test_a_varlen_kernel_passes_under_autocast(monkeypatch):
    traces = certificate.family_traces([(20, [(5, [9, 6]), (0, [12])])])
    monkeypatch.setattr(certificate, "TRACES", traces)
    monkeypatch.setattr(certificate, "NUM_IDS", 53)
    found = certify(CertificateBench(study.CONFIG, STUB, "none", Precision(False, True), CPU))
    assert 0 < found["distance"]["plain"] < 0.05 and 0 < found["distance"]["ratio"] < 1


def test_a_kernel_that_sees_too_little_is_refused():
    bench = bench_of_trees()

    def kernel(module, queries, keys, values, attention_mask, **options):
        mask = attention_mask.clone()
        mask[..., 300, 130] = False
        return study.sdpa_attention_forward(module, queries, keys, values, mask, **options)

    assert visible(bench.batches("tree", SDPA)[0])[0, 300, 130]
    assert study.ask(study._with_kernel(bench, kernel)) == "leak"


def test_a_roll_out_that_reads_anothers_embeddings_is_refused(monkeypatch):
    """Past the kernel, which is right: by the model's gradient alone."""
    bench = bench_of_trees()
    model = bench.in_run_dtype(SDPA)
    model.model.norm.register_forward_hook(lambda module, given, out: out + 0.1 * out.roll(1, dims=1))
    with pytest.raises(
        certificate.UserError, match=r"leak: the loss of roll-out \d has a gradient at \d+ tokens of other"
    ):
        certify(bench, model)


def test_padding_is_a_sequence_of_its_own(monkeypatch):
    def rows_alone(batch):
        rows, width = batch.input_ids.shape
        return np.arange(0, rows * width + 1, width, dtype=np.int32)

    monkeypatch.setattr(varlen, "varlen_bounds", rows_alone)
    bench = CertificateBench(study.CONFIG, STUB, "none", Precision(False, False), CPU)
    with pytest.raises(certificate.UserError, match="holds padding"):
        check_integers(bench)


def test_every_node_of_the_traces_has_an_id_of_its_own():
    """So that a gradient of the embeddings is one of places; and there is one block that is seen whole."""
    ends = {}
    for trace in TRACES:
        for place, token in enumerate(trace.tokens.tolist()):
            assert ends.setdefault(token, tuple(trace.tokens[:place])) == tuple(trace.tokens[:place])
    assert set(ends) == set(range(1, NUM_IDS))
    bench = CertificateBench(study.CONFIG, study.FLEX, "tree", Precision(False, False), CPU)
    [batch] = bench.batches("tree", study.FLEX)
    assert batch.blocks[2].sum() > 0 and batch.blocks[0].sum() > len(batch.blocks[0])


# ---------------------------------------------------------------------------------------------------------------------
# In a run


def test_a_run_is_the_same_with_it_and_without(inputs, tmp_path):
    """Dropout's noise too. What it found is told in a line and written."""
    plain = run(inputs, tmp_path / "plain")
    certified = run(inputs, tmp_path / "certified", certify=True)
    assert (
        losses(tmp_path / "certified/run") == losses(tmp_path / "plain/run") and certified.status == plain.status == 0
    )
    found = json.loads((tmp_path / "certified/run/certificate.json").read_text())
    assert found["passed"] and found["what"] == "attention sdpa, packing none, DDP, fp32"
    assert certified.log.count("certificate: attention sdpa") == 1 and "certificate" not in plain.log
    assert not (tmp_path / "plain/run/certificate.json").exists()


def test_what_it_draws_moves_no_noise():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    with certificate._apart(CPU):
        torch.rand(3)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_run_that_fails_it_does_not_begin(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(certificate, "wrong_integers", lambda *_: "token 3 and token 9")
    seen = run(inputs, tmp_path, certify=True)
    assert seen.error.startswith(
        "certificate: attention sdpa, packing none, DDP, fp32: masks: token 3 and token 9; training"
    )
    assert "--no-certify" in seen.error and "\n" not in seen.error
    written = json.loads((tmp_path / "run/certificate.json").read_text())
    assert written == {
        "passed": False, "what": "attention sdpa, packing none, DDP, fp32", "why": "masks: token 3 and token 9",
    } and not seen.steps  # fmt: skip


def test_a_fault_on_another_rank_is_written_and_ends_this_one(monkeypatch):
    written = []
    monkeypatch.setattr(certificate, "_certify_as_trained", lambda *_: {"distance": {}})
    monkeypatch.setattr(certificate, "write_json", lambda path, value: written.append(value))
    world = SimpleNamespace(
        rank=0, device=CPU, gather=lambda mine: [mine, "leak: there"], together=World(0, 1, CPU).together
    )
    args = SimpleNamespace(certify=True, packing="none", compile=False, eval_only=False)
    plan = SimpleNamespace(attention=SDPA, precision=Precision(False, False), run_dir="run")
    with pytest.raises(certificate.UserError, match="leak: there"):
        certificate.certify_run(args, plan, world)
    assert [found["passed"] for found in written] == [False]


def test_what_is_compared_with_runs_on_no_flash_kernel(monkeypatch):
    """Else flash-attn-4, which takes SDPA's calls over, would be held against itself."""
    traces = certificate.family_traces([(20, [(5, [9, 6]), (0, [12])])])
    monkeypatch.setattr(certificate, "TRACES", traces)
    monkeypatch.setattr(certificate, "NUM_IDS", 53)
    bench = CertificateBench(study.CONFIG, SDPA, "none", Precision(False, True), CPU)
    names, path = [], CertificateBench.path

    class Operators(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            names[-1].add(operator.name())
            return operator(*args, **(kwargs or {}))

    def watched(*args, **options):
        names.append(set())
        with Operators():
            return path(*args, **options)

    monkeypatch.setattr(CertificateBench, "path", watched)
    certificate.check_distance(bench, bench.in_run_dtype(SDPA))
    flash = [any("flash" in name for name in seen) for seen in names]
    assert flash == [False, False, True]  # float32, plain, the run's own


def test_the_model_has_the_runs_shapes_kernel_and_numbers():
    config = study.CONFIG
    for precision, dtype in ((Precision(True, True), torch.bfloat16), (Precision(False, True), torch.float32)):
        bench = CertificateBench(config, replace(SDPA), "tree", precision, CPU)
        model = bench.in_run_dtype(STUB)
        assert (
            model.config._attn_implementation == "varlen_stub" and bench.reference.config._attn_implementation == "sdpa"
        )
        assert next(model.parameters()).dtype == dtype and next(bench.reference.parameters()).dtype == torch.float32
        attention = model.model.layers[0].self_attn
        assert attention.head_dim == 32 and attention.k_proj.weight.shape == (64, 128) and len(model.model.layers) == 2
