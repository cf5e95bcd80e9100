"""The values of a finished trace, every 64 tokens, from a running value server.

    python -m engine_lib.value_server --classifier_ckpt_path VALUE_MODEL --port 30001    # in another terminal
    python examples/value_every_64_tokens.py --url http://localhost:30001 trace.json
    python examples/value_every_64_tokens.py --url http://localhost:30001 --tokenizer GENERATOR trace.txt

trace.json: a list of token ids, prompt and response. Any other file is text, and needs a tokenizer. The server reads what
it has not cached of the trace once, however many values are asked for.
"""

import json
import sys
from pathlib import Path

sys.path.append(f"{sys.path[0]}/..")  # this script's folder, and so the checkout
from common_lib.cli import ArgumentParser, UserError, run_script


def parse_args(argv=None):
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("trace", type=Path, help="file with a list of token ids (.json), or with text")
    parser.add_argument("--url", default="http://localhost:30001", help="of a value server; no router")
    parser.add_argument("--every", type=int, default=64, help="tokens between two values")
    parser.add_argument("--tokenizer", help="folder or name of a model whose tokenizer reads a text")
    parser.add_argument("--vocab_size", type=int, help="of the value model, where the server is on another machine")
    return parser.parse_args(argv)


def read_ids(path, tokenizer):
    try:
        text = path.read_text(encoding="utf-8")
        ids = json.loads(text) if path.suffix == ".json" else None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if ids is None:
        if tokenizer is None:
            raise UserError(f"{path} is text: give the --tokenizer that it was written with")
        from transformers import AutoTokenizer

        ids = AutoTokenizer.from_pretrained(tokenizer)(text, add_special_tokens=False).input_ids
    if not isinstance(ids, list) or not ids or not all(type(token) is int for token in ids):
        raise UserError(f"{path} has no list of token ids; give [1, 2, 3, ...]")
    return ids


def main(argv=None):
    args = parse_args(argv)
    if args.every < 1:
        raise UserError(f"--every {args.every} must be 1 or more")
    from engine_lib.base import EngineError
    from engine_lib.value_client import ValueClient

    ids = read_ids(args.trace, args.tokenizer)
    # Every so many tokens, and at the end, where the roll-out's value is.
    positions = sorted({*range(args.every - 1, len(ids), args.every), len(ids) - 1})
    try:
        values = ValueClient(args.url, args.vocab_size).values(ids, positions)
    except (ValueError, EngineError) as error:
        raise UserError(str(error)) from error
    for position, value in zip(positions, values, strict=True):
        print(f"{position + 1:6d} tokens  {value:.3f}  {'#' * round(40 * value)}")


if __name__ == "__main__":
    run_script(main)
