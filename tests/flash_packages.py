"""Stand-ins for packages of attention kernels, and a process that believes it has a GPU and them."""

import json
import os
import subprocess
import sys
from pathlib import Path

from conftest import ROOT

FUNCTIONS = """
import torch

calls = []

def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, **kwargs):
    '''Bottom-right causal attention over [B, S, heads, d], as all flash-attn packages define it.'''
    calls.append((q.shape[1], k.shape[1], causal))
    q, k, v = (t.transpose(1, 2).float() for t in (q, k, v))
    groups = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(groups, dim=1) for t in (k, v))
    scores = q @ k.transpose(2, 3) * softmax_scale
    mask = torch.ones(scores.shape[-2:], dtype=bool).tril(k.shape[2] - q.shape[2])
    return (scores.masked_fill(~mask, float('-inf')).softmax(-1) @ v).transpose(1, 2).to(torch.bfloat16)

def flash_attn_varlen_func(q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, **kwargs):
    raise NotImplementedError

flash_attn_with_kvcache = flash_attn_varlen_func
"""
PADDING = "def pad_input(): pass\ndef unpad_input(): pass\n"
# As their wheels are: flash-attn 4 has no flash_attn/__init__.py, which is what a look-up by name falls for.
PACKAGES = {
    "flash_attn-2.8.3": {"flash_attn/__init__.py": FUNCTIONS, "flash_attn/bert_padding.py": PADDING},
    "flash_attn_4-4.0.0b18": {
        "flash_attn/cute/__init__.py": FUNCTIONS,
        "flash_attn/cute/interface.py": "def _flash_attn_fwd(): pass\ndef _flash_attn_bwd(): pass\n",
    },
    "flash_attn_3-3.0.0b1": {"flash_attn_interface.py": FUNCTIONS},
}  # fmt: skip

BEGIN = """
import json, logging, sys
import torch
sys.path.insert(0, {root!r})
torch.cuda.is_available = lambda: {gpu}
torch.cuda.get_device_capability = lambda *_: {capability}
torch.cuda.device_count = lambda: 1
said = []
handler = logging.Handler()
handler.emit = lambda record: said.append(record.levelname + ' ' + record.getMessage())
logging.getLogger().addHandler(handler)
logging.getLogger().setLevel("INFO")
sys.path.insert(0, {tests!r})
found = {{}}
{program}
print(json.dumps(found | {{"said": [line for line in said if "attention" in line]}}))
"""


def install(folder: Path, *names: str) -> Path:
    """Lay packages out as pip would."""
    for name in names:
        package, version = name.split("-")
        for path, text in PACKAGES[name].items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(text)
        info = folder / f"{name}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {package.replace('_', '-')}\nVersion: {version}\n"
        )
        (info / "RECORD").write_text("".join(f"{path},,\n" for path in PACKAGES[name]))
    folder.mkdir(exist_ok=True)
    return folder


def believing(packages: Path, program: str, gpu: bool = True, capability: tuple[int, int] = (9, 0)) -> dict:
    """`found` of a program as it is in a process with these packages and that GPU, and what it `said` of attention."""
    text = BEGIN.format(root=str(ROOT), tests=str(ROOT / "tests"), gpu=gpu, capability=capability, program=program)
    path = os.pathsep.join([str(packages), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", text], env=os.environ | {"PYTHONPATH": path}, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])
