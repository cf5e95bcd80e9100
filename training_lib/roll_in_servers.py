"""`--roll_in_url MODEL=URL`: roll-ins from models that SGLang servers have loaded."""

import argparse

from common_lib.cli import UserError
from engine_lib.arguments import check_url

FLAG = "--roll_in_url"


def parse_roll_in_urls(args: argparse.Namespace) -> dict[str, tuple[str, ...]]:
    """The servers of each model that has some. Raises UserError."""
    if args.roll_in_url and not args.num_roll_ins:
        raise UserError(f"{FLAG} is for roll-ins, and --num_roll_ins 0 asks for none; leave one of them out")
    found: dict[str, tuple[str, ...]] = {}
    for text in args.roll_in_url:
        model, _, url = text.rpartition("=")
        if not model:
            raise UserError(f"{FLAG} {text!r} must be MODEL=URL: a model of --roll_in_models, and a server of it")
        check_url(url, FLAG)
        if model not in args.roll_in_models:
            raise UserError(f"{FLAG} {text}: {model} is none of --roll_in_models {' '.join(args.roll_in_models)}")
        found[model] = (*found.get(model, ()), url.rstrip("/"))
    return found
