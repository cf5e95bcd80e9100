"""Qwen2ForClassifier (classifier_lib/modeling.py) as a model of SGLang 0.5.23: the same checkpoints, unchanged.

It answers embedding requests (`is_embedding`) with the rows of engine_lib/value_wire.py.
"""

from collections.abc import Iterable

import torch
from sglang.srt.layers.pooler import EmbeddingPoolerOutput
from sglang.srt.models.qwen2 import Qwen2ForCausalLM, Qwen2Model
from sglang.srt.utils import add_prefix
from torch import nn

from engine_lib.sglang_value_model.progress import ProgressTable, RequestProgress

HEAD_KEYS = ("score.0.weight", "score.2.weight")
STACKED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}  # SGLang's own


class Qwen2ValueModel(nn.Module):
    """Backbone, and the head Linear -> ReLU -> Linear without biases, which is computed in float32 where it is asked for."""

    def __init__(self, config, quant_config=None, prefix: str = ""):
        super().__init__()
        if config.model_type != "qwen2":
            raise ValueError(
                f"the value model's backbone is {config.model_type!r}; only 'qwen2' is served by SGLang so far"
            )
        self.num_labels = 3 if config.num_labels == 2 else config.num_labels  # 2: a config that says nothing
        if self.num_labels not in (1, 3):
            raise ValueError(f"num_labels is {config.num_labels}; a value model has 3 (default) or 1")
        self.config, self.quant_config = config, quant_config
        self.model = Qwen2Model(config, quant_config=quant_config, prefix=add_prefix("model", prefix))
        size = config.hidden_size
        self.score = nn.Sequential(
            nn.Linear(size, size, bias=False, dtype=torch.float32),
            nn.ReLU(),
            nn.Linear(size, self.num_labels, bias=False, dtype=torch.float32),
        )
        self.progress = ProgressTable()

    @torch.no_grad()
    def forward(self, input_ids, positions, forward_batch, input_embeds=None, get_embedding=True):
        """One chunk of each request: all of it, mostly."""
        progress = self._advance(forward_batch)  # before the backbone: it waits for what runs on the device
        hidden = self.model(input_ids, positions, forward_batch, input_embeds)
        if forward_batch.token_indices_to_pool is not None:
            return EmbeddingPoolerOutput(self._rows_at_positions(hidden, forward_batch, progress))
        lengths = torch.tensor(forward_batch.extend_seq_lens_cpu)  # prefill graphs pad input_ids
        logits = self.score(hidden[(lengths.cumsum(0) - 1).to(hidden.device)].float())
        computed = logits.new_tensor([request.computed for request in progress])
        return EmbeddingPoolerOutput(torch.cat([logits, computed[:, None]], dim=1))

    def _advance(self, forward_batch) -> list[RequestProgress]:
        lengths = forward_batch.extend_seq_lens_cpu
        return [
            self.progress.advance(*chunk)
            for chunk in zip(
                forward_batch.rids or [None] * len(lengths),
                forward_batch.extend_prefix_lens_cpu,
                lengths,
                forward_batch.orig_seq_lens.tolist(),
                strict=True,
            )
        ]

    def _rows_at_positions(self, hidden, forward_batch, progress: list[RequestProgress]) -> list[torch.Tensor]:
        rows, begin = [], 0
        for request, wanted, prefix, length in zip(
            progress, forward_batch.token_indices_to_pool, forward_batch.extend_prefix_lens_cpu,
            forward_batch.extend_seq_lens_cpu, strict=True,
        ):  # fmt: skip
            if request.rows is None or len(request.rows) != len(wanted):
                request.rows = hidden.new_zeros(len(wanted), self.num_labels + 1, dtype=torch.float32)
            here = ((wanted >= prefix) & (wanted < prefix + length)).nonzero().squeeze(1)
            places = here.to(hidden.device)
            request.rows[places, :-1] = self.score(hidden[(wanted[here] - prefix + begin).to(hidden.device)].float())
            request.rows[places, -1] = self.config.vocab_size
            rows.append(torch.cat([request.rows.flatten(), request.rows.new_tensor([request.computed])]))
            begin += length
        return rows

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """SGLang's own loader for the backbone; what it lacks is an error, where SGLang would leave random numbers."""
        found: dict[str, torch.Size] = {}

        def noted():
            for name, weight in weights:
                if not name.startswith("lm_head"):
                    found[name] = weight.shape
                    yield name, weight

        try:
            Qwen2ForCausalLM._legacy_load_weights(self, noted())
        except (AssertionError, RuntimeError, ValueError) as error:  # a shape: it does not say whose
            name = list(found)[-1]
            raise ValueError(f"the checkpoint's {name} of shape {list(found[name])} does not fit: {error}") from error
        names = [name for name, _ in self.named_parameters()]
        if missing := [name for name in _checkpoint_names(names) if name not in found]:
            raise ValueError(f"the checkpoint is not a whole value model: it has no {', no '.join(missing[:3])}")
        if other := [name for name in found if name.startswith("score.") and name not in HEAD_KEYS]:
            raise ValueError(f"the checkpoint's head has {other[0]}, which a value model of this project does not have")


def _checkpoint_names(parameters: Iterable[str]) -> list[str]:
    """Names in a checkpoint; SGLang keeps some matrices in one."""
    names = []
    for name in parameters:
        if not name.endswith((".weight", ".bias")):  # what quantization adds
            continue
        stacked = next((key for key in STACKED if f".{key}." in name), None)
        names += [name.replace(stacked, part) for part in STACKED[stacked]] if stacked else [name]
    return names


# SGLang finds a model by its class's name, which is the checkpoints' architecture.
Qwen2ValueModel.__name__ = "Qwen2ForClassifier"
EntryClass = Qwen2ValueModel
