"""What is to be searched, and with what: all that is known before a model is loaded."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from common_lib.models import ModelInfo
from common_lib.shards import Shard
from data_utils import Problem
from search_lib.tree import SearchConfig


@dataclass(frozen=True)
class SearchPlan:
    """Problems, models and settings of a run, checked against each other.

    problems, prompts: of the whole benchmark, of which this process searches those whose number `shard` holds.
    value_devices: of each local value model (two may be on one), or of SGLang's engine; none where servers have it.
    value_attention: by device, of local ones.
    """

    problems: list[Problem]
    prompts: list[list[int]]
    shard: Shard
    generator: ModelInfo
    value_model: ModelInfo
    tokenizer: Any
    stop_ids: tuple[int, ...]
    config: SearchConfig
    engine: str
    device: str
    value_engine: str
    value_devices: tuple[str, ...]
    value_dtype: str
    value_attention: Mapping[str, str]

    @property
    def own_prompts(self) -> dict[int, list[int]]:
        """Of the problems that this process searches, by data_idx."""
        return {data_idx: prompt for data_idx, prompt in enumerate(self.prompts) if self.shard.holds(data_idx)}

    @property
    def longest_prompt(self) -> int:
        """In tokens."""
        return max(map(len, self.prompts))

    @property
    def longest_trace(self) -> int:
        """Tokens of prompt and response at most."""
        return self.longest_prompt + self.config.max_length

    @property
    def memory_devices(self) -> tuple[str, ...]:
        """Devices of this process whose memory is spoken of: those of value models, else the generator's."""
        here = self.value_devices or ((self.device,) if self.engine != "sglang-server" else ())
        return tuple(dict.fromkeys(here))

    @property
    def value_kv_bytes(self) -> int:
        return self.value_model.kv_bytes(2 if self.value_dtype == "bf16" else 4)

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
