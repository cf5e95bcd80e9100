"""What a `ValueScorer` may use of a device's memory: arithmetic in bytes, without torch."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class TokenBytes:
    """Bytes that tokens take in a Qwen2. Only one layer's activations are there at a time; those of the head, which
    reads the last token of a row, do not count."""

    kv: int  # keys and values of a token in all layers
    new: int  # activations of a token that is read: four residual streams, gate, up and their product, q, k, v and out
    key: int  # a token's keys and values in one layer, repeated for every query head (attention behind a prefix only)
    pair: int  # mask entry of a new token and one that it may attend to (behind a prefix, where the kernel wants one)

    @classmethod
    def of_config(cls, config, itemsize: int, masked: bool) -> "TokenBytes":
        """`config`: a Qwen2Config; `itemsize`: bytes of a weight; `masked`: attention's kernel wants a ready mask."""
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        queries, keys = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
        new = 4 * config.hidden_size + 3 * config.intermediate_size + 2 * queries + 2 * keys
        pair = 1 + itemsize if masked else 0  # a boolean mask, and what SDPA makes of it
        return cls(2 * config.num_hidden_layers * keys * itemsize, new * itemsize, 2 * queries * itemsize, pair)


MOST_BATCH_TOKENS = 32768  # new tokens of a pass; more make no GPU faster
LEAST_BATCH_TOKENS = 1024


def default_batch_tokens(token: TokenBytes, limit: int | None) -> int:
    """New tokens of a pass whose activations take an eighth of the limit (bytes), the rest being for caches."""
    if limit is None:
        return MOST_BATCH_TOKENS
    return min(MOST_BATCH_TOKENS, max(LEAST_BATCH_TOKENS, limit // 8 // token.new))


class CacheBudget:
    """The account of held caches, of the pass under way (a working copy of its keys and values), and its activations.

    A pass reads `rows` rows of `new` tokens, each behind a held prefix of `prefix` tokens. `limit` (bytes; None:
    unbounded) bounds all three together, with one exception: a single row, with nothing held but its own prefix, goes
    whatever its activations are. So a cache of twice a trace's keys and values always works. Where the device turns out
    to have less than `limit`, `shrink` puts `ceiling` in its place.
    """

    def __init__(self, token: TokenBytes, limit: int | None = None):
        self.token, self.limit = token, 1 << 62 if limit is None else limit
        self.ceiling = self.limit  # lower where the device has proved to have less
        self.held = self.working = 0  # bytes; `working` of the pass under way

    @property
    def free(self) -> int:
        return min(self.limit, self.ceiling) - self.held - self.working

    def shrink(self, needed: int) -> None:
        """The device ran out of memory for `needed` bytes beside what is counted: so much is not asked for again. It may
        have been another process's moment, so one failure takes half at most."""
        self.ceiling = max(self.held + self.working + needed - 1, min(self.limit, self.ceiling) // 2)

    def pass_bytes(self, rows: int, prefix: int, new: int) -> int:
        """Working copy and activations. One mask serves all rows."""
        keys, token = prefix + new, self.token
        repeated, mask = (token.key, new * keys * token.pair) if prefix else (0, 0)
        return rows * (keys * (token.kv + repeated) + new * token.new) + mask

    def activation_bytes(self, batch_tokens: int, prefix: int, new: int) -> int:
        """Activations of the largest pass of such rows that both bounds allow."""
        most = min(batch_tokens // new, self.limit // self.pass_bytes(1, prefix, new))
        rows = max(1, most)
        return self.pass_bytes(rows, prefix, new) - rows * (prefix + new) * self.token.kv

    def rows_that_fit(self, prefix: int, new: int, held_after: int) -> int:
        """Rows of one pass, if each is to hold `held_after` tokens once the activations are gone; at least 1."""
        mask = self.pass_bytes(0, prefix, new)
        during = (self.free - mask) // (self.pass_bytes(1, prefix, new) - mask)
        after = self.free // ((prefix + new + held_after) * self.token.kv)
        return max(1, min(during, after))

    def check_last_row(self, prefix: int, new: int) -> None:
        """Raises ValueError where not even the working copy of one row fits beside what is held. The ceiling has no say:
        it may have been found beside other caches."""
        if self.limit - self.held < (prefix + new) * self.token.kv:
            raise ValueError(
                f"the value cache of {self.limit / 1e9:.3g} GB cannot hold a trace of {prefix + new} tokens (its prefix "
                f"and a working copy); it needs {(2 * prefix + new) * self.token.kv / 1e9:.3g} GB"
            )

    @contextlib.contextmanager
    def reading(self, rows: int, prefix: int, new: int) -> Iterator[None]:
        """A pass, from the allocation of its working copy until that is given up."""
        self.working = rows * (prefix + new) * self.token.kv
        try:
            yield
        finally:
            self.working = 0

    def hold(self, tokens: int) -> bool:
        """Enter the keys and values of that many tokens, if they fit."""
        fits = self.free >= tokens * self.token.kv
        self.held += tokens * self.token.kv if fits else 0
        return fits

    def drop(self, tokens: int) -> None:
        self.held -= tokens * self.token.kv
