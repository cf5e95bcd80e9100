"""Which kernel a model gets, and what is said of it. With packages of kernels: tests/test_flash_attention.py."""

import pytest
import tiny
import torch

from classifier_lib import Qwen2ForClassifier, ValueScorer
from classifier_lib import attention as attention_module
from classifier_lib.attention import FLASH_KERNELS, flash_missing, resolve_attn_implementation


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (9, 0)])
def test_an_old_gpu_has_none(monkeypatch, capability):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(attention_module.importlib, "import_module", lambda name: None)
    for kernel in FLASH_KERNELS.values():
        monkeypatch.setattr(attention_module.import_utils, kernel.look_up, lambda: True)
    needs = "it needs a GPU of compute capability {}.0 or above, and this one has {}.{}"
    for name, least in (("flash_attention_2", 8), ("flash_attention_3", 8), ("flash_attention_4", 9)):
        expected = needs.format(least, *capability) if capability[0] < least else None
        assert flash_missing(name, torch.bfloat16) == expected


def test_a_package_that_does_not_load_is_told(monkeypatch):
    def import_module(name):
        raise ImportError("undefined symbol: _ZN3c104cuda9SetDeviceEa\nand more")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(attention_module.import_utils, "is_flash_attn_2_available", lambda: True)
    monkeypatch.setattr(attention_module.importlib, "import_module", import_module)
    assert flash_missing("flash_attention_2", torch.bfloat16) == (
        "the flash-attn package is installed but cannot be loaded (ImportError: undefined symbol: "
        "_ZN3c104cuda9SetDeviceEa); install it again"
    )


def test_the_choice_is_said_once_by_name_and_with_its_reason(caplog):
    attention_module._warn_once.cache_clear()
    with caplog.at_level("INFO"):
        assert resolve_attn_implementation("flash_attention_2", torch.bfloat16, "cpu", "value model") == "sdpa"
        assert resolve_attn_implementation("flash_attention_4", torch.float32) == "sdpa"
        assert resolve_attn_implementation("auto", torch.bfloat16, "cpu", "generator") == "sdpa"
        assert resolve_attn_implementation("eager", torch.bfloat16, model="generator") == "eager"
        assert resolve_attn_implementation("sdpa") == "sdpa"
    assert [record.getMessage() for record in caplog.records] == [
        "value model: attention: flash_attention_2 was asked for, but it has no kernel for a CPU; using sdpa "
        "(slower; values equal to rounding)",
        "attention: flash_attention_4 was asked for, but it has no float32 kernel; using sdpa (slower; values equal to rounding)",
        "generator: attention: sdpa (the fastest that can run here; flash_attention_2: it has no kernel for a CPU)",
        "generator: attention: eager",
    ]


def test_a_look_up_that_the_library_lacks_means_no(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delattr(attention_module.import_utils, "is_flash_attn_4_available")
    assert flash_missing("flash_attention_4", None) == "the installed transformers library does not know it"


@pytest.mark.parametrize(("name", "told"), [("sdpa", False), ("eager", True)])
def test_a_scorer_replaces_sdpa_and_says_where_it_replaces_more(name, told, caplog):
    attention_module._warn_once.cache_clear()
    model = tiny.tiny_value_model()
    model.set_attn_implementation(name)
    ValueScorer(model)
    assert model.config._attn_implementation == "sdpa_lower_right"
    assert ("computed with sdpa, not with the model's eager" in caplog.text) == told


def test_a_dtype_of_auto_is_the_checkpoints(tmp_path, monkeypatch):
    tiny.save_value_model(tmp_path)
    seen = []
    monkeypatch.setattr(
        "classifier_lib.modeling.resolve_attn_implementation", lambda name, dtype: seen.append(dtype) or "sdpa"
    )
    for dtype in ("auto", None, "bfloat16", torch.float16):
        Qwen2ForClassifier.from_pretrained(tmp_path, dtype=dtype)
    assert seen == [torch.float32, torch.float32, torch.bfloat16, torch.float16]
