"""The miniature's tokenizer: one token for each sign of the task, in Hugging Face's format.

`<think>`, `</think>` and `\\boxed{` are one token each and, as in DeepSeek-R1's tokenizer, not special: decoding without
special tokens keeps them. The chat template writes `<bos>PROBLEM<think>`.
"""

from string import ascii_lowercase, digits

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = ["<pad>", "<bos>", "<eos>", "<unk>"]
SIGNS = ["}", "=", "^", ";", "?", *digits, *ascii_lowercase]
WORDS = ["<think>", "</think>", "\\boxed{"]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<think>{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """48 tokens. Encoding adds no special tokens and drops signs that the task does not use.

    It is byte-level BPE without merges because transformers' AutoTokenizer and SGLang give every folder with a Qwen2
    model Qwen2's pre-tokenizer and decoder: so made, it comes out the same with them.
    """
    vocabulary = {sign: number for number, sign in enumerate(SPECIAL_TOKENS + SIGNS)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in WORDS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
