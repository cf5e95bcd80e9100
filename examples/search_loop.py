"""Value-guided search on one page: a plain loop of blocks, with a value model and transformers' `generate` alone.

    python examples/search_loop.py GENERATOR VALUE_MODEL "40a2b9c9d7e4f9"

takes model folders such as quickstart's: quickstart_out/seed1337/generator and quickstart_out/seed1337/value_model/latest.
inference_eval.py keeps the same beams; it reads each token once, searches many problems at a time, and can be resumed.
"""

import re
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.append(f"{sys.path[0]}/..")  # this script's folder, and so the checkout
from classifier_lib import Qwen2ForClassifier

SIZES = dict(num_beams=4, beam_width=2, block_size=6, max_length=60)  # for the miniature; the paper: blocks of 4096


def search(prompt_ids, write_block, value_of, num_beams, beam_width, block_size, max_length, stop_ids):
    """`num_beams` finished responses (lists of token ids) and their values; sizes and lengths in response tokens.

    write_block(ids, n, limit): n continuations of `limit` tokens, or up to a stop id. value_of(ids): value at the end.
    """
    beams, values, open_beams = [[]] * num_beams, [0.0] * num_beams, list(range(num_beams))
    while open_beams:
        limit = min(block_size, max_length - len(beams[open_beams[0]]))  # all open beams are equally long
        written = [(beams[i], write_block(prompt_ids + beams[i], beam_width, limit)) for i in open_beams]
        candidates = [beam + block for beam, blocks in written for block in blocks]
        scores = [value_of(prompt_ids + candidate) for candidate in candidates]
        ranked = sorted(range(len(candidates)), key=lambda c: -scores[c])  # stable: of equal ones the first
        for i, best in zip(open_beams, sorted(ranked[: len(open_beams)]), strict=True):
            beams[i], values[i] = candidates[best], scores[best]
        open_beams = [i for i in open_beams if beams[i][-1] not in stop_ids and len(beams[i]) < max_length]
    return beams, values


def vote(answers, values):
    """The answer with the largest sum of values; an empty one never wins ('' where there is no other)."""
    totals = {a: sum(v for b, v in zip(answers, values, strict=True) if a == b) for a in answers if a}
    return max(totals, key=totals.get, default="")


@torch.inference_mode()
def main(generator_path, value_model_path, problem):
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(generator_path)
    generator = AutoModelForCausalLM.from_pretrained(generator_path)
    value_model = Qwen2ForClassifier.from_pretrained(value_model_path).eval()
    message, stop = [{"role": "user", "content": problem}], tokenizer.eos_token_id
    prompt_ids = tokenizer.apply_chat_template(message, add_generation_prompt=True)["input_ids"]
    sampling = dict(do_sample=True, temperature=0.6, top_p=0.95, top_k=0, eos_token_id=stop, pad_token_id=stop)

    def write_block(ids, n, limit):
        prompts = torch.tensor([ids] * n)
        out = generator.generate(prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=limit, **sampling)
        return [row[: row.index(stop) + 1] if stop in row else row for row in out[:, len(ids) :].tolist()]

    def value_of(ids):
        return value_model(torch.tensor([ids])).success_probs[0, -1].item()

    beams, values = search(prompt_ids, write_block, value_of, **SIZES, stop_ids={stop})
    texts = [tokenizer.decode(beam, skip_special_tokens=True) for beam in beams]
    answers = [(re.findall(r"\\boxed\{([^{}]*)\}", text.split("</think>")[-1]) or [""])[-1] for text in texts]
    print(*map("{:.3f}  {}".format, values, texts), f"answer: {vote(answers, values)}", sep="\n")


if __name__ == "__main__":
    main(*sys.argv[1:]) if len(sys.argv) == 4 else sys.exit(__doc__)
