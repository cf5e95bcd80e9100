"""The grid of layouts, ranks and row sizes, in short: a step computes what the plain path computes, and a wrong one shows."""

import training_grid

from training_lib import packing
from training_lib.step import TrainStep


def test_layouts_and_ranks_compute_what_the_plain_path_computes(capfd):
    """Two gloo ranks, of DDP and of FSDP; the script has more of everything."""
    assert training_grid.main(["--ranks", "2", "--row_tokens", "136", "1024", "--steps", "1"]) == 0
    lines = capfd.readouterr().out.splitlines()
    cases = [line.split("ranks")[0].split() for line in lines if "off by" in line and "passes" in line]
    assert sorted(cases) == sorted(
        [name, spread, "2"] for spread in ("DDP", "FSDP") for name in ("none", "pack", "pack", "tree", "tree")
    )
    assert lines[-1] == "all cases within 1e-05"


def test_one_rank_does_too_and_a_wrong_loss_or_mask_is_seen(capsys, monkeypatch):
    one = ["--ranks", "1", "--row_tokens", "300", "--steps", "1"]
    assert training_grid.main(one) == 0
    with monkeypatch.context() as patch:
        loss = TrainStep.loss
        patch.setattr(TrainStep, "loss", lambda *args: loss(*args) * 1.0001)
        assert training_grid.main([*one, "--packings", "none"]) == 1
    padded = packing._padded_row

    def leaky(traces, places, tokens, positions, end, multiple):
        return padded(traces, places, tokens, positions, end.clip(min=len(end) // 2), multiple)

    monkeypatch.setattr(packing, "_padded_row", leaky)
    assert training_grid.main([*one, "--packings", "pack", "tree"]) == 1
    assert capsys.readouterr().out.count("TOO MUCH") == 2 + 4
