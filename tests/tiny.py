"""Tiny models and a tokenizer for tests: real architectures, random weights, made in milliseconds."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from classifier_lib import Qwen2ForClassifier

SPECIALS = ["<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<｜begin▁of▁sentence｜>"]
WORDS = ["<think>", "</think>"]


def tiny_config(**changes) -> Qwen2Config:
    """A Qwen2 with two layers, grouped-query attention and the tiny tokenizer's vocabulary."""
    settings = dict(
        vocab_size=264,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        bos_token_id=259,
        eos_token_id=256,
        pad_token_id=None,
        use_sliding_window=False,
    )
    return Qwen2Config(**(settings | changes))


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level tokenizer: 256 bytes, then the released models' special tokens, then <think> and </think> (plain)."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIALS)
    tokenizer.add_tokens(WORDS)
    template = (
        "{{ bos_token }}{% for m in messages %}<｜User｜>{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}<｜Assistant｜><think>\n{% endif %}"
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=SPECIALS[3],
        eos_token=SPECIALS[0],
        pad_token=SPECIALS[0],
        chat_template=template,
    )


def _scaled_up(model, factor: float = 8.0):
    """Random weights at the usual initial scale give nearly constant outputs; larger ones make differences visible."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1 and "embed" not in name:
                weight.mul_(factor)
    return model


def tiny_generator(seed: int = 0, **changes) -> Qwen2ForCausalLM:
    torch.manual_seed(seed)
    return _scaled_up(Qwen2ForCausalLM(tiny_config(**changes))).eval()


def tiny_value_model(seed: int = 1, num_labels: int = 3, **changes) -> Qwen2ForClassifier:
    torch.manual_seed(seed)
    return _scaled_up(Qwen2ForClassifier(tiny_config(num_labels=num_labels, **changes))).eval()


def save_generator(folder: Path, **changes) -> Path:
    """A generator folder with weights and tokenizer."""
    tiny_generator(**changes).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return Path(folder)


def save_value_model(folder: Path, tokenizer: bool = True, **changes) -> Path:
    """A value-model folder; `tokenizer=False` leaves it bare, as the released one is."""
    tiny_value_model(**changes).save_pretrained(folder)
    if tokenizer:
        tiny_tokenizer().save_pretrained(folder)
    return Path(folder)
