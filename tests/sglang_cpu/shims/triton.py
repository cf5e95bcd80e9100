"""Stands in for triton (691 MB, no kernel of which runs on a CPU) with the stub that sglang ships for Apple machines.

Kernels can be defined, not called. Loading the stub's file by itself does not import sglang.
"""

import importlib.util
import sys
from pathlib import Path

MODULES = (
    "triton", "triton.language", "triton.language.extra", "triton.language.extra.libdevice", "triton.runtime",
    "triton.runtime.jit", "triton.runtime.cache", "triton.runtime.autotuner", "triton.runtime.driver",
    "triton.compiler", "triton.compiler.compiler", "triton.testing", "triton.tools", "triton.tools.tensor_descriptor",
    "triton.backends", "triton.backends.compiler",
)  # fmt: skip


def _load_stubs():
    folder = importlib.util.find_spec("sglang").submodule_search_locations[0]
    spec = importlib.util.spec_from_file_location("_sglang_platform_stubs", Path(folder) / "_platform_stubs.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _install() -> None:
    stubs = _load_stubs()
    modules = {name: stubs._make_mock(name) for name in MODULES}  # the first replaces this very module
    for name, module in modules.items():
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(modules[parent], child, module)
    triton = modules["triton"]
    triton.__version__, triton.Config = "3.0.0", stubs._Config
    triton.cdiv, triton.next_power_of_2 = stubs._cdiv, stubs._next_power_of_2
    # Real classes where something derives from one, catches one or asks isinstance.
    classes = {
        "triton.language": ("constexpr",),
        "triton.runtime": ("KernelInterface",),
        "triton.runtime.jit": ("JITFunction", "KernelInterface"),
        "triton.compiler": ("CompiledKernel",),
        "triton.compiler.compiler": ("ASTSource",),
        "triton.backends.compiler": ("GPUTarget",),
    }
    for name, members in classes.items():
        for member in members:
            setattr(modules[name], member, type(member, (stubs._StubBase,), {"__init__": lambda self, *args: None}))
    for member in ("OutOfResources", "PTXASError"):
        setattr(modules["triton.runtime.autotuner"], member, type(member, (Exception,), {}))
    modules["triton.runtime.cache"].triton_key = stubs._triton_key
    modules["triton.compiler.compiler"].triton_key = stubs._triton_key
    sys.meta_path.insert(0, stubs._TritonFinder())


_install()
