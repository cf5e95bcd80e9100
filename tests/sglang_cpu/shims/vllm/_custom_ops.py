"""One name that sglang imports and, on a CPU, never calls. Other names must stay missing: sglang looks for them."""


def rotary_embedding(*args, **kwargs):
    raise RuntimeError("this stand-in for vllm's kernel must not be called")
