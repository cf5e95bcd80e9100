"""What each part of gpu_check.py needs, in seconds: reckoned for one H100 with the 1.5B shapes, by what the part does.

Taken for it: importing torch and the first use of the GPU 12 s; the value model in bfloat16 100,000 tokens/s, and in
float32 a tenth; SGLang's start 50 s, 45 s once its kernels are built; a generator's folder 5 s to write. No torch here.
"""

# Its sums are the parts' shares of the time, and with what gpu_check.py keeps for their ends they fit nine minutes.
# A part does them in this order, the ones that matter most first; the last part gets what the others have left.
NEEDS: dict[str, dict[str, float]] = {
    "scoring": {
        "start": 12, "float32, sdpa": 6, "bfloat16, sdpa": 6, "bfloat16, flash_attention_2": 6,
        "bfloat16, flash_attention_4": 6, "out of memory": 5, "speed": 10, "speed, 8 trees": 14, "memory": 15, "copies": 4,
    },
    "training": {
        "start": 12, "none, eager": 15, "tree, groups of 4, eager": 10,
        "none as released": 45, "tree (auto)": 45, "pack": 40,
    },
    "memory": {"start": 12, "generator": 5, "sglang": 65},
    "search": {
        "start": 12, "generator": 5, "transformers, tiny": 3, "drawing": 3,
        "sglang": 45, "sglang, first block": 25, "sglang-server": 45, "sglang-server, first block": 25,
    },
}  # fmt: skip
# Parts that nine minutes have no room for: they run where --parts names them.
ASKED_FOR: dict[str, dict[str, float]] = {
    "values": {"start": 12, "local": 25, "sglang": 75, "sglang-server": 75},
}
EXTRA = {  # if time is left
    "memory": {"transformers": 15.0},
    "training": {"tree, groups of 4, compiled": 42.0, "pack, eager": 10.0, "none, compiled": 42.0},
    "search": {"transformers": 5.0, "transformers, first block": 55.0},
}


def need(part: str, what: str, size: str) -> float:
    """Seconds to ask `Report.has_time` for; 0 for the smaller models, and for what is guessed from what ran before."""
    return ((NEEDS | ASKED_FOR)[part] | EXTRA.get(part, {})).get(what, 0.0) if size == "full" else 0.0
