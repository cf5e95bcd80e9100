"""The value model: a Qwen2 backbone with a small head that predicts, at every token, how the roll-out will end.

Wang et al. 2025, "Value-Guided Search for Efficient Chain-of-Thought Reasoning" (arXiv 2505.17373), section 3.
"""

import logging
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from transformers import Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2Model, Qwen2PreTrainedModel
from transformers.utils import ModelOutput

from classifier_lib.attention import resolve_attn_implementation

logger = logging.getLogger(__name__)

# Classes of a finished roll-out: 0 ended with a wrong answer, 1 with the right one, 2 did not end within the token limit.
LABEL_CORRECT = 1  # a model with one label predicts `label == LABEL_CORRECT`

HEAD_KEYS = ("score.0.weight", "score.2.weight")
HUB_KEYWORDS = ("revision", "cache_dir", "token", "local_files_only", "subfolder")


@dataclass
class ClassifierOutput(ModelOutput):
    """logits: [batch, seq, num_labels]; success_probs: [batch, seq] float32, the value at every token."""

    logits: torch.FloatTensor | None = None
    success_probs: torch.FloatTensor | None = None
    past_key_values: object | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


class Qwen2ForClassifier(Qwen2PreTrainedModel):
    """Qwen2 with a head Linear(hidden, hidden) -> ReLU -> Linear(hidden, num_labels), without biases, at every token.

    Checkpoint keys: `model.*`, `score.0.weight`, `score.2.weight`, as in VGS-AI/DeepSeek-VM-1.5B.
    """

    def __init__(self, config: Qwen2Config):
        if config.num_labels not in (1, 3):
            raise ValueError(f"num_labels is {config.num_labels}; a value model has 3 (default) or 1")
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = Qwen2Model(config)
        self.dropout = nn.Dropout(getattr(config, "score_dropout", 0.0))  # of the backbone's output, as released
        self.score = nn.Sequential(
            nn.Linear(config.hidden_size, config.hidden_size, bias=False),
            nn.ReLU(),
            nn.Linear(config.hidden_size, config.num_labels, bias=False),
        )
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, **kwargs):
        """Logits and values at every token.

        input_ids: int64 [batch, seq]. attention_mask: None, a padding mask [batch, seq], or a ready mask of the
        backbone's attention (4-D tensor, BlockMask, or a dictionary by layer type), which is handed through.
        position_ids: int64 [batch, seq], counted from 0 where not given. Returns a `ClassifierOutput`.
        """
        kwargs.pop("return_dict", None)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            **kwargs,
        )
        logits = self.score(self.dropout(outputs.last_hidden_state))
        return ClassifierOutput(
            logits=logits,
            success_probs=success_probs(logits),
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def set_dropout(self, *, attention: float, head: float) -> None:
        """Set the probabilities of dropout, of attention weights and of what the head reads; for training mode."""
        self.config.attention_dropout, self.config.score_dropout = attention, head
        for layer in self.model.layers:
            layer.self_attn.attention_dropout = attention
        self.dropout.p = head

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, **kwargs):
        """Load a value model, to score with or to go on training. Takes the keywords of `PreTrainedModel`.

        `attn_implementation`: see `resolve_attn_implementation`. Raises ValueError for a checkpoint without a head:
        its values would be random numbers (`from_backbone` gives a language model a fresh head).
        """
        want_info = kwargs.pop("output_loading_info", False)
        model, info = cls._load(pretrained_model_name_or_path, *model_args, **kwargs)
        if missing := [key for key in HEAD_KEYS if key in info["missing_keys"]]:
            raise ValueError(
                f"{pretrained_model_name_or_path} is not a value model: it has no {' and no '.join(missing)}; "
                "give a Qwen2ForClassifier checkpoint such as VGS-AI/DeepSeek-VM-1.5B, or train one "
                "(Qwen2ForClassifier.from_backbone gives a language model a fresh head to train)"
            )
        return (model, info) if want_info else model

    @classmethod
    def from_backbone(cls, path, *, num_labels: int = 3, p_dropout: float = 0.0, **kwargs):
        """Load any Qwen2 checkpoint to be trained; where it has no head it gets a fresh one, which is logged."""
        model, info = cls._load(path, num_labels=num_labels, **kwargs)
        model.set_dropout(attention=p_dropout, head=p_dropout)
        if any(key in info["missing_keys"] for key in HEAD_KEYS):
            logger.warning("%s has no value head: a fresh one with %d labels was made", path, num_labels)
        if broken := [key for key in info["missing_keys"] if key not in HEAD_KEYS]:
            raise ValueError(f"{path} lacks weights of a Qwen2 backbone: {', '.join(sorted(broken)[:3])} ...")
        return model

    @classmethod
    def _load(cls, path, *args, config=None, **kwargs):
        """What the library loads: (model, loading info). Keywords that the config knows go into it."""
        if "torch_dtype" in kwargs:  # the released snippets' name of it, which the library now warns about
            kwargs["dtype"] = kwargs.pop("torch_dtype")
        config = config or Qwen2Config.from_pretrained(path, **{k: kwargs[k] for k in HUB_KEYWORDS if k in kwargs})
        if config.num_labels == 2:  # what the library says of a config that says nothing
            config.num_labels = 3
        for key in [k for k in kwargs if hasattr(config, k) and k != "dtype"]:
            setattr(config, key, kwargs.pop(key))
        dtype = config.dtype if kwargs.get("dtype") in (None, "auto") else kwargs["dtype"]
        dtype = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
        kwargs["attn_implementation"] = resolve_attn_implementation(kwargs.get("attn_implementation"), dtype)
        return super().from_pretrained(path, *args, config=config, output_loading_info=True, **kwargs)


def success_probs(logits: torch.Tensor) -> torch.Tensor:
    """Probability of a correct end: logits [..., 3] -> softmax()[1], logits [..., 1] -> sigmoid; float32 [...]."""
    logits = logits.float()
    if logits.shape[-1] == 1:
        return logits.squeeze(-1).sigmoid()
    return logits.softmax(dim=-1)[..., LABEL_CORRECT]


# ---------------------------------------------------------------------------------------------------------------------
# Losses


def rollout_loss(
    logits: torch.Tensor,
    token_index: torch.Tensor,
    rollout_index: torch.Tensor,
    labels: torch.Tensor,
    weights: torch.Tensor,
) -> torch.Tensor:
    """Classification loss of VGS: each roll-out weighs the same, whatever its length.

        sum over roll-outs r of weights[r] * mean over the tokens t of r of loss(logits[t], labels[r])

    logits: [tokens, C] (C = 3: cross entropy; C = 1: binary cross entropy of `label == 1`). token_index, rollout_index:
    int64 [P], roll-out `rollout_index[p]` owns row `token_index[p]`; a row may belong to several roll-outs. labels:
    int64 [R]. weights: float [R], 1 / (roll-outs of the whole batch) for the mean. A roll-out without tokens adds 0.
    Returns a float32 scalar.
    """
    picked = logits.reshape(-1, logits.shape[-1])[token_index].float()
    target = labels[rollout_index]
    if picked.shape[-1] == 1:
        wanted = (target == LABEL_CORRECT).float()
        losses = F.binary_cross_entropy_with_logits(picked.squeeze(-1), wanted, reduction="none")
    else:
        losses = F.cross_entropy(picked, target, reduction="none")
    counts = torch.zeros_like(weights, dtype=torch.float32)
    counts.index_add_(0, rollout_index, torch.ones_like(losses))
    per_token = weights.float()[rollout_index] / counts[rollout_index]
    return (losses * per_token).sum()


def bradley_terry_loss(correct: torch.Tensor, incorrect: torch.Tensor) -> torch.Tensor:
    """Mean of -log sigmoid(correct - incorrect) over pairs of last-token logits, each float [pairs].

    Bradley and Terry 1952; as a reward-model loss: Ouyang et al. 2022 (arXiv 2203.02155), equation 1.
    """
    return -F.logsigmoid(correct.float() - incorrect.float()).mean()
