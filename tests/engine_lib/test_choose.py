"""Which engine a name means, and what is said about it."""

import sys
from types import ModuleType

import pytest

from engine_lib.base import EngineConfig
from engine_lib.choose import ENGINES, VALUE_ENGINES, choose_engine, make_engine, make_value_engine
from engine_lib.value_base import ValueConfig

CONFIG = EngineConfig(model_path="folder", vocab_size=9)


@pytest.mark.parametrize("name", ENGINES)
def test_a_name_is_kept(name):
    assert choose_engine(name) == name


def test_auto_is_sglang_where_it_is_installed(tmp_path, monkeypatch, caplog):
    monkeypatch.delitem(sys.modules, "sglang", raising=False)
    (tmp_path / "sglang").mkdir()
    (tmp_path / "sglang/__init__.py").write_text("raise RuntimeError('it need not be imported')")
    monkeypatch.syspath_prepend(tmp_path)
    assert choose_engine("auto") == "sglang"
    assert not caplog.text


def test_auto_is_transformers_elsewhere_and_this_is_said(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "sglang", None)
    assert choose_engine("auto") == "transformers"
    assert "much slower on a GPU" in caplog.text


@pytest.mark.parametrize(
    ("name", "settings", "warned"),
    [
        ("sglang", {}, True),
        ("sglang-server", {}, True),
        ("sglang", {"deterministic": True}, False),
        ("sglang", {"seeded": True}, False),
        ("sglang-server", {"seeded": True}, False),
        ("sglang", {"samples": False}, False),
        ("transformers", {}, False),
    ],
)
def test_sglang_ignores_seeds_unless_it_is_told_to_keep_to_them(name, settings, warned, monkeypatch, caplog):
    made = []
    monkeypatch.setitem(ENGINES, name, made.append)
    config = EngineConfig(model_path="folder", vocab_size=9, **settings)
    make_engine(name, config)
    assert made == [config]
    said = "SGLang ignores seeds without --seeded: a second run will sample other tokens"
    assert (said in caplog.text) is warned


@pytest.mark.parametrize(
    ("name", "given", "said"),
    [
        ("sglang", True, ""),
        (
            "sglang-server",
            True,
            "has no effect with --engine sglang-server: start the servers with --mem-fraction-static",
        ),
        ("transformers", True, "has no effect with --engine transformers"),
        ("sglang-server", False, ""),
        ("transformers", False, ""),
    ],
)
def test_a_share_of_the_gpu_that_nobody_takes_is_said(name, given, said, monkeypatch, caplog):
    monkeypatch.setitem(ENGINES, name, lambda config: None)
    make_engine(name, EngineConfig("folder", 9, deterministic=True, gpu_share=0.5, gpu_share_given=given))
    assert (f"--piref_gpu_util 0.5 {said}" in caplog.text) if said else not caplog.text


def test_transformers_keeps_to_seeds_with_and_without_the_flag(monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setitem(ENGINES, "transformers", lambda config: None)
    for seeded in (False, True):
        make_engine("transformers", EngineConfig(model_path="folder", vocab_size=9, seeded=seeded))
    assert [record.getMessage().startswith("engine: --seeded changes nothing here") for record in caplog.records] == [
        True
    ]


@pytest.mark.parametrize("name", VALUE_ENGINES)
def test_a_value_engine_is_imported_when_it_is_chosen(name, monkeypatch):
    """By the name that says where it runs."""
    modules = {"sglang": ("local", "SGLangValueEngine"), "sglang-server": ("remote", "SGLangValueServers")}
    where, made = modules[name]
    module = ModuleType("fake")
    setattr(module, made, lambda config: (made, config))
    monkeypatch.setitem(sys.modules, f"engine_lib.sglang_value_{where}", module)
    config = ValueConfig("folder", 9, 3)
    assert make_value_engine(name, config) == (made, config)
