"""Declares two of torchvision's compiled operators before torchvision is imported, and nothing else.

The torchvision wheel is built for another torch, so its operators do not load; sglang imports it but calls none of
them. A .pth file in the virtual environment imports this module at the start of every Python there, child processes
included; torch itself is only imported once torchvision is.
"""

import importlib.abc
import sys


class _BeforeTorchvision(importlib.abc.MetaPathFinder):
    """Sees the first import of torchvision, steps aside, and lets the real one be found."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname == "torchvision":
            sys.meta_path.remove(self)
            _declare_operators()


def _declare_operators() -> None:
    import torch

    global library  # the operators go when it is collected
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


sys.meta_path.insert(0, _BeforeTorchvision())
