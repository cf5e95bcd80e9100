"""With flash-attn packages as they are laid out by pip: who uses which kernel. Never an ImportError, never one of the hub.

Each case is a process of its own: the transformers library looks at what is installed once, when it is imported.
"""

from flash_packages import believing, install

from training_lib.attention import ATTENTIONS

REASON = {name: attention.reason for name, attention in ATTENTIONS.items()}

# As with a network and the hub's `kernels` package, whose kernels the library takes where a package is missing.
USERS = """
import argparse, pathlib, tempfile
import transformers.modeling_utils as library
import tiny
import inference_eval
from classifier_lib import Qwen2ForClassifier, ValueScorer
from common_lib.models import load_tokenizer
from search_lib.arguments import parse_args
from training_lib.attention import choose_attention

library.is_kernels_available = lambda: True
fetch = library.lazy_import_flash_attention
library.lazy_import_flash_attention = lambda name, **_: found.setdefault("fetched", []).append(name) or fetch(name)

with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    tiny.save_value_model(folder / "value")
    tiny.save_generator(folder / "generator")
    (folder / "p.jsonl").write_text('{"problem": "1 + 1", "answer": "2"}')
    for name in ("flash_attention_2", "auto", None, "flash_attention_3", "flash_attention_4", "sdpa", "eager"):
        model = Qwen2ForClassifier.from_pretrained(
            folder / "value", attn_implementation=name, torch_dtype=torch.bfloat16, use_cache=False
        )
        found[str(name)] = model.config._attn_implementation
    for name, dropout in (("training", True), ("training without dropout", False)):
        found[name] = {packing: choose_attention(packing, "cuda", True, dropout).name for packing in ("none", "pack", "tree")}
    flags = ["--benchmark", folder / "p.jsonl", "--piref_model", folder / "generator", "--classifier_ckpt_path", folder / "value",
             "--max_length", "64", "--block_size", "16"]
    for more in ([], ["--attention_impl", "flash_attention_4"], ["--value_device", "cpu"]):
        plan = inference_eval.make_plan(parse_args([*map(str, flags), *more]), load_tokenizer)
        found.setdefault("plans", []).extend(plan.value_attention.values())
"""
READ_ON = """
import importlib
for name, kernels in (("flash_attention_2", "flash_attn"), ("flash_attention_4", "flash_attn.cute")):
    kernels = importlib.import_module(kernels)
    model = tiny.tiny_value_model().to(torch.bfloat16)
    model.set_attn_implementation(name)
    scorer = ValueScorer(model)
    with torch.inference_mode():
        scorer.start("tree", [1, 2, 3, 4, 5])
        scorer.score("tree", [(0, [6, 7, 8]), (0, [9, 10, 11])])
        value = scorer.score("tree", [(1, [12, 13]), (1, [14, 15])])[0]
        kept, calls = model.config._attn_implementation, sorted(set(kernels.calls))
        full = model(torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8, 12, 13]])).success_probs[0, -1].item()
    found[name] = kept, calls, abs(value - full)
"""


def test_flash_attn_4_is_not_taken_for_flash_attn_2(tmp_path):
    """As on every node with SGLang: by name `flash_attn` is found, a namespace package."""
    found = believing(install(tmp_path, "flash_attn_4-4.0.0b18"), USERS)
    asked_for = ("flash_attention_2", "auto", "None", "flash_attention_3", "flash_attention_4", "sdpa", "eager")
    assert [found[name] for name in asked_for] == ["sdpa"] * 4 + ["flash_attention_4", "sdpa", "eager"]
    assert set(found["fetched"]) == {"flash_attention_4"}
    assert found["training"] == {"none": "sdpa", "pack": "packed_flex", "tree": "packed_flex"}
    four = "varlen_flash_attention_4"
    assert found["training without dropout"] == {"none": four, "pack": four, "tree": "packed_flex"}
    assert found["plans"] == ["sdpa", "flash_attention_4", "sdpa"]

    torch = "this torch was built without it"
    another = "the flash-attn package is not installed (flash-attn-4 4.0.0b18, which SGLang brings, is another one: "
    told = [
        f"WARNING attention: flash_attention_2 was asked for, but {another}",
        f"WARNING attention: sdpa, since for flash_attention_2 {another}",
        "WARNING attention: flash_attention_3 was asked for, but the flash-attn-3 package is not installed; using sdpa",
        f"WARNING attention: sdpa ({REASON['sdpa']}); varlen_torch: {torch}; varlen_flash_attention_2: {another}",
        f"WARNING attention: packed_flex ({REASON['packed_flex']}); varlen_torch: {torch}; varlen_flash_attention_2: {another}",
        *(f"INFO attention: {name} ({REASON[name]})" for name in ("packed_flex", four, four, "packed_flex")),
        f"WARNING value model: attention: flash_attention_2 was asked for, but {another}",
        "INFO value model: attention: flash_attention_4",
        "INFO value model: attention: sdpa (on a CPU)",
    ]
    assert len(found["said"]) == len(told)
    for line, expected in zip(found["said"], told, strict=True):
        assert line.startswith(expected)


def test_flash_attn_2_is_used_where_it_is(tmp_path):
    found = believing(install(tmp_path, "flash_attn-2.8.3"), USERS)
    assert {name for name, used in found.items() if str(used).startswith("flash")} == {
        "flash_attention_2",
        "auto",
        "None",
    }
    assert set(found["fetched"]) == {"flash_attention_2"}
    assert found["training"] == {
        "none": "varlen_flash_attention_2", "pack": "varlen_flash_attention_2", "tree": "packed_flex",
    }  # fmt: skip
    assert found["plans"] == ["flash_attention_2", "sdpa", "sdpa"]
    assert "INFO attention: flash_attention_2 (the fastest that can run here)" in found["said"]
    assert "INFO value model: attention: flash_attention_2" in found["said"]


def test_the_kernels_beside_each_other_read_on_behind_a_prefix(tmp_path):
    """A scorer keeps the kernel it is given, and its values are those of a full pass, though new tokens follow a cache."""
    packages = install(tmp_path, "flash_attn-2.8.3", "flash_attn_3-3.0.0b1", "flash_attn_4-4.0.0b18")
    found = believing(packages, "from classifier_lib import ValueScorer\nimport tiny\n" + READ_ON)
    for name in ("flash_attention_2", "flash_attention_4"):
        kept, calls, difference = found[name]
        assert kept == name and [2, 10, True] in calls
        assert difference < 0.01
